"""Times calls against the first of them, in rounds, so that what else the machine does meets all of them alike."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """One call: median wall-clock seconds, and ratios to the first call of the same round: median (quartiles)."""

    seconds: float
    ratio: str
    processor_ratio: str
    """The same for the processor time of all threads, which other processes disturb less."""


def measure(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Run every call once a round, in random order; one more round first, to warm up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for round_number in range(rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter(), time.process_time()
            calls[name]()
            end = time.perf_counter(), time.process_time()
            if round_number:
                seconds[name].append((end[0] - start[0], end[1] - start[1]))
    first = next(iter(seconds.values()))
    timings = {}
    for name, times in seconds.items():
        wall, processor = (
            _spread([one[clock] / other[clock] for one, other in zip(times, first, strict=True)]) for clock in (0, 1)
        )
        timings[name] = Timing(statistics.median(wall for wall, _ in times), wall, processor)
    return timings


def _spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"
