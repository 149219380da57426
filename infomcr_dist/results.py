"""What the runs of a study show: tables, statistics and figures of numbers that are there already.

Numbers stand in an array (cells, seeds, columns) in which NaN is a run that is missing or failed.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Column:
    """A number of each run: its title, factor and digits in a table."""

    title: str
    factor: float = 1.0
    format: str = ".2f"


COLUMNS = {
    "test_error": Column("test error, %", 100),
    "test_top5_error": Column("test top-5 error, %", 100),
    "test_loss": Column("test loss", format=".4f"),
    "train_error": Column("train error, %", 100),
    "train_top5_error": Column("train top-5 error, %", 100),
    "train_loss": Column("train loss", format=".5f"),
    "gap": Column("gap, %", 100),
    "top5_gap": Column("top-5 gap, %", 100),
    "gamma_hat": Column("γ̂", format=".1f"),
    "frobenius": Column("Frobenius norm", format=".3g"),
    "spectral_radius": Column("spectral radius", format=".3g"),
    "trace": Column("Fisher trace", format=".3g"),
    "robustness": Column("robustness", format=".3g"),
    "penalty_share": Column("β‖g − h‖ / ‖g‖", format=".3f"),
    "plain_step": Column("plain step, ms", 1e3, ".1f"),
    "regularized_step": Column("regularized step, ms", 1e3, ".1f"),
    "step_ratio": Column("regularized / plain"),
}
METRICS = ("gamma_hat", "frobenius", "spectral_radius", "robustness")
"""The four of Figures 2-4."""
POINTS = (0.3, 0.6, 1.0)
"""Effects, in points of error, as large as those of the paper's tables."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class Results:
    """What was measured of each run: ``values`` (cells, seeds, columns), with a cell one label an axis of the grid."""

    axes: dict[str, list[str]]
    """labels by axis; the cells are their product, the last axis fastest"""
    columns: list[str]
    values: Floats

    @property
    def cells(self) -> list[tuple[str, ...]]:
        return list(product(*self.axes.values()))

    def of(self, column: str) -> Floats:
        """(cells, seeds) of a column, in its unit."""
        return COLUMNS[column].factor * self.values[:, :, self.columns.index(column)]


def mean(values: Floats) -> float:
    """Of the runs that are there."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else math.nan


def deviation(values: Floats) -> float:
    """Standard deviation (n - 1) of the runs that are there; NaN for fewer than two."""
    there = values[np.isfinite(values)]
    return float(there.std(ddof=1)) if len(there) > 1 else math.nan


def markdown(results: Results, test: str) -> str:
    """Mean ± standard deviation over the seeds, a line a cell. ``test`` names what stands for the test images."""
    counts = np.isfinite(results.values).any(axis=2).sum(axis=1)
    titles = [COLUMNS[name].title.replace("test", test) for name in results.columns]
    rows = []
    for i, cell in enumerate(results.cells):
        cells = [_plus_minus(results.of(name)[i], COLUMNS[name].format) for name in results.columns]
        rows.append([*cell, str(counts[i]), *cells])
    return _table([*results.axes, "runs", *titles], rows)


def to_csv(results: Results) -> str:
    """The same as CSV, with mean and standard deviation in columns of their own, in units of the records."""
    names = [f"{name}_{kind}" for name in results.columns for kind in ("mean", "std")]
    rows = [
        [*cell, int(np.isfinite(values).any(axis=1).sum())]
        + [_number(f(values[:, k])) for k in range(len(results.columns)) for f in (mean, deviation)]
        for cell, values in zip(results.cells, results.values, strict=True)
    ]
    return _csv([*results.axes, "runs", *names], rows)


def runs_csv(results: Results, seeds: list[list[int]], states: list[list[str]]) -> str:
    """A line a run: its cell, its seed, what became of it, its numbers in units of the records."""
    rows = [
        [*cell, seeds[i][j], states[i][j], *map(_number, results.values[i, j].tolist())]
        for i, cell in enumerate(results.cells)
        for j in range(len(seeds[i]))
    ]
    return _csv([*results.axes, "seed", "state", *results.columns], rows)


@dataclass(frozen=True)
class Difference:
    """Of paired runs: the mean of the differences within a seed, its 95 % interval (Student's t), their deviation."""

    mean: float
    low: float
    high: float
    deviation: float
    pairs: int


def paired_difference(values: Floats, baseline: Floats) -> Difference:
    """``values`` less ``baseline``, seed by seed, of the seeds that both have."""
    differences = values - baseline
    differences = differences[np.isfinite(differences)]
    pairs, center, spread = len(differences), mean(differences), deviation(differences)
    half = math.nan if pairs < 2 else float(stats.t.ppf(0.975, pairs - 1)) * spread / math.sqrt(pairs)
    return Difference(center, center - half, center + half, spread, pairs)


def seeds_needed(deviation: float, effect: float, most: int = 1000) -> int | None:
    """The fewest pairs with which a two-sided paired t-test at 5 % sees ``effect`` in 80 % of studies; None: above
    ``most``."""
    for pairs in range(2, most + 1):
        if deviation == 0:
            return pairs
        # t² has the F distribution; scipy's noncentral t is not a number in the tail of the wrong sign.
        critical = stats.f.ppf(0.95, 1, pairs - 1)
        if stats.ncf.sf(critical, 1, pairs - 1, pairs * (effect / deviation) ** 2) >= 0.8:
            return pairs
    return None


def differences(results: Results, axis: str, test: str) -> str:
    """Every label of ``axis`` against its first, by paired differences, for each combination of the other axes."""
    position = list(results.axes).index(axis)
    baseline, others = results.axes[axis][0], [name for name in results.axes if name != axis]
    index = {cell: i for i, cell in enumerate(results.cells)}
    rows, needed = [], []
    for cell in results.cells:
        if cell[position] == baseline:
            continue
        base = index[(*cell[:position], baseline, *cell[position + 1 :])]
        place = [label for k, label in enumerate(cell) if k != position]
        cells = []
        for name in results.columns:
            d = paired_difference(results.of(name)[index[cell]], results.of(name)[base])
            form = "+" + COLUMNS[name].format
            interval = "" if math.isnan(d.low) else f" ({d.low:{form}} … {d.high:{form}})"
            cells.append("–" if not d.pairs else f"{d.mean:{form}}{interval}")
            if name == "test_error" and d.pairs > 1:
                counts = [seeds_needed(d.deviation, points) for points in POINTS]
                needed.append([*place, cell[position], f"{d.deviation:.2f}", *(str(n or "> 1000") for n in counts)])
        rows.append([*place, cell[position], *cells])
    titles = [COLUMNS[name].title.replace("test", test) for name in results.columns]
    text = f"Less {baseline}, within a seed: mean (95 % interval, Student's t)\n\n"
    text += _table([*others, axis, *titles], rows)
    if needed:
        text += (
            f"\n\nSeeds with which a paired t-test (5 %, two-sided) sees a difference of the {test} error in 80 % of "
            "studies, from the deviation of the differences here\n\n"
        )
        text += _table([*others, axis, "deviation", *(f"{points:g} points" for points in POINTS)], needed)
    return text


def choice(results: Results, axis: str, test: str) -> str:
    """The label of ``axis`` with the lowest mean error, for each combination of the other axes."""
    position = list(results.axes).index(axis)
    best: dict[tuple[str, ...], tuple[float, str]] = {}
    for cell, errors in zip(results.cells, results.of("test_error"), strict=True):
        place = cell[:position] + cell[position + 1 :]
        if not math.isnan(mean(errors)):
            best[place] = min(best.get(place, (math.inf, "")), (mean(errors), cell[position]))
    lines = []
    for place, (error, label) in best.items():
        where = "".join(f"{name}, " for name in place)
        lines.append(f"chosen: {where}{axis} {label}, by the lowest mean {test} error ({error:.2f} %)")
    return "\n".join(lines)


def correlations(results: Results, test: str) -> str:
    """Kendall's τ of each metric, and of the training loss, with the test error: of the cells' means, of all runs, and
    of all runs with the training loss held fixed, the last two with a 95 % interval from drawing the seeds of each cell
    anew."""
    rows = []
    error = results.of("test_error")
    loss = results.of("train_loss") if "train_loss" in results.columns else None
    for name in (n for n in (*METRICS, "train_loss") if n in results.columns):
        metric = results.of(name)
        means = [np.array([mean(row) for row in values]) for values in (metric, error)]
        row = [COLUMNS[name].title, f"{kendall(*means):+.2f}", _with_interval(kendall, metric, error)]
        if loss is not None:
            row.append("" if name == "train_loss" else _with_interval(partial_kendall, metric, error, loss))
        rows.append(row)
    titles = ["", "of the means", "of all runs", *([] if loss is None else ["of all runs, training loss held fixed"])]
    text = f"Kendall's τ with the {test} error (1: same order; 95 % interval by bootstrap over the seeds)\n\n"
    return text + _table(titles, rows)


def kendall(left: Floats, right: Floats) -> float:
    """Kendall's τ-b of the pairs that are there; NaN where one of the two is constant."""
    there = np.isfinite(left) & np.isfinite(right)
    return float(stats.kendalltau(left[there], right[there]).statistic) if there.sum() > 1 else math.nan


def partial_kendall(left: Floats, right: Floats, fixed: Floats) -> float:
    """Kendall's partial τ of ``left`` and ``right``, what either shares with the order of ``fixed`` taken out (Kendall,
    Biometrika 32, 1942); NaN where one of them has the order of ``fixed``."""
    there = np.isfinite(left) & np.isfinite(right) & np.isfinite(fixed)
    left, right, fixed = left[there], right[there], fixed[there]
    of_left, of_right = kendall(left, fixed), kendall(right, fixed)
    scale = (1 - of_left**2) * (1 - of_right**2)
    return (kendall(left, right) - of_left * of_right) / math.sqrt(scale) if scale > 1e-9 else math.nan


def _with_interval(statistic: Callable[..., float], *columns: Floats) -> str:
    """Of all runs, (cells, seeds) a column, with a 95 % interval by bootstrap over the seeds."""
    value = statistic(*(column.ravel() for column in columns))
    if math.isnan(value):
        return "–"
    cells, seeds = columns[0].shape
    if seeds < 2:
        return f"{value:+.2f}"
    draws = np.random.default_rng(0).integers(seeds, size=(_RESAMPLES, cells, seeds))
    rows = np.arange(cells)[:, None]
    found = np.array([statistic(*(column[rows, draw].ravel() for column in columns)) for draw in draws])
    low, high = np.quantile(found[np.isfinite(found)], [0.025, 0.975])
    return f"{value:+.2f} ({low:+.2f} … {high:+.2f})"


def draw_metrics(results: Results, title: str, test: str) -> Figure:
    """Each metric and the test error over what varies (mean line, ± 1 standard deviation), as Figures 2-4; below, each
    metric against the test error, a point a run."""
    names = [name for name in METRICS if name in results.columns]
    figure = Figure(figsize=(3.6 * len(names), 6.2), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False)
    labels = [", ".join(cell) for cell in results.cells]
    error = results.of("test_error")
    for k, name in enumerate(names):
        metric, upper = results.of(name), panels[0, k]
        _band(upper, metric, "C0")
        upper.set_ylabel(COLUMNS[name].title, color="C0")
        right = upper.twinx()
        _band(right, error, "C1")
        right.set_ylabel(f"{test} error, %", color="C1")
        upper.set_xticks(range(len(labels)), labels)
        upper.set_xlabel(", ".join(results.axes))
        lower = panels[1, k]
        for i, label in enumerate(labels):
            lower.plot(metric[i], error[i], "o", color=f"C{i}", label=label, alpha=0.6, markersize=4)
        lower.plot([mean(row) for row in metric], [mean(row) for row in error], "k-", linewidth=1)
        lower.set_xlabel(COLUMNS[name].title)
        lower.set_ylabel(f"{test} error, %")
        if name != "gamma_hat":  # it is a logarithm already
            lower.set_xscale("log")
            lower.tick_params(axis="x", which="minor", labelsize=6, labelrotation=90)  # named within a decade alone
    figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels))
    figure.suptitle(title)
    return figure


def draw_bars(results: Results, columns: Sequence[str], title: str, test: str) -> Figure:
    """Bars of means with whiskers of one standard deviation: a panel a column, a colour a label of the last axis."""
    figure = Figure(figsize=(4.2 * len(columns), 3.6), layout="constrained")
    *_, last = results.axes
    labels, groups = results.axes[last], list(product(*list(results.axes.values())[:-1]))
    colors: list[Any] = [f"C{j}" for j in range(len(labels))]
    if len(labels) > 10:  # matplotlib's own ten would begin anew
        colors = list(colormaps["viridis"](np.linspace(0, 1, len(labels))))
    for axes, name in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        values = results.of(name)
        shape = (len(groups), len(labels))
        means = np.array([mean(row) for row in values]).reshape(shape)
        spreads = np.nan_to_num(np.array([deviation(row) for row in values]).reshape(shape))
        width = 0.8 / len(labels)
        for j, label in enumerate(labels):
            places = np.arange(len(groups)) + (j - (len(labels) - 1) / 2) * width
            axes.bar(places, means[:, j], width, yerr=spreads[:, j], capsize=3, label=label, color=colors[j])
        axes.set_xticks(range(len(groups)), ["\n".join(group) for group in groups])
        axes.set_ylabel(COLUMNS[name].title.replace("test", test))
        _zoom(axes, means, spreads)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, title=last)
    figure.suptitle(title)
    return figure


def _band(axes: Axes, values: Floats, color: str) -> None:
    means, spreads = (np.array([f(row) for row in values]) for f in (mean, deviation))
    places = np.arange(len(values))
    axes.plot(places, means, "o-", color=color, markersize=3)
    axes.fill_between(places, means - spreads, means + spreads, color=color, alpha=0.2, linewidth=0)


def _zoom(axes: Axes, means: Floats, spreads: Floats) -> None:
    """Begin the axis where the differences show; bars of differing signs, single bars and single runs begin at 0."""
    if not spreads.any():
        return
    low, high = np.nanmin(means - spreads), np.nanmax(means + spreads)
    if not np.isfinite([low, high]).all() or low == high or low * high <= 0:
        return
    margin = 0.25 * (high - low)
    if low > 0:
        axes.set_ylim(bottom=max(0, low - margin))
    else:
        axes.set_ylim(top=min(0, high + margin))


def _plus_minus(values: Floats, form: str) -> str:
    center, spread = mean(values), deviation(values)
    if math.isnan(center):
        return "–"
    return f"{center:{form}}" if math.isnan(spread) else f"{center:{form}} ± {spread:{form}}"


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
