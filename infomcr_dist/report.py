"""Show runs, several side by side, from the records in their directories: no server, no training process needed.

    infomcr report RUN [RUN …] [output=report]

Writes OUTPUT.html, one self-contained page (the plots, the final figures, and the settings in which the runs differ),
and OUTPUT.png, the plots alone. Works while a run is still training.

Exit code 0: the report is written; 2: a run cannot be read, or a mistake in the arguments, reported in one line.
"""

from __future__ import annotations

import html
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from infomcr_dist import records
from infomcr_dist.checkpoint import write_atomically
from infomcr_dist.cli import REPORT
from infomcr_dist.config import ReportSettings
from infomcr_dist.records import (
    EpochRecord,
    EvaluationRecord,
    MetricRecord,
    Phase,
    R,
    Record,
    RegularizerOnRecord,
    StepRecord,
    read_records,
)
from pipelines.options import flat, load, read_yaml

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, distinct for every kind of colour vision, without yellow, which is too light for lines"""
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLORS
_SHADE, _GREY = "#F2EDDF", "#555555"
_SPREAD_ALPHA = 0.2
_STRIPS = 0.12
"""Height of a panel's part, at its top, in which strips mark the regularized phases of several runs"""
_STEPS = [1, 2, 5, 10]
"""Between the ticks of an axis, times a power of ten"""
_ROW = 130
"""Characters in a row of the legend"""
_POINTS = 60
"""Points a curve of steps is drawn with at most; each is the median of its neighbourhood."""
_STYLE = """
body { font: 15px sans-serif; margin: 2em; color: #222 }
svg { max-width: 100%; height: auto }
table { border-collapse: collapse }
td, th { padding: .3em .9em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child { text-align: left }
i { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
"""


class Series(NamedTuple):
    """A quantity over the epochs."""

    epochs: list[float]
    values: list[float]
    low: list[float]
    """Lower end of the spread around each value: its standard error, or the lowest tenth of a neighbourhood of steps"""
    high: list[float]


@dataclass(frozen=True)
class RunRecords:
    """What a run directory holds."""

    name: str
    records: list[Record]
    settings: dict[str, Any]
    """Of config.yaml, by dotted names"""

    def of(self, kind: type[R]) -> list[R]:
        """The records of one kind, in order."""
        return records.of_kind(self.records, kind)

    def series(self, kind: type[Record], field: str, **match: Any) -> Series:
        """A field over the epochs, without the records that have no number there.

        Args:
            kind: the records' kind.
            field: its field; a field of the same name with ``_standard_error`` is its spread.
            match: values that other fields must have.

        Returns:
            Epochs and values; of steps, medians of neighbourhoods, placed within their epochs.
        """
        if kind in (EvaluationRecord, MetricRecord):
            match = {"weights": "current"} | match
        found = [(r, getattr(r, field)) for r in self.of(kind) if all(getattr(r, k) == v for k, v in match.items())]
        found = [(r, value) for r, value in found if value is not None and math.isfinite(value)]
        values = [value for _, value in found]
        if kind is StepRecord:
            return _thin(self.epochs([r.step for r, _ in found]), values)
        errors = [getattr(r, f"{field}_standard_error", 0.0) for r, _ in found]
        errors = [error if math.isfinite(error) else 0.0 for error in errors]
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        return Series([r.epoch for r, _ in found], values, low, high)  # type: ignore[attr-defined]

    def epochs(self, steps: Sequence[float]) -> list[float]:
        """Where steps are on the axis of epochs, whose lengths differ where the number of workers changes."""
        ends = [(0, 0)] + [(r.step, r.epochs_completed) for r in self.of(EpochRecord)]
        if len(ends) == 1:
            ends.append((max(r.step for r in self.of(StepRecord)), 1))
        (before, _), (last, completed) = ends[-2:]
        ends.append((last + last - before, completed + 1))
        last_steps, epochs = np.array(ends, float).T
        return list(map(float, np.interp(steps, last_steps, epochs)))

    @cached_property
    def end(self) -> float:
        """The epoch of the last step."""
        return self.epochs([max(r.step for r in self.of(StepRecord))])[0]

    @cached_property
    def regularized(self) -> tuple[float, float] | None:
        """The epochs between which the regularizer is on."""
        found = self.of(RegularizerOnRecord)
        return (self.epochs([found[0].step])[0], self.end) if found else None


@dataclass(frozen=True)
class Curve:
    """A quantity as a panel draws it: in its colour where there is one run, by its line where there are several."""

    kind: type[Record]
    field: str
    label: str
    color: str
    style: Literal["-", "--", ":"] = "-"
    marker: str = ""
    factor: float = 1.0
    """From the record's unit to the panel's"""
    split: str | None = None

    def of(self, run: RunRecords) -> Series:
        """The quantity of a run, in the panel's unit."""
        match = {} if self.split is None else {"split": self.split}
        epochs, *numbers = run.series(self.kind, self.field, **match)
        return Series(epochs, *([self.factor * number for number in column] for column in numbers))


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: Literal["linear", "log", "from zero"] = "linear"


PANELS = (
    Panel("Training loss", "loss, nats", (Curve(StepRecord, "loss", "training", BLUE),), "log"),
    Panel("Top-1 error", "error, %", (
        Curve(EvaluationRecord, "top1_error_ratio", "test", VERMILLION, "-", "o", 100, "test"),
        Curve(EvaluationRecord, "top1_error_ratio", "training", BLUE, ":", "s", 100, "train"),
    )),
    Panel("Penalty", r"$R_\alpha$, before β", (Curve(StepRecord, "penalty", "penalty", PURPLE),), "from zero"),
    Panel("Metric γ̂ ± standard error", "γ̂, mean of ln|ξ|", (Curve(MetricRecord, "gamma_hat", "γ̂", GREEN, "-", "o"),)),
    Panel("Learning rate", "rate", (Curve(StepRecord, "learning_rate", "learning rate", BLACK),), "log"),
    Panel("β", "β", (Curve(StepRecord, "beta", "β", ORANGE),), "from zero"),
    Panel("Step time", "step and its waits, ms", (
        Curve(StepRecord, "step_duration_seconds", "whole", BLACK, factor=1e3),
        Curve(StepRecord, "allreduce_wait_seconds", "allreduce", VERMILLION, "--", factor=1e3),
        Curve(StepRecord, "data_wait_seconds", "data", SKY, ":", factor=1e3),
    ), "from zero"),
)  # fmt: skip


def read(directory: Path, name: str | None = None) -> RunRecords:
    """Read a run directory.

    Args:
        directory: of the run.
        name: what the run is called; None: as the directory.

    Raises:
        ValueError: there is no run, it has no step yet, or its records cannot be read.
    """
    path = directory / records.FILE
    if not path.is_file():
        raise ValueError(f"{directory} is not a run directory: it has no {records.FILE}")
    run = RunRecords(
        name or names_of([directory])[0], list(read_records(path)), flat(read_yaml(directory / "config.yaml"))
    )
    if not run.of(StepRecord):
        raise ValueError(f"{directory} has no step yet: wait for its first, or give another run")
    return run


def names_of(directories: Sequence[Path]) -> list[str]:
    """The directories' own names, each with as many of its parents as distinguish it."""
    paths = [Path(os.path.abspath(directory)).parts for directory in directories]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        lengths = (n for n in range(1, len(path)) if all(other[-n:] != path[-n:] for other in others))
        names.append(str(Path(*path[-next(lengths, len(path)) :])))
    return names


def colors_of(count: int) -> list[str | None]:
    """A colour for each of several runs; None for one, whose quantities have their own."""
    if count == 1:
        return [None]
    if count <= len(COLORS):
        return list(COLORS[:count])
    return [to_hex(color) for color in colormaps["viridis"](np.linspace(0, 0.92, count))]


def draw(runs: list[RunRecords]) -> Figure:
    """All panels of the runs. Of one run, each quantity has a colour; of several, each run."""
    figure = Figure(figsize=(12, 6.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.06)  # type: ignore[union-attr,call-arg]
    grid = figure.add_gridspec(2, 3)
    halves = grid[1, 1].subgridspec(2, 1)
    places = (grid[0, 0], grid[0, 1], grid[0, 2], grid[1, 0], upper := halves[0], halves[1], grid[1, 2])
    colors = colors_of(len(runs))
    end = max(run.end for run in runs)
    for place, panel in zip(places, PANELS, strict=True):
        axes = figure.add_subplot(place)
        for run, color in zip(runs, colors, strict=True):
            for curve in panel.curves:
                _plot(axes, curve, run, color)
        _label(axes, panel, single=len(runs) == 1)
        _mark_phases(axes, runs, colors)
        axes.set_xlim(0, 1.02 * end)  # room for a marker at the end
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_STEPS))
        axes.set_xlabel("" if place is upper else "epoch")
    _add_legend(figure, runs, colors)
    return figure


def page(runs: list[RunRecords], figure: Figure) -> str:
    """The HTML page; nothing in it is loaded from elsewhere."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    averaged = any(r.weights == "averaged" for run in runs for r in run.of(EvaluationRecord))
    rows = [*FINAL, *(AVERAGED if averaged else [])]
    final = _table(runs, [(name, [value(run) for run in runs]) for name, value in rows])
    keys = sorted({key for run in runs for key in run.settings} - {"run_dir", "resume"})
    different = [(k, [str(run.settings.get(k)) for run in runs]) for k in keys]
    different = [(k, values) for k, values in different if len(set(values)) > 1]
    settings = "<p>The runs have the same settings.</p>" if len(runs) > 1 else ""
    if different:
        settings = f"<h2>Settings that differ</h2>{_table(runs, different)}"
    names = html.escape(", ".join(run.name for run in runs))
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{names}</title><style>{_STYLE}</style>"
        f"<h1>{names}</h1>{svg[svg.index('<svg') :]}<h2>Results so far</h2>{final}{settings}</html>"
    )


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    return REPORT.run(arguments, _report)


def _report(directories: list[str], overrides: list[str]) -> int:
    settings = load(ReportSettings, None, overrides)
    paths = [Path(directory) for directory in directories]
    runs = [read(path, name) for path, name in zip(paths, names_of(paths), strict=True)]
    figure = draw(runs)
    text = page(runs, figure)
    write_atomically(Path(f"{settings.output}.html"), lambda file: file.write(text.encode()))
    write_atomically(Path(f"{settings.output}.png"), lambda file: figure.savefig(file, format="png", dpi=130))
    print(f"written: {settings.output}.html, {settings.output}.png")
    return 0


def _last(kind: type[Record], field: str, form: str, **match: Any) -> Callable[[RunRecords], str]:
    def value(run: RunRecords) -> str:
        values = run.series(kind, field, **match).values
        return format(values[-1], form) if values else "–"

    return value


def _median_seconds(run: RunRecords, phase: Phase) -> float | None:
    seconds = [r.step_duration_seconds for r in run.of(StepRecord) if r.phase == phase]
    return statistics.median(seconds) if seconds else None


def _median_milliseconds(phase: Phase) -> Callable[[RunRecords], str]:
    def value(run: RunRecords) -> str:
        seconds = _median_seconds(run, phase)
        return "–" if seconds is None else f"{1e3 * seconds:.1f}"

    return value


def _overhead(run: RunRecords) -> str:
    regularized, plain = _median_seconds(run, "regularized"), _median_seconds(run, "plain")
    return "–" if regularized is None or plain is None else f"{regularized / plain:.2f}"


def _gap(run: RunRecords) -> str:
    last = {r.split: r.top1_error_ratio for r in run.of(EvaluationRecord) if r.weights == "current"}
    return f"{last['test'] - last['train']:+.2%}" if len(last) == 2 else "–"


FINAL: list[tuple[str, Callable[[RunRecords], str]]] = [
    ("epochs", lambda run: str(len(run.of(EpochRecord)))),
    ("test top-1 error", _last(EvaluationRecord, "top1_error_ratio", ".2%", split="test")),
    ("test top-5 error", _last(EvaluationRecord, "top5_error_ratio", ".2%", split="test")),
    ("train top-1 error", _last(EvaluationRecord, "top1_error_ratio", ".2%", split="train")),
    ("gap, top-1", _gap),
    ("γ̂", _last(MetricRecord, "gamma_hat", ".1f")),
    ("its standard error", _last(MetricRecord, "gamma_hat_standard_error", ".1f")),
    ("plain step, median ms", _median_milliseconds("plain")),
    ("regularized step, median ms", _median_milliseconds("regularized")),
    ("regularized / plain", _overhead),
]
"""Rows of the page's table of results."""
AVERAGED: list[tuple[str, Callable[[RunRecords], str]]] = [
    (
        "test top-1 error, averaged",
        _last(EvaluationRecord, "top1_error_ratio", ".2%", split="test", weights="averaged"),
    ),
    ("γ̂, averaged", _last(MetricRecord, "gamma_hat", ".1f", weights="averaged")),
]
"""Further rows where a run has averaged weights."""


def _plot(axes: Axes, curve: Curve, run: RunRecords, color: str | None) -> None:
    """A curve in the colour of its run, or in its own and with the spread of its steps."""
    epochs, values, low, high = curve.of(run)
    axes.plot(epochs, values, curve.style, marker=curve.marker, markersize=4.5, color=color or curve.color)
    if curve.kind is MetricRecord:
        axes.vlines(epochs, low, high, color=color or curve.color)
    elif curve.kind is StepRecord and color is None:
        axes.fill_between(epochs, low, high, color=curve.color, alpha=_SPREAD_ALPHA, linewidth=0)


def _mark_phases(axes: Axes, runs: list[RunRecords], colors: list[str | None]) -> None:
    """Shade the regularized phase of one run; those of several are strips above the curves."""
    phases = [(run.regularized, color) for run, color in zip(runs, colors, strict=True) if run.regularized is not None]
    if len(runs) == 1:
        for phase, _ in phases:
            axes.axvspan(*phase, color=_SHADE, linewidth=0, zorder=0)
        return
    height = _STRIPS / max(len(phases), 4)
    scale = axes.yaxis.get_transform()
    bottom, top = scale.transform(axes.get_ylim())
    axes.set_ylim(top=float(scale.inverted().transform(bottom + (top - bottom) / (1 - height * len(phases)))))
    for i, (phase, color) in enumerate(phases):
        axes.axvspan(*phase, ymin=1 - (i + 0.75) * height, ymax=1 - i * height, color=color, alpha=0.6, linewidth=0)


def _label(axes: Axes, panel: Panel, single: bool) -> None:
    """Title, unit and scale; a legend where the panel has several curves, a remark where it has no number."""
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(panel.unit)
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    values = [value for line in axes.lines for value in np.asarray(line.get_ydata())]
    if not values:
        axes.text(0.5, 0.5, "none so far", transform=axes.transAxes, ha="center", va="center", color=_GREY)
        axes.set_yticks([])
        return
    unit = 1.0
    if panel.scale == "log" and max(values) > 0:
        axes.set_yscale("log")
        bottom, top = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if top > 100 * bottom else (1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.margins(y=0.1)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_STEPS))
        if panel.scale == "from zero" or min(values) >= 0 > axes.get_ylim()[0]:
            axes.set_ylim(bottom=0)
        if 0 < max(values) < 0.01:
            exponent = math.floor(math.log10(max(values)))
            unit = 10.0**exponent
            axes.set_ylabel(f"{panel.unit}, $10^{{{exponent}}}$")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}".replace("-", "−")))
    if len(panel.curves) > 1:
        lines = [
            Line2D([], [], linestyle=curve.style, marker=curve.marker, color=curve.color if single else _GREY)
            for curve in panel.curves
        ]
        axes.legend(lines, [curve.label for curve in panel.curves], loc="lower right", bbox_to_anchor=(1.02, 0.99),
                    ncols=len(lines), frameon=False, fontsize=9, handlelength=1.6, handletextpad=0.5,
                    columnspacing=0.8, borderaxespad=0.1)  # fmt: skip


def _add_legend(figure: Figure, runs: list[RunRecords], colors: list[str | None]) -> None:
    """Below the panels: the runs, and what shade, strips and bands are."""
    entries: list[tuple[Line2D | Patch, str]] = []
    on = any(run.regularized is not None for run in runs)
    if len(runs) > 1:
        entries += [(Line2D([], [], color=c, linewidth=3), run.name) for c, run in zip(colors, runs, strict=True)]
        entries += [(Patch(facecolor=_GREY, alpha=0.6), "strip: regularizer on")] * on
    else:
        figure.suptitle(runs[0].name, parse_math=False)
        entries += [(Patch(facecolor=_SHADE, edgecolor="0.7"), "regularizer on")] * on
        entries += [(Patch(facecolor=_GREY, alpha=_SPREAD_ALPHA), "80 % of the steps around their median")]
    handles, labels = zip(*entries, strict=True)
    one_row = sum(len(label) + 6 for label in labels) <= _ROW
    columns = len(labels) if one_row else max(1, _ROW // (max(map(len, labels)) + 6))
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _thin(epochs: list[float], values: list[float]) -> Series:
    """Medians, and the tenths at both ends, of neighbourhoods of steps."""
    width = -(-len(values) // _POINTS) or 1
    chunks = [values[i : i + width] for i in range(0, len(values), width)]
    low, median, high = np.array([np.quantile(chunk, [0.1, 0.5, 0.9]) for chunk in chunks]).reshape(-1, 3).T.tolist()
    return Series([statistics.fmean(epochs[i : i + width]) for i in range(0, len(epochs), width)], median, low, high)


def _table(runs: list[RunRecords], rows: list[tuple[str, list[str]]]) -> str:
    """A column a run, whose head has the colour of its curves."""
    head = "<th></th>"
    for run, color in zip(runs, colors_of(len(runs)), strict=True):
        mark = "" if color is None else f"<i style='background: {color}'></i>"
        head += f"<th>{mark}{html.escape(run.name)}</th>"
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *values)) for name, values in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in (head, *lines)) + "</table>"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
