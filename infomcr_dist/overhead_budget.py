"""How many sub-batches a step penalizes, so that it takes a given multiple of a plain step's time.

A step with k penalized sub-batches takes about a + bk seconds. k is drawn for each step by (seed, step), the same on
every worker, as one of the two whole numbers next to its mean κ; the penalty of such a step is weighted k/κ on top of
the sampled way's M/k, so that its expectation is that of all M sub-batches, k = 0 included. κ follows the measurements.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from pipelines.random_streams import Stream, generator

WINDOW = 20
"""Steps between two settings of κ."""
_MEMORY = 200
_LEAST = 0.05


class OverheadBudget:
    """κ and the measurements it follows. ``sub_batches``: how many a worker's batch has (M)."""

    def __init__(self, ratio: float, sub_batches: int, seed: int) -> None:
        self.ratio, self.sub_batches, self.seed = ratio, sub_batches, seed
        # Below 1, so that there are plain steps to compare with even where the regularizer is on from the first step.
        self.mean = 0.5
        self._plain: deque[float] = deque(maxlen=_MEMORY)
        self._window: list[float] = []

    def draw(self, step: int) -> int:
        """How many sub-batches the step penalizes, with mean κ."""
        whole = math.floor(self.mean)
        chance = float(generator(Stream.OVERHEAD_BUDGET, self.seed, step).random())
        return whole + (chance < self.mean - whole)

    def observe(self, num_penalized: int | None, seconds: float) -> None:
        """A step's time; ``num_penalized`` is None before the regularizer is on."""
        if not num_penalized:
            self._plain.append(seconds)
        if num_penalized is not None:
            self._window.append(seconds)

    @property
    def measured_ratio(self) -> float | None:
        """Mean time of the last window's steps over the median plain step's; None before there are both."""
        if not self._window or not self._plain:
            return None
        # One step that waited for something else (an evaluation, another process) must not move κ: the slowest tenth
        # and the fastest are excluded from the mean.
        trim = len(self._window) // 10
        kept = sorted(self._window)[trim : len(self._window) - trim]
        return statistics.fmean(kept) / statistics.median(self._plain)

    def propose(self) -> float:
        """κ for the next window, from this worker's measurements; one worker's goes to all. Empties the window."""
        measured, kappa = self.measured_ratio, self.mean
        self._window.clear()
        if measured is None:
            return kappa
        slope = max(measured - 1, 0.01) / kappa  # overhead of one sub-batch, in plain steps
        target = (self.ratio - 1) / slope
        # Half of the way, and at most a factor 2: measurements are noisy.
        step = min(2.0, max(0.5, target / kappa))
        return min(float(self.sub_batches), max(_LEAST, kappa * math.sqrt(step)))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "plain": list(self._plain)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]
        self._plain.extend(state["plain"])
