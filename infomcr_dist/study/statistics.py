"""Statistics of repeated runs; NaN is a run that is missing or failed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipelines.random_streams import Stream, generator

Floats = NDArray[np.float64]
_RESAMPLES = 1000


def mean(values: Floats) -> float:
    """Mean of the runs that are there; NaN for none."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else math.nan


def deviation(values: Floats) -> float:
    """Standard deviation (n - 1) of the runs that are there; NaN for fewer than two."""
    there = values[np.isfinite(values)]
    return float(there.std(ddof=1)) if len(there) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """The mean difference of paired runs."""

    mean: float
    low: float
    """Lower end of the mean's 95 % interval (Student's t)"""
    high: float
    """Its upper end"""
    deviation: float
    """Standard deviation (n - 1) of the differences"""
    pairs: int


def paired_difference(values: Floats, baseline: Floats) -> Difference:
    """``values`` minus ``baseline``, both (seeds,), over the seeds that both have."""
    differences = values - baseline
    differences = differences[np.isfinite(differences)]
    pairs, center, spread = len(differences), mean(differences), deviation(differences)
    half = math.nan if pairs < 2 else float(stats.t.ppf(0.975, pairs - 1)) * spread / math.sqrt(pairs)
    return Difference(center, center - half, center + half, spread, pairs)


def seeds_needed(deviation: float, effect: float, most: int = 1000) -> int | None:
    """The fewest pairs with which a two-sided paired t-test at 5 % detects an effect in 80 % of studies.

    Args:
        deviation: standard deviation of the differences.
        effect: mean of the differences, in the same unit, not 0.
        most: where to stop looking.

    Returns:
        The number of pairs, at least 2; None if it is above ``most``.
    """
    for pairs in range(2, most + 1):
        if deviation == 0:
            return pairs
        # t² has the F distribution; scipy's noncentral t is not a number in the tail of the wrong sign.
        critical = stats.f.ppf(0.95, 1, pairs - 1)
        if stats.ncf.sf(critical, 1, pairs - 1, pairs * (effect / deviation) ** 2) >= 0.8:
            return pairs
    return None


def kendall(left: Floats, right: Floats) -> float:
    """Kendall's τ-b of two arrays (n,) where both have a number; NaN where one of the two is constant."""
    there = np.isfinite(left) & np.isfinite(right)
    return float(stats.kendalltau(left[there], right[there]).statistic) if there.sum() > 1 else math.nan


def partial_kendall(left: Floats, right: Floats, fixed: Floats) -> float:
    """Kendall's partial τ of ``left`` and ``right`` given ``fixed``, all (n,) (Kendall, Biometrika 32, 1942).

    NaN where ``left`` or ``right`` has the order of ``fixed``.
    """
    there = np.isfinite(left) & np.isfinite(right) & np.isfinite(fixed)
    left, right, fixed = left[there], right[there], fixed[there]
    of_left, of_right = kendall(left, fixed), kendall(right, fixed)
    scale = (1 - of_left**2) * (1 - of_right**2)
    return (kendall(left, right) - of_left * of_right) / math.sqrt(scale) if scale > 1e-9 else math.nan


def with_interval(statistic: Callable[..., float], *columns: Floats) -> str:
    """A statistic of all runs, each column (cells, seeds), with its 95 % bootstrap interval over the seeds."""
    value = statistic(*(column.ravel() for column in columns))
    if math.isnan(value):
        return "–"
    cells, seeds = columns[0].shape
    if seeds < 2:
        return f"{value:+.2f}"
    draws = generator(Stream.BOOTSTRAP, seed=0).integers(seeds, size=(_RESAMPLES, cells, seeds))
    rows = np.arange(cells)[:, None]
    found = np.array([statistic(*(column[rows, draw].ravel() for column in columns)) for draw in draws])
    low, high = np.quantile(found[np.isfinite(found)], [0.025, 0.975])
    return f"{value:+.2f} ({low:+.2f} … {high:+.2f})"
