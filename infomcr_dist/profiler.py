"""Some steps of a run as a trace, and their time by operator, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from infomcr_dist.checkpoint import write_atomically

TRACE, TABLE = "trace.json", "operators.txt"
_ROWS = 50


class StepProfiler:
    """Profiles steps, from when the first of two numbers of updates is done until the second is.

    Args:
        steps: the two numbers; None: profiles nothing, and is free.
        directory: of the run, where ``trace.json`` (of Chrome's format, for ui.perfetto.dev) and ``operators.txt`` are
            written. In the trace each step is a range of its number in the records, ``step 101``.
        device: of this rank.
        report: called with a line where they cannot be written, which ends no run.
    """

    def __init__(
        self, steps: tuple[int, ...] | None, directory: Path, device: torch.device, report: Callable[[str], None]
    ) -> None:
        self._first, self._last = steps or (0, 0)
        self._directory, self._device, self._report = directory, device, report
        self._profile: profile | None = None
        self._range: record_function | None = None

    def begin_step(self, done: int) -> None:
        """A step begins, after so many updates."""
        if not self._first <= done < self._last:
            return
        if self._profile is None:
            gpu = self._device.type == "cuda"
            self._profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])])
            self._profile.start()
        self._range = record_function(f"step {done + 1}")
        self._range.__enter__()

    def end_step(self, done: int) -> None:
        """It has ended; so many updates are done now."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
            if done == self._last:
                self.close()

    def close(self) -> None:
        """Write what has been profiled, where the run ends before the last step."""
        stopped, self._profile, unfinished, self._range = self._profile, None, self._range, None
        if stopped is None:
            return
        if unfinished is not None:
            unfinished.__exit__(None, None, None)
        try:
            stopped.stop()
            order = f"self_{self._device.type}_time_total"
            table = stopped.key_averages().table(sort_by=order, row_limit=_ROWS)
            write_atomically(self._directory / TABLE, lambda file: file.write(table.encode()))
            stopped.export_chrome_trace(str(self._directory / TRACE))
        except Exception as error:  # of the disk, or of the profiler
            self._report(f"profile.steps: the profile is not written ({' '.join(str(error).split())})")
