"""The figures of a study: what their artists hold, against the numbers; no pixels."""

import os

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from infomcr_dist.study.results import Results, draw_bars, draw_differences, draw_metrics
from infomcr_dist.study.statistics import Floats, paired_difference

NAN = float("nan")
ERROR = [[0.63, 0.60, 0.64], [0.61, 0.61, 0.62], [0.60, 0.57, NAN]]
GAMMA = [[-900.0, -800.0, -700.0], [-950.0, -830.0, -790.0], [-600.0, -500.0, -300.0]]
TIME = [[0.19, 0.2, 0.21], [0.3, 0.31, 0.32], [0.25, 0.26, 0.27]]


def results_of(axes: dict[str, list[str]], **columns: list[list[float]]) -> Results:
    return Results(axes, list(columns), np.stack([np.array(values) for values in columns.values()], axis=2))


@pytest.fixture
def three() -> Results:
    axes = {"data": ["cifar10"], "training": ["plain", "+reg", "_$x$"]}
    return results_of(axes, test_error=ERROR, gamma_hat=GAMMA, plain_step=TIME)


def dots(panel: Axes, rows: int) -> Floats:
    """(rows, seeds) of the points, one artist a seed."""
    lines = [line for line in panel.lines if line.get_marker() == "o" and line.get_markersize() == 4]
    values = np.array([line.get_xdata() for line in lines]).T
    assert values.shape[0] == rows
    return values


def whiskers(panel: Axes) -> list[list[float]]:
    """Ends of the horizontal ones, by their rows."""
    (collection,) = (c for c in panel.collections if isinstance(c, LineCollection))
    for row, segment in enumerate(collection.get_segments()):
        assert [y for _, y in segment.tolist()] == [row, row]
    return [[x for x, _ in segment.tolist()] for segment in collection.get_segments()]


def rows_of(figure: Figure) -> list[str]:
    """Their names, from top to bottom."""
    panel = figure.axes[0]
    bottom, top = panel.get_ylim()
    assert bottom > top
    return [label.get_text() for label in panel.get_yticklabels()]


def test_differences_are_those_of_the_table(three: Results) -> None:
    figure = draw_differences(three, three.columns, "training", "a title", "validation")
    assert rows_of(figure) == ["+reg", "_$x$"], "the baseline has no row"
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["validation error", "γ̂", "plain step"]
    assert [panel.get_xlabel() for panel in figure.axes] == [
        "difference from plain (62.33 ± 2.08), points",
        "difference from plain (−800.0 ± 100.0)",
        "difference from plain (200.0 ± 10.0), ms",
    ]
    assert figure.get_suptitle() == "a title · cifar10"
    for panel, name in zip(figure.axes, three.columns, strict=True):
        values = three.of(name)
        np.testing.assert_allclose(dots(panel, 2), values[1:] - values[0])
        found = [paired_difference(row, values[0]) for row in values[1:]]
        np.testing.assert_allclose(whiskers(panel), [[d.low, d.high] for d in found])
        (means,) = (line for line in panel.lines if line.get_markersize() == 7)
        np.testing.assert_allclose(np.asarray(means.get_xdata()), [d.mean for d in found])
        assert any(line.get_xdata() == [0, 0] for line in panel.lines), "a line at zero"
        low, high = panel.get_xlim()
        assert low < 0 < high
    assert [text.get_text() for text in figure.axes[0].texts] == ["−1.00", "−3.00"]
    figure.savefig(os.devnull, format="png")


def test_each_combination_of_the_other_axes_has_its_own_baseline() -> None:
    axes = {"network": ["a", "b"], "beta": ["none", "1", "2"]}
    errors = [[0.5, 0.5], [0.4, 0.41], [0.3, 0.31], [0.2, 0.2], [0.25, 0.26], [0.1, 0.15]]
    figure = draw_differences(results_of(axes, test_error=errors), ["test_error"], "beta", "", "test")
    assert rows_of(figure) == ["a, 1", "a, 2", "b, 1", "b, 2"]
    np.testing.assert_allclose(dots(figure.axes[0], 4), [[-10, -9], [-20, -19], [5, 6], [-10, -5]])
    assert figure.axes[0].get_xlabel() == "difference from none, points"
    assert figure.axes[0].get_ylabel() == "network, beta"


def test_one_wide_interval_does_not_hide_the_others() -> None:
    errors = [[0.5, 0.5], [0.49, 0.491], [0.48, 0.482], [0.48, 0.52]]
    found = results_of({"beta": ["none", "1", "2", "3"]}, test_error=errors)
    (panel,) = draw_differences(found, ["test_error"], "beta", "", "test").axes
    low, high = panel.get_xlim()
    ends = whiskers(panel)
    assert ends[2][0] < low < high < ends[2][1], "it runs into the frame"
    assert all(low < end < high for row in ends[:2] for end in row)
    assert ((low < dots(panel, 3)) & (dots(panel, 3) < high)).all()


def test_missing_runs_leave_gaps() -> None:
    errors = [[0.5, NAN], [0.4, 0.4], [NAN, NAN], [0.5, NAN]]
    found = results_of({"cell": ["a", "b", "c", "d"]}, test_error=errors)
    figure = draw_differences(found, ["test_error"], "cell", "", "test")
    assert rows_of(figure) == ["b", "c", "d"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["−10.00", "+0.00"]
    figure.savefig(os.devnull, format="png")
    draw_bars(found, ["test_error"], "", "test").savefig(os.devnull, format="png")


def test_bars_begin_at_zero(three: Results) -> None:
    figure = draw_bars(three, three.columns, "$x", "test")
    assert rows_of(figure) == ["plain", "+reg", "_$x$"]
    assert [panel.get_xlabel() for panel in figure.axes] == ["test error, %", "γ̂", "plain step, ms"]
    for panel, name in zip(figure.axes, three.columns, strict=True):
        values = three.of(name)
        bars = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
        assert [bar.get_x() for bar in bars] == [0] * 3
        np.testing.assert_allclose([bar.get_width() for bar in bars], np.nanmean(values, axis=1))
        low, high = panel.get_xlim()
        assert low <= 0 <= high
        spread = np.nanstd(values, axis=1, ddof=1)[:, None] * [-1, 1]
        np.testing.assert_allclose(whiskers(panel), np.nanmean(values, axis=1)[:, None] + spread)
        np.testing.assert_allclose(dots(panel, 3), values)
    figure.savefig(os.devnull, format="png")


def test_metrics_are_drawn_over_the_cells_and_against_the_error(three: Results) -> None:
    figure = draw_metrics(three, "_$x", "test")
    upper_error, upper_gamma, corner, lower_gamma = figure.axes
    error, gamma = three.of("test_error"), three.of("gamma_hat")
    positions = np.arange(3.0)[:, None] + np.zeros((3, 3))
    for panel, x, y in (
        (upper_error, positions, error),
        (upper_gamma, positions, gamma),
        (lower_gamma, gamma, error),
    ):
        *cells, means = panel.lines
        np.testing.assert_allclose(np.array([line.get_xdata() for line in cells]), x)
        np.testing.assert_allclose(np.array([line.get_ydata() for line in cells]), y)
        assert len({to_hex(line.get_color()) for line in panel.lines}) == 4
        np.testing.assert_allclose(np.asarray(means.get_xdata()), np.nanmean(x, axis=1))
        np.testing.assert_allclose(np.asarray(means.get_ydata()), np.nanmean(y, axis=1))
    legend = corner.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "+reg", "_$x$", "mean"]
    assert (lower_gamma.get_xlabel(), lower_gamma.get_ylabel()) == ("γ̂", "test error, %")
    figure.savefig(os.devnull, format="png")
