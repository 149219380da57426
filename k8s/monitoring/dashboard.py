"""The Grafana dashboard "training overhead", written to the dashboard.json beside this file.

    python k8s/monitoring/dashboard.py

Each row answers a question an operator asks of a running job. One job at a time ($job); $rank narrows what differs
between ranks. A rank is an endpoint (`instance`); infomcr_rank_info says which.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dashboard.json")
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24
_COLOR = {
    "plain": "blue",
    "regularized": "orange",
    "data wait": "yellow",
    "allreduce wait": "purple",
    "penalty": "orange",
    "rest": "blue",
}
"""The same thing has the same colour in every panel."""

Json = dict[str, Any]


# Queries


def of_job(metric: str, **labels: str) -> str:
    """A metric's series of the chosen job."""
    selectors = ['job="$job"', *(f'{name}="{value}"' for name, value in labels.items())]
    return f"{metric}{{{', '.join(selectors)}}}"


def rate(metric: str, **labels: str) -> str:
    return f"rate({of_job(metric, **labels)}[$__rate_interval])"


def five_minutes(expression: str) -> str:
    """For a single number: over a window that an evaluation does not fill."""
    return expression.replace("[$__rate_interval]", "[5m]")


def of_ranks(series: str) -> str:
    """Series of the chosen ranks, with the label ``rank``."""
    return f'{series} * on (job, instance) group_left (rank) infomcr_rank_info{{job="$job", rank=~"$rank"}}'


def per_step(seconds: str) -> str:
    """Mean seconds of a histogram a step, over the chosen ranks."""
    return f"sum({of_ranks(rate(seconds + '_sum'))}) / sum({of_ranks(rate('infomcr_step_duration_seconds_count'))})"


def by_rank(seconds: str) -> str:
    """Summed seconds of a histogram a second, for each of the chosen ranks."""
    return f"sum by (rank) ({of_ranks(rate(seconds + '_sum'))})"


def quantile(q: float) -> str:
    """Of the step's time, for each phase."""
    return f"histogram_quantile({q}, sum by (phase, le) ({rate('infomcr_step_duration_seconds_bucket')}))"


# A run takes its plain steps first: their median is that of all of them. Restarted later, a process has had none, but
# for an epoch's last, smaller batches: a twentieth is no basis to compare with.
OVERHEAD = (
    f"histogram_quantile(0.5, sum by (le) ({rate('infomcr_step_duration_seconds_bucket', phase='regularized')}))"
    f" / histogram_quantile(0.5, sum by (le) ({of_job('infomcr_step_duration_seconds_bucket', phase='plain')})) > 0"
    f" and sum({of_job('infomcr_step_duration_seconds_count', phase='plain')})"
    f" > 0.05 * sum({of_job('infomcr_step_duration_seconds_count', phase='regularized')})"
)
PROGRESS = f"max({of_job('infomcr_progress_ratio')})"
PARTS = {
    "data wait": "infomcr_data_wait_seconds",
    "allreduce wait": "infomcr_allreduce_wait_seconds",
    "penalty": "infomcr_penalty_duration_seconds",
}
REST = " - ".join(per_step(s) for s in ("infomcr_step_duration_seconds", *PARTS.values()))
OWN_TIME = (
    f"({by_rank('infomcr_step_duration_seconds')} - {by_rank('infomcr_allreduce_wait_seconds')})"
    f" / sum by (rank) ({of_ranks(rate('infomcr_step_duration_seconds_count'))})"
)


def known(metric: str) -> str:
    """A gauge that is 0 until it is measured, or where it does not apply; nothing then."""
    return f"(max({of_job(metric)}) > 0)"


def since(timestamp: str) -> str:
    """Seconds since a time that a metric gives."""
    return f"time() - {known(timestamp)}"


def of_gamma(metric: str) -> str:
    """γ̂ may well be 0 or less: it is known once its estimate has cost time."""
    cost = of_job("infomcr_gamma_hat_cost_seconds")
    return f"max({of_job(metric)} and on (instance) {cost} > 0)"


GAMMA, GAMMA_ERROR = of_gamma("infomcr_gamma_hat"), of_gamma("infomcr_gamma_hat_standard_error")


def error(split: str) -> str:
    return f"max({of_job('infomcr_top1_error_ratio', split=split)})"


# Panels


def panel(kind: str, title: str, width: int, queries: dict[str, str], *, why: str, **rest: Any) -> Json:
    """A panel of one query a legend entry; ``why`` is what the i in its corner says."""
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": _SOURCE,
            "expr": expression,
            "legendFormat": legend,
            "instant": kind == "stat",
            "range": kind != "stat",
        }
        for i, (legend, expression) in enumerate(queries.items())
    ]
    common = {"type": kind, "title": title, "description": why, "datasource": _SOURCE, "targets": targets}
    return common | {"gridPos": {"w": width}} | rest


def stat(
    title: str,
    queries: dict[str, str],
    unit: str,
    *,
    why: str,
    decimals: int | None = None,
    limits: tuple[float, float] | None = None,
) -> Json:
    """A number; orange and red from two limits on, where there are any."""
    steps: list[Json] = [{"value": None, "color": "text"}]
    if limits is not None:
        steps = [{"value": None, "color": "green"}]
        steps += [{"value": v, "color": c} for v, c in zip(limits, ("orange", "red"), strict=True)]
    defaults: Json = {"unit": unit, "noValue": "–", "thresholds": {"mode": "absolute", "steps": steps}}
    if decimals is not None:
        defaults["decimals"] = decimals
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "center",
        "orientation": "vertical",
        "textMode": "value" if len(queries) == 1 else "value_and_name",
        "wideLayout": True,
    }
    return panel(
        "stat", title, 3, queries, why=why, fieldConfig={"defaults": defaults, "overrides": []}, options=options
    )


def series(
    title: str,
    width: int,
    queries: dict[str, str],
    unit: str,
    *,
    why: str,
    stacked: bool = False,
    least: float | None = None,
    decimals: int | None = None,
    logarithmic: bool = False,
    overrides: dict[str, Json] | None = None,
) -> Json:
    """Lines over time. ``overrides``: further field settings, by legend entry."""
    custom: Json = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1 if stacked else 2,
        "fillOpacity": 70 if stacked else 0,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if logarithmic else {"type": "linear"},
        "axisGridShow": True,
    }
    defaults: Json = {"unit": unit, "custom": custom, "color": {"mode": "palette-classic"}}
    if least is not None:
        defaults["min"] = least
    if decimals is not None:
        defaults["decimals"] = decimals
    settings = {name: color(_COLOR[name]) for name in queries if name in _COLOR} | (overrides or {})
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "none"},
    }
    config = {"defaults": defaults, "overrides": [override(name, values) for name, values in settings.items()]}
    return panel("timeseries", title, width, queries, why=why, fieldConfig=config, options=options)


def color(name: str) -> Json:
    return {"color": {"mode": "fixed", "fixedColor": name}}


def override(name: str, values: Json) -> Json:
    """Settings of one legend entry; ``*end``: of all that end so."""
    matcher = {"id": "byName", "options": name}
    if name.startswith("*"):
        matcher = {"id": "byRegexp", "options": f"/{name[1:]}$/"}
    properties = [{"id": key, "value": value} for key, value in values.items()]
    return {"matcher": matcher, "properties": properties}


DASHED = {"custom.lineStyle": {"fill": "dash", "dash": [8, 6]}}
RIGHT = {"custom.axisPlacement": "right"}
EDGE = {"custom.lineWidth": 0, "custom.hideFrom": {"legend": True, "tooltip": False, "viz": False}}

GLANCE = [
    stat(
        "Overhead",
        {"ratio": five_minutes(OVERHEAD)},
        "suffix: ×",
        decimals=2,
        why="Median time of the regularized steps of the last 5 minutes over that of all plain steps of the job.",
    ),
    stat(
        "Throughput",
        {"images": five_minutes(f"sum({rate('infomcr_samples_total')})")},
        "suffix: img/s",
        decimals=0,
        why="Training images of all ranks a second over the last 5 minutes, pauses between epochs included.",
    ),
    stat("Done", {"progress": PROGRESS}, "percentunit", decimals=1, why="Share of the whole run's steps."),
    stat(
        "Ends in",
        {"left": f"(1 - {PROGRESS}) / (max(deriv({of_job('infomcr_progress_ratio')}[10m])) > 0)"},
        "dtdurations",
        decimals=0,
        why="What is left, at the pace of the last 10 minutes, evaluations included.",
    ),
    stat(
        "Last step",
        {"ago": since("infomcr_last_step_timestamp_seconds")},
        "suffix: s ago",
        decimals=0,
        limits=(60, 600),
        why="Evaluation, metric and checkpoint stand between two steps.",
    ),
    stat(
        "Ranks",
        {"train": f"max({of_job('infomcr_world_size')})", "answer": f"sum({of_job('up')})"},
        "none",
        why="Ranks that train together; endpoints that answer Prometheus.",
    ),
    stat(
        "Test − train",
        {"gap": f"{error('test')} - {error('train')}"},
        "percentunit",
        decimals=2,
        why="Top-1 error, of the last evaluation of each: what a flatter minimum should make smaller.",
    ),
    stat(
        "γ̂",
        {"gamma": GAMMA},
        "none",
        decimals=1,
        why="The metric, ln|ξ| (Eq. 6) of training images: lower generalizes better.",
    ),
]

OVERHEAD_PANELS = [
    series(
        "Mean step, by what it did",
        10,
        {name: per_step(metric) for name, metric in PARTS.items()} | {"rest": REST},
        "s",
        stacked=True,
        least=0,
        why="Mean over the chosen ranks. Penalty: what the gradients of a regularized step take beyond those of a "
        "plain one. Rest: forward, backward and update.",
    ),
    series(
        "Step time by phase",
        8,
        {"{{phase}}": quantile(0.5), "{{phase}}, 95 %": quantile(0.95)},
        "s",
        least=0,
        why="Median and 95 % quantile over all ranks.",
        overrides={
            name + end: color(_COLOR[name]) | style
            for name in ("plain", "regularized")
            for end, style in (("", {}), (", 95 %", DASHED))
        },
    ),
    series(
        "Overhead",
        6,
        {
            "regularized ÷ plain": OVERHEAD,
            "as the job measured it": known("infomcr_overhead_ratio"),
            "budget": known("infomcr_overhead_budget_ratio"),
        },
        "suffix: ×",
        least=1,
        decimals=2,
        why="Medians off the histograms; the job's last measurement of its own; regularizer.budget, if it is set.",
        overrides={
            "regularized ÷ plain": color("orange"),
            "as the job measured it": color("green"),
            "budget": color("red") | DASHED,
        },
    ),
]

BOUGHT_PANELS = [
    series(
        "Metric γ̂ ± standard error",
        8,
        {
            "γ̂ + standard error": f"{GAMMA} + {GAMMA_ERROR}",
            "γ̂": GAMMA,
            "γ̂ − standard error": f"{GAMMA} - {GAMMA_ERROR}",
        },
        "none",
        why="ln|ξ| of training images (Eq. 6): lower generalizes better. No line: not estimated yet.",
        overrides={
            "γ̂ + standard error": color("green")
            | EDGE
            | {"custom.fillBelowTo": "γ̂ − standard error", "custom.fillOpacity": 25},
            "γ̂": color("green"),
            "γ̂ − standard error": color("green") | EDGE,
        },
    ),
    series(
        "Top-1 error",
        8,
        {"test": error("test"), "train": error("train")},
        "percentunit",
        least=0,
        why="Each of its last evaluation; the band between them is what a flatter minimum should make narrower.",
        overrides={
            "test": color("red") | {"custom.fillBelowTo": "train", "custom.fillOpacity": 20},
            "train": color("green"),
        },
    ),
    series(
        "Loss, and the penalty that is added to it",
        8,
        {
            "loss L": f"avg({of_job('infomcr_loss')})",
            "penalty βR": f"avg({of_job('infomcr_penalty')}) * avg({of_job('infomcr_beta')})",
        },
        "none",
        why="Mean over the ranks of their last batches.",
        overrides={"loss L": color("blue"), "penalty βR": color("orange") | RIGHT},
    ),
]

RANK_PANELS = [
    series(
        "Is a rank slow? Step less allreduce wait",
        8,
        {"rank {{rank}}": OWN_TIME},
        "s",
        why="Synchronous training makes all ranks' steps equally long: the slow rank is the one that does not wait.",
    ),
    series(
        "Data or network? Share of the step spent waiting",
        8,
        {
            f"rank {{{{rank}}}}, {name}": f"{by_rank(PARTS[name])} / {by_rank('infomcr_step_duration_seconds')}"
            for name in ("data wait", "allreduce wait")
        },
        "percentunit",
        least=0,
        overrides={"*, data wait": DASHED},
        why="Data wait: decoding is the bottleneck. Allreduce wait: the network, or a slower rank (see left).",
    ),
    series(
        "Allreduce traffic during steps",
        8,
        {
            "rank {{rank}}": f"sum by (rank) ({of_ranks(rate('infomcr_allreduce_bytes_total'))})"
            f" / {by_rank('infomcr_step_duration_seconds')}"
        },
        "Bps",
        least=0,
        why="Bytes of gradients a rank gives to the allreduce, over the time of the steps. A regularized step sends "
        "what a plain one sends.",
    ),
]

ALIVE_PANELS = [
    series(
        "Time since the last …",
        6,
        {
            "step": since("infomcr_last_step_timestamp_seconds"),
            "checkpoint": since("infomcr_last_checkpoint_timestamp_seconds"),
            "γ̂": of_gamma("infomcr_gamma_hat_age_seconds"),
        },
        "s",
        least=0,
        why="A step's line that rises without an end: the job stands still.",
    ),
    series(
        "Went wrong, since the start",
        6,
        {
            "non-finite steps": f"max({of_job('infomcr_nonfinite_steps_total')})",
            "unreadable samples": f"sum({of_job('infomcr_data_errors_total')})",
            "failed checkpoints": f"sum({of_job('infomcr_checkpoints_total', outcome='failed')})",
            "singular trials": f"max({of_job('infomcr_gamma_hat_singular_trials')})",
        },
        "none",
        least=0,
        decimals=0,
        why="All should be zero. Singular trials: of the last estimate of γ̂.",
        overrides={"*": {"custom.axisSoftMax": 1}},
    ),
    series(
        "Learning rate and β",
        6,
        {"learning rate": f"max({of_job('infomcr_learning_rate')})", "β": f"max({of_job('infomcr_beta')})"},
        "none",
        least=0,
        why="The regularizer goes on after the first drop of the rate, unless regularizer.when says otherwise.",
        overrides={"learning rate": color("blue"), "β": color("orange") | RIGHT},
    ),
    series(
        "Memory",
        6,
        {
            "rank {{rank}}": of_ranks(of_job("infomcr_memory_bytes")),
            "rank {{rank}}, GPU": of_ranks(of_job("infomcr_gpu_memory_bytes")),
        },
        "bytes",
        least=0,
        why="Resident memory of each rank's process, and of its GPU where it has one.",
    ),
]

ROWS = [
    ("At a glance", 4, GLANCE),
    ("How much slower is a regularized step, and where does the time go?", 8, OVERHEAD_PANELS),
    ("What did it buy?", 8, BOUGHT_PANELS),
    ("Which rank, data or network holds it up?", 8, RANK_PANELS),
    ("Is it well?", 7, ALIVE_PANELS),
]


# Variables and annotations


def variable(name: str, query: str, *, several: bool = False) -> Json:
    everything = {"includeAll": True, "allValue": ".*", "multi": True} if several else {}
    chosen = {"selected": True, "text": ["All"], "value": ["$__all"]} if several else {}
    return {
        "name": name,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # with the time range
        "sort": 3,  # by number
        "current": chosen,
        **everything,
    }


def annotation(name: str, colour: str, expression: str, title: str) -> Json:
    """A mark at each time where the expression is positive."""
    return {
        "name": name,
        "datasource": _SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": colour,
        "expr": expression,
        "titleFormat": title,
    }


def of_then(metric: str, **labels: str) -> str:
    return f"{of_job(metric, **labels)} offset $__interval"


VARIABLES = [
    {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}},
    variable("job", "label_values(infomcr_world_size, job)"),
    variable("rank", 'label_values(infomcr_rank_info{job="$job"}, rank)', several=True),
]
ANNOTATIONS = [
    annotation(
        "Regularizer on",
        "orange",
        f"(sum({of_job('infomcr_steps_total', phase='regularized')}) > 0)"
        f" unless (sum({of_then('infomcr_steps_total', phase='regularized')}) > 0)",
        "regularizer on",
    ),
    annotation(
        "Rate drop",
        "blue",
        f"max({of_job('infomcr_learning_rate')}) < 0.5 * max({of_then('infomcr_learning_rate')})",
        "learning rate drops",
    ),
    annotation(
        "Elastic reset",
        "red",
        f"(max by (reason) ({of_job('infomcr_elastic_resets_total')}) > 0)"
        f" unless max by (reason) ({of_job('infomcr_elastic_resets_total')})"
        f" <= max by (reason) ({of_then('infomcr_elastic_resets_total')})",
        "elastic reset: {{reason}}",
    ),
]


def dashboard() -> Json:
    """The whole, with places and ids given to the panels."""
    panels: list[Json] = []
    y = 0
    for title, height, row in ROWS:
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": _place(0, y, 24, 1)})
        x, y = 0, y + 1
        for one in row:
            width = one["gridPos"]["w"]
            panels.append(one | {"gridPos": _place(x, y, width, height)})
            x += width
        assert x == _WIDTH, title
        y += height
    return {
        "uid": "infomcr-overhead",
        "title": "infomcr: training overhead",
        "tags": ["infomcr"],
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,  # one crosshair for all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": VARIABLES},
        "annotations": {"list": ANNOTATIONS},
        "panels": [{"id": i} | one for i, one in enumerate(panels, start=1)],
    }


def _place(x: int, y: int, w: int, h: int) -> Json:
    return {"x": x, "y": y, "w": w, "h": h}


def to_json() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(to_json(), encoding="utf-8")
