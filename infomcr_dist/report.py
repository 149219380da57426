"""Show runs, several side by side, from the records in their directories: no server, no training process needed.

    python -m infomcr_dist.report RUN [RUN …] [output=report]

Writes OUTPUT.html, one self-contained page (the plots, the final figures, and the settings in which the runs differ),
and OUTPUT.png, the plots alone. Works on a run that is still going on. Exit code 2: a run that cannot be read.
"""

from __future__ import annotations

import html
import io
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infomcr_dist.checkpoint import write_atomically
from infomcr_dist.options import load_config

_POINTS = 150
"""Points a curve of steps is drawn with at most; each is the median of its neighbourhood."""
_STYLE = """
body { font: 15px sans-serif; margin: 2em }
td { padding: .2em .9em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child { text-align: left }
"""
Record = dict[str, Any]


@dataclass(frozen=True)
class ReportSettings:
    output: str = "report"
    """Writes OUTPUT.html and OUTPUT.png."""


@dataclass(frozen=True)
class RunRecords:
    """What a run directory holds: records by kind, in order, and the settings, flat."""

    name: str
    records: dict[str, list[Record]]
    settings: dict[str, Any]

    def of(self, kind: str) -> list[Record]:
        return self.records.get(kind, [])

    def series(self, kind: str, field: str, **match: Any) -> tuple[list[float], list[float]]:
        """Epochs and values of a field, where it is there; steps are placed within their epochs."""
        found = [r for r in self.of(kind) if r.get(field) is not None and all(r[k] == v for k, v in match.items())]
        if kind != "step":
            return [r["epoch"] for r in found], [r[field] for r in found]
        per_epoch = _steps_per_epoch(self)
        return _thin([r["step"] / per_epoch for r in found], [r[field] for r in found])


def read(directory: Path) -> RunRecords:
    """Read a run directory; ValueError if there is no run. A last line that is still being written is left out."""
    path = directory / "records.jsonl"
    if not path.is_file():
        raise ValueError(f"{directory} is not a run directory: it has no records.jsonl")
    records: dict[str, list[Record]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            record = json.loads(line)
            records.setdefault(record["kind"], []).append(record)
    if not records.get("step"):
        raise ValueError(f"{directory} has no step yet: wait for its first, or name another run")
    return RunRecords(directory.name, records, _flat(yaml.safe_load((directory / "config.yaml").read_text())))


def draw(runs: list[RunRecords]) -> Figure:
    """All plots of the runs: loss, error, gap, γ̂, rate and β, anatomy of a step."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True).flat
    panels: list[tuple[str, Callable[[Axes, RunRecords, str], None]]] = [
        ("training loss", lambda a, r, c: _line(a, r.series("step", "loss"), c, r.name)),
        ("top-1 error, %: test —, train ··", _draw_errors),
        ("penalty R_α", _draw_penalty),
        ("metric γ̂ ± standard error (lower is better)", _draw_gamma),
        ("learning rate —, β ··", _draw_schedules),
        ("step, ms: whole —, data wait ··, allreduce wait - -", _draw_anatomy),
    ]
    for ax, (title, panel) in zip(axes, panels, strict=True):
        for i, run in enumerate(runs):
            panel(ax, run, f"C{i}")
        for run in runs:
            for r in run.of("regularizer_on"):
                ax.axvline(r["step"] / max(1, _steps_per_epoch(run)), color="0.7", linewidth=1, zorder=0)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("epoch (grey: regularizer on)", fontsize=8)
        ax.grid(alpha=0.25)
    if len(runs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def page(runs: list[RunRecords], figure: Figure) -> str:
    """The HTML page; nothing in it is loaded from elsewhere."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    final = [("", [run.name for run in runs])] + [(name, [value(run) for run in runs]) for name, value in FINAL]
    keys = sorted({key for run in runs for key in run.settings} - {"run_dir", "resume"})
    different = [(k, [str(run.settings.get(k)) for run in runs]) for k in keys]
    different = [(k, values) for k, values in different if len(set(values)) > 1]
    settings = "<p>The runs have the same settings.</p>" if len(runs) > 1 else ""
    if different:
        settings = "<h2>Settings that differ</h2>" + _table([("", [run.name for run in runs]), *different])
    names = html.escape(", ".join(run.name for run in runs))
    return (
        f"<!doctype html><meta charset='utf-8'><title>infomcr_dist runs</title><style>{_STYLE}</style>"
        f"<h1>{names}</h1>{svg[svg.index('<svg') :]}<h2>Results so far</h2>{_table(final)}{settings}"
    )


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    try:
        settings = load_config(ReportSettings, None, [a for a in arguments if "=" in a])
        paths = [Path(a) for a in arguments if "=" not in a]
        if not paths:
            raise ValueError("give a run directory: python -m infomcr_dist.report RUN [RUN …]")
        runs = [read(path) for path in paths]
        figure = draw(runs)
        text = page(runs, figure)
        write_atomically(Path(f"{settings.output}.html"), lambda file: file.write(text.encode()))
        write_atomically(Path(f"{settings.output}.png"), lambda file: figure.savefig(file, format="png", dpi=100))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {settings.output}.html, {settings.output}.png")
    return 0


def _last(kind: str, field: str, form: str, **match: Any) -> Callable[[RunRecords], str]:
    def value(run: RunRecords) -> str:
        values = run.series(kind, field, **match)[1]
        return format(values[-1], form) if values else "–"

    return value


def _median_milliseconds(phase: str) -> Callable[[RunRecords], str]:
    def value(run: RunRecords) -> str:
        seconds = [r["step_duration_seconds"] for r in run.of("step") if r["phase"] == phase]
        return f"{1e3 * statistics.median(seconds):.1f}" if seconds else "–"

    return value


def _overhead(run: RunRecords) -> str:
    steps = run.of("step")
    by_phase = [[r["step_duration_seconds"] for r in steps if r["phase"] == p] for p in ("regularized", "plain")]
    if not all(by_phase):
        return "–"
    regularized, plain = map(statistics.median, by_phase)
    return f"{regularized / plain:.2f}"


def _gap(run: RunRecords) -> str:
    last = {r["split"]: r["top1_error_ratio"] for r in run.of("evaluation")}
    return f"{last['test'] - last['train']:+.2%}" if len(last) == 2 else "–"


FINAL: list[tuple[str, Callable[[RunRecords], str]]] = [
    ("epochs", lambda run: str(len(run.of("epoch")))),
    ("test top-1 error", _last("evaluation", "top1_error_ratio", ".2%", split="test")),
    ("test top-5 error", _last("evaluation", "top5_error_ratio", ".2%", split="test")),
    ("train top-1 error", _last("evaluation", "top1_error_ratio", ".2%", split="train")),
    ("gap, top-1", _gap),
    ("γ̂", _last("metric", "gamma_hat", ".1f")),
    ("its standard error", _last("metric", "gamma_hat_standard_error", ".1f")),
    ("plain step, median ms", _median_milliseconds("plain")),
    ("regularized step, median ms", _median_milliseconds("regularized")),
    ("regularized / plain", _overhead),
]


def _line(axes: Axes, series: tuple[list[float], list[float]], color: str, label: str = "", style: str = "-") -> None:
    axes.plot(*series, style, color=color, label=label, linewidth=1.3)


def _draw_errors(axes: Axes, run: RunRecords, color: str) -> None:
    for split, style in (("test", "o-"), ("train", "s:")):
        epochs, ratios = run.series("evaluation", "top1_error_ratio", split=split)
        axes.plot(epochs, [100 * r for r in ratios], style, color=color, markersize=4)


def _draw_penalty(axes: Axes, run: RunRecords, color: str) -> None:
    _line(axes, run.series("step", "penalty"), color)
    axes.set_ylim(bottom=0)


def _draw_gamma(axes: Axes, run: RunRecords, color: str) -> None:
    epochs, means = run.series("metric", "gamma_hat")
    errors = [r["gamma_hat_standard_error"] or 0.0 for r in run.of("metric") if r.get("gamma_hat") is not None]
    axes.errorbar(epochs, means, yerr=errors, fmt="o-", color=color, capsize=3, markersize=4)


def _draw_schedules(axes: Axes, run: RunRecords, color: str) -> None:
    _line(axes, run.series("step", "learning_rate"), color)
    axes.set_yscale("log")
    _line(axes, run.series("step", "beta"), color, style=":")


def _draw_anatomy(axes: Axes, run: RunRecords, color: str) -> None:
    for field, style in (("step_duration_seconds", "-"), ("data_wait_seconds", ":"), ("allreduce_wait_seconds", "--")):
        epochs, seconds = run.series("step", field)
        _line(axes, (epochs, [1e3 * s for s in seconds]), color, style=style)
    axes.set_ylim(bottom=0)


def _steps_per_epoch(run: RunRecords) -> int:
    return max((r["step"] for r in run.of("step") if r["epoch"] == 1), default=1)


def _thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    width = -(-len(xs) // _POINTS) or 1
    chunks = range(0, len(xs), width)
    return [statistics.fmean(xs[i : i + width]) for i in chunks], [statistics.median(ys[i : i + width]) for i in chunks]


def _table(rows: list[tuple[str, list[str]]]) -> str:
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *values)) for name, values in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
