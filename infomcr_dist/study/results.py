"""What the runs of a study show: tables, statistics and figures of numbers that are there already.

Numbers stand in an array (cells, seeds, columns) in which NaN is a run that is missing or failed.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from infomcr_dist.study.columns import COLUMNS, METRICS
from infomcr_dist.study.statistics import (
    Difference,
    Floats,
    deviation,
    kendall,
    mean,
    paired_difference,
    partial_kendall,
    seeds_needed,
    with_interval,
)

POINTS = (0.3, 0.6, 1.0)
"""Effects, in points of error, as large as those of the paper's tables."""
_BLUE, _GREY = "#0072B2", "#555555"
_SLANTED: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
_ABOVE: dict[str, Any] = {
    "xytext": (0, 7), "textcoords": "offset points", "ha": "center", "color": _BLUE,
    "bbox": {"facecolor": "white", "linewidth": 0, "pad": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Results:
    """What was measured of each run."""

    axes: dict[str, list[str]]
    """Labels by axis of the grid; the cells are their product, the last axis fastest"""
    columns: list[str]
    """Of `COLUMNS`"""
    values: Floats
    """(cells, seeds, columns), in the units of the records"""

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """The labels of each cell, one per axis."""
        return list(product(*self.axes.values()))

    def of(self, column: str) -> Floats:
        """(cells, seeds) of a column, in the unit of its title."""
        return COLUMNS[column].factor * self.values[:, :, self.columns.index(column)]


def markdown(results: Results, test: str) -> str:
    """Mean ± standard deviation over the seeds as a Markdown table, one line per cell.

    Args:
        results: the numbers.
        test: what the evaluated images are called in titles: test, or validation where they are held out.
    """
    counts = np.isfinite(results.values).any(axis=2).sum(axis=1)
    titles = [_title(name, test) for name in results.columns]
    rows = []
    for i, cell in enumerate(results.cells):
        cells = [_plus_minus(results.of(name)[i], COLUMNS[name].format) for name in results.columns]
        rows.append([*cell, str(counts[i]), *cells])
    return _table([*results.axes, "runs", *titles], rows)


def to_csv(results: Results) -> str:
    """Means and standard deviations in columns of their own, one line per cell, in units of the records."""
    names = [f"{name}_{kind}" for name in results.columns for kind in ("mean", "std")]
    rows = [
        [*cell, int(np.isfinite(values).any(axis=1).sum())]
        + [_number(f(values[:, k])) for k in range(len(results.columns)) for f in (mean, deviation)]
        for cell, values in zip(results.cells, results.values, strict=True)
    ]
    return _csv([*results.axes, "runs", *names], rows)


def runs_csv(results: Results, seeds: list[list[int]], states: list[list[str]]) -> str:
    """One line per run: its cell, its seed, its state, its numbers in units of the records.

    Args:
        results: the numbers.
        seeds: (cells, seeds) the runs' seeds.
        states: (cells, seeds) done, or what the run is instead.
    """
    rows = [
        [*cell, seeds[i][j], states[i][j], *map(_number, results.values[i, j].tolist())]
        for i, cell in enumerate(results.cells)
        for j in range(len(seeds[i]))
    ]
    return _csv([*results.axes, "seed", "state", *results.columns], rows)


def differences(results: Results, axis: str, test: str) -> str:
    """Every label of an axis against the axis's first, by paired differences, for each combination of the other axes.

    Args:
        results: the numbers.
        axis: the axis whose labels are compared.
        test: as of `markdown`.

    Returns:
        Markdown: a table of the differences, and one of the seeds that smaller effects would need.
    """
    position = list(results.axes).index(axis)
    baseline, others = results.axes[axis][0], [name for name in results.axes if name != axis]
    rows, needed = [], []
    for i, base in _baselines(results, axis).items():
        cell = results.cells[i]
        others_of_cell = [label for k, label in enumerate(cell) if k != position]
        cells = []
        for name in results.columns:
            d = paired_difference(results.of(name)[i], results.of(name)[base])
            form = "+" + COLUMNS[name].format
            interval = "" if math.isnan(d.low) else f" ({d.low:{form}} … {d.high:{form}})"
            cells.append("–" if not d.pairs else f"{d.mean:{form}}{interval}")
            if name == "test_error" and d.pairs > 1:
                counts = [seeds_needed(d.deviation, points) for points in POINTS]
                needed.append(
                    [*others_of_cell, cell[position], f"{d.deviation:.2f}", *(str(n or "> 1000") for n in counts)]
                )
        rows.append([*others_of_cell, cell[position], *cells])
    titles = [_title(name, test) for name in results.columns]
    text = f"Difference from {baseline} with the same seed: mean (95 % interval, Student's t)\n\n"
    text += _table([*others, axis, *titles], rows)
    if needed:
        text += (
            f"\n\nSeeds with which a paired t-test (5 %, two-sided) detects a difference of the {test} error in 80 % "
            "of studies, from the deviation of the differences here\n\n"
        )
        text += _table([*others, axis, "deviation", *(f"{points:g} points" for points in POINTS)], needed)
    return text


def _baselines(results: Results, axis: str) -> dict[int, int]:
    """The cells that an axis compares, each with the cell of the axis's first label, by their indices."""
    position, first = list(results.axes).index(axis), results.axes[axis][0]
    index = {cell: i for i, cell in enumerate(results.cells)}
    return {
        i: index[(*cell[:position], first, *cell[position + 1 :])]
        for cell, i in index.items()
        if cell[position] != first
    }


def choice(results: Results, axis: str, test: str) -> str:
    """The label of an axis with the lowest mean error, one line for each combination of the other axes.

    Args:
        results: the numbers.
        axis: the axis whose label is chosen.
        test: as of `markdown`.
    """
    position = list(results.axes).index(axis)
    best: dict[tuple[str, ...], tuple[float, str]] = {}
    for cell, errors in zip(results.cells, results.of("test_error"), strict=True):
        others = cell[:position] + cell[position + 1 :]
        if not math.isnan(mean(errors)):
            best[others] = min(best.get(others, (math.inf, "")), (mean(errors), cell[position]))
    lines = []
    for others, (error, label) in best.items():
        where = "".join(f"{name}, " for name in others)
        lines.append(f"chosen: {where}{axis} {label}, by the lowest mean {test} error ({error:.2f} %)")
    return "\n".join(lines)


def correlations(results: Results, test: str) -> str:
    """Kendall's τ of each metric, and of the training loss, with the test error, as a Markdown table.

    Of the cells' means, of all runs, and of all runs with the training loss held fixed; the last two with a 95 %
    bootstrap interval over the seeds of each cell.

    Args:
        results: the numbers.
        test: as of `markdown`.
    """
    rows = []
    error = results.of("test_error")
    loss = results.of("train_loss") if "train_loss" in results.columns else None
    for name in (n for n in (*METRICS, "train_loss") if n in results.columns):
        metric = results.of(name)
        means = [np.array([mean(row) for row in values]) for values in (metric, error)]
        row = [COLUMNS[name].title, f"{kendall(*means):+.2f}", with_interval(kendall, metric, error)]
        if loss is not None:
            row.append("" if name == "train_loss" else with_interval(partial_kendall, metric, error, loss))
        rows.append(row)
    titles = ["", "of the means", "of all runs", *([] if loss is None else ["of all runs, training loss held fixed"])]
    text = f"Kendall's τ with the {test} error (1: same order; 95 % interval by bootstrap over the seeds)\n\n"
    return text + _table(titles, rows)


def draw_metrics(results: Results, title: str, test: str) -> Figure:
    """A point per run, and a line through the means.

    Above: the test error and each metric over what varies, as Figures 2-4; below: each metric against the test error.

    Args:
        results: the numbers.
        title: of the figure.
        test: as of `markdown`.
    """
    names = ["test_error", *(name for name in METRICS if name in results.columns)]
    figure = Figure(figsize=(2.9 * len(names), 6), layout="constrained")
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(2, len(names), squeeze=False)
    labels, varied, error = _labels(results), ", ".join(_varying(results)), results.of("test_error")
    positions = np.broadcast_to(np.arange(len(labels), dtype=float)[:, None], error.shape)
    for k, name in enumerate(names):
        upper, lower = panels[:, k]
        values = results.of(name)
        _plot_cells(upper, positions, values)
        upper.set_title(_title(name, test), loc="left", fontsize=11, fontweight="bold")
        upper.set_xticks(
            range(len(labels)), labels, parse_math=False, **(_SLANTED if len("".join(labels)) > 24 else {})
        )
        upper.set_xlabel(varied, parse_math=False)
        if name == "test_error":
            continue
        _plot_cells(lower, values, error)
        lower.set_xlabel(_title(name, test))
        lower.set_ylabel(_title("test_error", test) if k == 1 else "")
        if name != "gamma_hat":  # it is a logarithm already
            upper.set_yscale("log")
            lower.set_xscale("log")
            lower.tick_params(axis="x", which="minor", labelsize=6, labelrotation=90)  # labelled within a decade alone
    panels[1, 0].axis("off")
    legend = panels[1, 0].legend([*upper.lines], [*labels, "mean"], title=varied, loc="center", frameon=False)
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)
    return figure


def draw_bars(results: Results, columns: Sequence[str], title: str, test: str) -> Figure:
    """Bars from zero to the means, with whiskers of one standard deviation and a point per run.

    Args:
        results: the numbers.
        columns: what is drawn, of the results' columns, a panel each.
        title: of the figure.
        test: as of `markdown`.
    """
    rows = np.arange(len(results.cells), dtype=float)
    figure, panels = _row_panels(results, range(len(rows)), len(columns), title)
    for panel, name in zip(panels, columns, strict=True):
        values = results.of(name)
        means, spreads = (np.array([f(row) for row in values]) for f in (mean, deviation))
        bars = panel.barh(rows, means, 0.6, color=_BLUE, alpha=0.3)
        whiskers = panel.hlines(rows, means - spreads, means + spreads, color=_BLUE, linewidth=2)
        runs = _scatter(panel, values, rows + 0.15)
        panel.set_xlabel(_title(name, test))
    _add_legend(figure, [bars, whiskers, runs], ["mean", "± standard deviation", "one run"])
    return figure


def draw_differences(results: Results, columns: Sequence[str], axis: str, title: str, test: str) -> Figure:
    """Every label of an axis against the axis's first: the difference of each pair, and their mean with its interval.

    Args:
        results: the numbers.
        columns: what is drawn, of the results' columns, a panel each.
        axis: the axis whose labels are compared, two or more.
        title: of the figure.
        test: as of `markdown`.
    """
    baselines = _baselines(results, axis)
    rows, cells, bases = np.arange(len(baselines), dtype=float), list(baselines), list(baselines.values())
    figure, panels = _row_panels(results, cells, len(columns), title)
    for panel, name in zip(panels, columns, strict=True):
        values = results.of(name)
        pairs = _scatter(panel, values[cells] - values[bases], rows + 0.2)
        found = [paired_difference(value, base) for value, base in zip(values[cells], values[bases], strict=True)]
        intervals = panel.hlines(rows, [d.low for d in found], [d.high for d in found], color=_BLUE, linewidth=2)
        (means,) = panel.plot([d.mean for d in found], rows, "o", color=_BLUE, markersize=7)
        for row, d in zip(rows, found, strict=True):
            if d.pairs:
                text = _minus(f"{d.mean:+{COLUMNS[name].format}}")
                panel.annotate(text, (d.mean, row), **_ABOVE)
        panel.set_xlim(_limits(values[cells] - values[bases], found))
        quantity, _, unit = _title(name, test).partition(", ")
        level = f" ({_minus(_plus_minus(values[bases[0]], COLUMNS[name].format))})" if len(set(bases)) == 1 else ""
        panel.set_title(quantity, loc="left", fontsize=11, fontweight="bold")
        points = ", points" if unit == "%" else f", {unit}" * bool(unit)
        panel.set_xlabel(f"difference from {results.axes[axis][0]}{level}{points}", parse_math=False, fontsize=9)
    names = ["mean difference with its 95 % interval (Student's t)", "one pair of runs with the same seed"]
    _add_legend(figure, [(intervals, means), pairs], names)
    return figure


def _row_panels(results: Results, cells: Sequence[int], count: int, title: str) -> tuple[Figure, list[Axes]]:
    """Panels side by side that share a row for each of the cells, from top to bottom, and a line at zero."""
    figure = Figure(figsize=(1 + 3.2 * count, 1.8 + 0.5 * len(cells)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr,call-arg]
    panels = list(figure.subplots(1, count, squeeze=False, sharey=True)[0])
    labels = _labels(results)
    panels[0].set_yticks(range(len(cells)), [labels[i] for i in cells], parse_math=False)
    panels[0].set_ylim(len(cells) - 0.4, -0.6)
    panels[0].set_ylabel(", ".join(_varying(results)), parse_math=False)
    for panel in panels:
        panel.axvline(0, color="black", linewidth=0.8)
        panel.grid(axis="x", color="0.85", linewidth=0.6)
        panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    constant = [labels[0] for axis, labels in results.axes.items() if axis not in _varying(results)]
    figure.suptitle(" · ".join(filter(None, [title, *constant])), parse_math=False)
    return figure, panels


def _add_legend(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _scatter(panel: Axes, values: Floats, rows: NDArray[Any]) -> Line2D:
    """A point for each of the values, (rows, seeds)."""
    lines = panel.plot(values, np.broadcast_to(rows[:, None], values.shape), "o", color=_GREY, alpha=0.4, markersize=4)
    return lines[0]


def _plot_cells(panel: Axes, x: Floats, y: Floats) -> None:
    """A point per run in the colour and form of its cell, and a line through the means; both (cells, seeds)."""
    for i, color in enumerate(colormaps["viridis"](np.linspace(0, 0.9, len(x)))):
        panel.plot(x[i], y[i], "osD^vP"[i % 6], color=color, alpha=0.8, markersize=5)
    panel.plot([mean(row) for row in x], [mean(row) for row in y], ".-", color=_GREY, linewidth=1, zorder=1)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="0.9", linewidth=0.6)


def _limits(differences: Floats, found: Sequence[Difference]) -> tuple[float, float]:
    """Of the axis: all pairs, zero, and the intervals, one that is far wider than most to three times their median."""
    half = np.array([d.high - d.mean for d in found])
    if (half > 0).any():
        half = np.minimum(half, 3 * np.median(half[half > 0]))
    means = np.array([d.mean for d in found])
    shown = np.concatenate([differences.ravel(), means - half, means + half, [0.0]])
    low, high = np.nanmin(shown), np.nanmax(shown)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def _varying(results: Results) -> list[str]:
    """The axes with more than one label; all where there is none."""
    return [axis for axis, labels in results.axes.items() if len(labels) > 1] or list(results.axes)


def _labels(results: Results) -> list[str]:
    """The labels that distinguish the cells."""
    shown = [axis in _varying(results) for axis in results.axes]
    return [", ".join(label for label, show in zip(cell, shown, strict=True) if show) for cell in results.cells]


def _title(name: str, test: str) -> str:
    return COLUMNS[name].title.replace("test", test)


def _plus_minus(values: Floats, form: str) -> str:
    center, spread = mean(values), deviation(values)
    if math.isnan(center):
        return "–"
    return f"{center:{form}}" if math.isnan(spread) else f"{center:{form}} ± {spread:{form}}"


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _number(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _csv(names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    return file.getvalue()
