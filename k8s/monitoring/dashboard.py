"""The Grafana dashboard "training overhead", written to the dashboard.json beside this file.

    python k8s/monitoring/dashboard.py

Each row answers a question an operator asks of a running job. One job at a time ($job); $rank selects the ranks where
they differ. A rank is an endpoint (`instance`); infomcr_rank_info maps it to the rank's number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models

FILE = Path(__file__).with_name("dashboard.json")
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
Panel = stat.Panel | timeseries.Panel

# Queries

STEP = "infomcr_step_duration_seconds"
PARTS = {
    "data wait": "infomcr_data_wait_seconds",
    "allreduce wait": "infomcr_allreduce_wait_seconds",
    "penalty": "infomcr_penalty_duration_seconds",
}
"""Histograms of a step's parts."""


def select(metric: str, **labels: str) -> str:
    """Series of the selected job."""
    selectors = ['job="$job"', *(f'{name}="{value}"' for name, value in labels.items())]
    return f"{metric}{{{', '.join(selectors)}}}"


def earlier(metric: str, **labels: str) -> str:
    """The same one point of the graph before."""
    return f"{select(metric, **labels)} offset $__interval"


def rate(metric: str, window: str = "$__rate_interval", **labels: str) -> str:
    return f"rate({select(metric, **labels)}[{window}])"


def with_rank(series: str) -> str:
    """Series of the selected ranks, with the label ``rank``."""
    return f'{series} * on (job, instance) group_left (rank) infomcr_rank_info{{job="$job", rank=~"$rank"}}'


def by_rank(counter: str) -> str:
    return f"sum by (rank) ({with_rank(rate(counter))})"


def per_step(histogram: str) -> str:
    """Mean seconds per step over the selected ranks."""
    return f"sum({with_rank(rate(histogram + '_sum'))}) / sum({with_rank(rate(STEP + '_count'))})"


def step_quantile(q: float) -> str:
    """Quantile of the step time, by phase."""
    return f"histogram_quantile({q}, sum by (phase, le) ({rate(STEP + '_bucket')}))"


def overhead(window: str = "$__rate_interval") -> str:
    """Median regularized step of the window, relative to the median of all plain steps.

    A run takes its plain steps first, so all of them count. A process restarted later has taken none but the smaller
    batches at the ends of epochs: a twentieth of the steps is too few for a baseline.
    """
    regularized, plain = {"phase": "regularized"}, {"phase": "plain"}
    return (
        f"histogram_quantile(0.5, sum by (le) ({rate(STEP + '_bucket', window, **regularized)}))"
        f" / histogram_quantile(0.5, sum by (le) ({select(STEP + '_bucket', **plain)})) > 0"
        f" and sum({select(STEP + '_count', **plain)}) > 0.05 * sum({select(STEP + '_count', **regularized)})"
    )


def largest(gauge: str, **labels: str) -> str:
    """Over the ranks."""
    return f"max({select(gauge, **labels)})"


def measured(gauge: str) -> str:
    """A gauge that is 0 until it is measured, or where it does not apply: no value then."""
    return f"({largest(gauge)} > 0)"


def age(timestamp: str) -> str:
    return f"time() - {measured(timestamp)}"


def of_gamma_hat(gauge: str) -> str:
    """γ̂ may be 0 or negative: it is measured once its estimate has a cost."""
    return f"max({select(gauge)} and on (instance) {select('infomcr_gamma_hat_cost_seconds')} > 0)"


def top1_error(split: str) -> str:
    return largest("infomcr_top1_error_ratio", split=split)


PROGRESS = largest("infomcr_progress_ratio")
REST = " - ".join(per_step(histogram) for histogram in (STEP, *PARTS.values()))
OWN_TIME = f"({by_rank(STEP + '_sum')} - {by_rank(PARTS['allreduce wait'] + '_sum')}) / {by_rank(STEP + '_count')}"
GAMMA_HAT, GAMMA_HAT_ERROR = of_gamma_hat("infomcr_gamma_hat"), of_gamma_hat("infomcr_gamma_hat_standard_error")

# Panels


def targets(queries: dict[str, str]) -> list[prometheus.Dataquery]:
    """One query per legend entry."""
    return [
        prometheus.Dataquery().ref_id("ABCD"[i]).datasource(SOURCE).expr(expression).legend_format(legend)
        for i, (legend, expression) in enumerate(queries.items())
    ]


def number(title: str, unit: str, queries: dict[str, str], *, limits: tuple[float, ...] = ()) -> stat.Panel:
    """The latest value; orange and red from the two limits on, if there are any."""
    colors = ("green", "orange", "red") if limits else ("text",)
    steps = [models.Threshold(value, color) for value, color in zip((None, *limits), colors, strict=True)]
    return (
        stat.Panel()
        .title(title)
        .datasource(SOURCE)
        .targets([target.instant() for target in targets(queries)])
        .span(3)
        .unit(unit)
        .no_value("–")
        .thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .graph_mode(options.BigValueGraphMode.NONE)
        .justify_mode(options.BigValueJustifyMode.CENTER)
        .orientation(options.VizOrientation.VERTICAL)
        .text_mode(options.BigValueTextMode.VALUE if len(queries) == 1 else options.BigValueTextMode.VALUE_AND_NAME)
    )


def graph(title: str, width: int, unit: str, queries: dict[str, str], *, stacked: bool = False) -> timeseries.Panel:
    """Lines over time."""
    stacking = options.StackingMode.NORMAL if stacked else options.StackingMode.NONE
    return (
        timeseries.Panel()
        .title(title)
        .datasource(SOURCE)
        .targets([target.range() for target in targets(queries)])
        .span(width)
        .unit(unit)
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
        .draw_style(options.GraphDrawStyle.LINE)
        .line_interpolation(options.LineInterpolation.LINEAR)
        .line_width(1 if stacked else 2)
        .fill_opacity(70 if stacked else 0)
        .show_points(options.VisibilityMode.NEVER)
        .span_nulls(False)
        .stacking(common.StackingConfig().mode(stacking).group("A"))
        .scale_distribution(common.ScaleDistributionConfig().type(options.ScaleDistribution.LINEAR))
        .axis_grid_show(True)
        .legend(common.VizLegendOptions().show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.NONE))
    )


def style(color: str | None = None, /, **custom: object) -> list[models.DynamicConfigValue]:
    """Of a line: its fixed color and the graph's settings in which it differs from the others."""
    settings: dict[str, object] = {} if color is None else {"color": {"mode": "fixed", "fixedColor": color}}
    settings |= {f"custom.{name}": value for name, value in custom.items()}
    return [models.DynamicConfigValue(name, value) for name, value in settings.items()]


DASHED = {"lineStyle": {"fill": "dash", "dash": [8, 6]}}
NO_LINE = {"lineWidth": 0, "hideFrom": {"legend": True, "tooltip": False, "viz": False}}

AT_A_GLANCE = [
    number("Overhead", "suffix: ×", {"ratio": overhead("5m")})
    .description("Median time of the regularized steps of the last 5 minutes over that of all plain steps of the job.")
    .decimals(2),
    number("Throughput", "suffix: img/s", {"images": f"sum({rate('infomcr_samples_total', '5m')})"})
    .description("Training images of all ranks per second over the last 5 minutes, pauses between epochs included.")
    .decimals(0),
    number("Done", "percentunit", {"progress": PROGRESS}).description("Fraction of the whole run's steps.").decimals(1),
    number(
        "Ends in",
        "dtdurations",
        {"left": f"(1 - {PROGRESS}) / (max(deriv({select('infomcr_progress_ratio')}[10m])) > 0)"},
    )
    .description("Remaining time at the pace of the last 10 minutes, evaluations included.")
    .decimals(0),
    number("Last step", "suffix: s ago", {"ago": age("infomcr_last_step_timestamp_seconds")}, limits=(60, 600))
    .description("Evaluation, metric and checkpoint take place between two steps.")
    .decimals(0),
    number("Ranks", "none", {"train": largest("infomcr_world_size"), "answer": f"sum({select('up')})"}).description(
        "Ranks that train together; endpoints that answer Prometheus."
    ),
    number("Test − train", "percentunit", {"gap": f"{top1_error('test')} - {top1_error('train')}"})
    .description("Generalization gap: top-1 errors of the last evaluations. A flatter minimum should narrow it.")
    .decimals(2),
    number("γ̂", "none", {"gamma": GAMMA_HAT})
    .description("The metric, ln|ξ| (Eq. 6) of training images: at equal training loss, lower generalizes better.")
    .decimals(1),
]
TIME = [
    graph(
        "Mean step, by what it did",
        10,
        "s",
        {name: per_step(histogram) for name, histogram in PARTS.items()} | {"rest": REST},
        stacked=True,
    )
    .description(
        "Mean over the selected ranks. Penalty: the time that the gradients of a regularized step take beyond those of "
        "a plain one. Rest: forward, backward and update."
    )
    .min(0)
    .override_by_name("data wait", style("yellow"))
    .override_by_name("allreduce wait", style("purple"))
    .override_by_name("penalty", style("orange"))
    .override_by_name("rest", style("blue")),
    graph("Step time by phase", 8, "s", {"{{phase}}": step_quantile(0.5), "{{phase}}, 95 %": step_quantile(0.95)})
    .description("Median and 95 % quantile over all ranks.")
    .min(0)
    .override_by_name("plain", style("blue"))
    .override_by_name("plain, 95 %", style("blue", **DASHED))
    .override_by_name("regularized", style("orange"))
    .override_by_name("regularized, 95 %", style("orange", **DASHED)),
    graph(
        "Overhead",
        6,
        "suffix: ×",
        {
            "regularized ÷ plain": overhead(),
            "as the job measured it": measured("infomcr_overhead_ratio"),
            "budget": measured("infomcr_overhead_budget_ratio"),
        },
    )
    .description("Of the histograms' medians; the job's own last measurement; regularizer.overhead_budget, if set.")
    .min(1)
    .decimals(2)
    .override_by_name("regularized ÷ plain", style("orange"))
    .override_by_name("as the job measured it", style("green"))
    .override_by_name("budget", style("red", **DASHED)),
]
BENEFIT = [
    graph(
        "Metric γ̂ ± standard error",
        8,
        "none",
        {
            "γ̂ + standard error": f"{GAMMA_HAT} + {GAMMA_HAT_ERROR}",
            "γ̂": GAMMA_HAT,
            "γ̂ − standard error": f"{GAMMA_HAT} - {GAMMA_HAT_ERROR}",
        },
    )
    .description(
        "ln|ξ| of training images (Eq. 6): at equal loss, lower generalizes better. No line: not estimated yet."
    )
    .override_by_name("γ̂ + standard error", style("green", **NO_LINE, fillBelowTo="γ̂ − standard error", fillOpacity=25))
    .override_by_name("γ̂", style("green"))
    .override_by_name("γ̂ − standard error", style("green", **NO_LINE)),
    graph("Top-1 error", 8, "percentunit", {"test": top1_error("test"), "train": top1_error("train")})
    .description("Of the last evaluations; the band is the generalization gap: a flatter minimum should narrow it.")
    .min(0)
    .override_by_name("test", style("red", fillBelowTo="train", fillOpacity=20))
    .override_by_name("train", style("green")),
    graph(
        "Loss, and the penalty that is added to it",
        8,
        "none",
        {
            "loss L": f"avg({select('infomcr_loss')})",
            "penalty βR": f"avg({select('infomcr_penalty')}) * avg({select('infomcr_beta')})",
        },
    )
    .description("Mean over the ranks, each of its last batch.")
    .override_by_name("loss L", style("blue"))
    .override_by_name("penalty βR", style("orange", axisPlacement="right")),
]
RANKS = [
    graph("Is a rank slow? Step less allreduce wait", 8, "s", {"rank {{rank}}": OWN_TIME}).description(
        "Synchronous training makes all ranks' steps equally long: the slow rank is the one that does not wait."
    ),
    graph(
        "Data or network? Share of the step spent waiting",
        8,
        "percentunit",
        {
            f"rank {{{{rank}}}}, {name}": f"{by_rank(PARTS[name] + '_sum')} / {by_rank(STEP + '_sum')}"
            for name in ("data wait", "allreduce wait")
        },
    )
    .description("Data wait: decoding is the bottleneck. Allreduce wait: the network, or a slower rank (see left).")
    .min(0)
    .override_by_regexp("/, data wait$/", style(**DASHED)),
    graph(
        "Allreduce traffic during steps",
        8,
        "Bps",
        {"rank {{rank}}": f"{by_rank('infomcr_allreduce_bytes_total')} / {by_rank(STEP + '_sum')}"},
    )
    .description(
        "Bytes of gradients that a rank passes to the allreduce, over the time of its steps. A regularized step sends "
        "what a plain one sends."
    )
    .min(0),
]
HEALTH = [
    graph(
        "Time since the last …",
        6,
        "s",
        {
            "step": age("infomcr_last_step_timestamp_seconds"),
            "checkpoint": age("infomcr_last_checkpoint_timestamp_seconds"),
            "γ̂": of_gamma_hat("infomcr_gamma_hat_age_seconds"),
        },
    )
    .description("If the line of the step keeps rising, the job hangs.")
    .min(0),
    graph(
        "Went wrong, since the start",
        6,
        "none",
        {
            "non-finite steps": largest("infomcr_nonfinite_steps_total"),
            "unreadable samples": f"sum({select('infomcr_data_errors_total')})",
            "failed checkpoints": f"sum({select('infomcr_checkpoints_total', outcome='failed')})",
            "singular trials": largest("infomcr_gamma_hat_singular_trials"),
        },
    )
    .description("All should be zero. Singular trials: of the last estimate of γ̂.")
    .min(0)
    .decimals(0)
    .override_by_regexp("/$/", style(axisSoftMax=1)),
    graph(
        "Learning rate and β",
        6,
        "none",
        {"learning rate": largest("infomcr_learning_rate"), "β": largest("infomcr_beta")},
    )
    .description("The regularizer starts at the first drop of the rate, unless regularizer.when sets another time.")
    .min(0)
    .override_by_name("learning rate", style("blue"))
    .override_by_name("β", style("orange", axisPlacement="right")),
    graph(
        "Memory",
        6,
        "bytes",
        {
            "rank {{rank}}": with_rank(select("infomcr_memory_bytes")),
            "rank {{rank}}, GPU": with_rank(select("infomcr_gpu_memory_bytes")),
        },
    )
    .description("Resident memory of each rank's process, and of its GPU where it has one.")
    .min(0),
]
ROWS: list[tuple[str, int, Sequence[Panel]]] = [
    ("At a glance", 4, AT_A_GLANCE),
    ("How much slower is a regularized step, and where does the time go?", 8, TIME),
    ("What did it buy?", 8, BENEFIT),
    ("Which rank, data or network holds it up?", 8, RANKS),
    ("Is it well?", 7, HEALTH),
]

# Variables and annotations


def variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .datasource(SOURCE)
        .query({"query": query, "refId": name})
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NUMERICAL_ASC)
    )


VARIABLES = [
    dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"),
    variable("job", "label_values(infomcr_world_size, job)"),
    variable("rank", 'label_values(infomcr_rank_info{job="$job"}, rank)')
    .include_all(True)
    .all_value(".*")
    .multi(True)
    .current(models.VariableOption(True, ["All"], ["$__all"])),
]


def annotation(name: str, color: str, expression: str) -> dashboard.AnnotationQuery:
    """A mark at each time where the expression is positive."""
    return dashboard.AnnotationQuery().name(name).datasource(SOURCE).icon_color(color).expr(expression)


REGULARIZED = {"metric": "infomcr_steps_total", "phase": "regularized"}
RATE, RESTARTS = "infomcr_learning_rate", "infomcr_elastic_restarts_total"
ANNOTATIONS = {
    "regularizer on": annotation(
        "Regularizer on",
        "orange",
        f"(sum({select(**REGULARIZED)}) > 0) unless (sum({earlier(**REGULARIZED)}) > 0)",
    ),
    "learning rate drops": annotation("Rate drop", "blue", f"max({select(RATE)}) < 0.5 * max({earlier(RATE)})"),
    "elastic restart: {{reason}}": annotation(
        "Elastic restart",
        "red",
        f"(max by (reason) ({select(RESTARTS)}) > 0)"
        f" unless max by (reason) ({select(RESTARTS)}) <= max by (reason) ({earlier(RESTARTS)})",
    ),
}
"""By the title of their marks."""


def to_json() -> str:
    board = (
        dashboard.Dashboard("infomcr: training overhead")
        .uid("infomcr-overhead")
        .tags(["infomcr"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .variables(VARIABLES)
        .annotations(list(ANNOTATIONS.values()))
    )
    ids = count(1)
    for title, height, panels in ROWS:
        board.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            board.with_panel(panel.id(next(ids)).height(height))
    tree = json.loads(JSONEncoder().encode(board.build()))
    # A field of the Prometheus data source alone, which the builder lacks.
    for one, title in zip(tree["annotations"]["list"], ANNOTATIONS, strict=True):
        one["titleFormat"] = title
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(to_json(), encoding="utf-8")
