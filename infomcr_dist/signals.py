"""SIGTERM, SIGHUP and SIGINT: the end of the process, or a request to stop after the step under way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pipelines.command import termination_signals
from pipelines.console import exit_now


class StopRequest:
    """While its context lasts, a signal ends the process at once; from `defer` on it is a request to stop.

    The signals are SIGTERM, SIGINT and, unless it is ignored as under nohup, SIGHUP. A second SIGINT ends the process
    at once in any case.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferred: tuple[float, Callable[[], str]] | None = None
        self._deadline: threading.Timer | None = None

    def __enter__(self) -> StopRequest:
        # Python calls a handler when the main thread gets back to it, which may be waiting for another worker. The
        # wakeup descriptor reaches this thread at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        self._previous_descriptor = signal.set_wakeup_fd(self._writer)
        numbers = (signal.SIGINT, *termination_signals())
        self._previous_handlers: dict[int, Any] = {n: signal.signal(n, lambda *_: None) for n in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_descriptor)
        os.close(self._writer)
        if self._deadline is not None:
            self._deadline.cancel()

    def defer(self, seconds: float, location: Callable[[], str]) -> None:
        """From now on a signal is a request.

        Args:
            seconds: how long after the request the process may still run; then it exits, saved or not.
            location: where in the run the process is, for the message then.
        """
        self._deferred = seconds, location

    def request(self) -> None:
        """Request a stop."""
        if not self.requested and self._deferred is not None:
            self._deadline = threading.Timer(self._deferred[0], self._overdue, self._deferred)
            self._deadline.daemon = True
            self._deadline.start()
            self.requested = True

    def _listen(self, reader: int) -> None:
        while received := os.read(reader, 1):
            number = received[0]
            if number not in self._previous_handlers:
                continue
            if number == signal.SIGINT and self.requested:
                os._exit(130)
            if self._deferred is None:
                exit_now(
                    "stopped: there is nothing to save; repeat the command", 130 if number == signal.SIGINT else 75
                )
            self.request()
        os.close(reader)

    def _overdue(self, seconds: float, location: Callable[[], str]) -> None:
        exit_now(
            f"error: {location()} did not end within shutdown_timeout_seconds={seconds:g}: exiting without saving it; "
            "resume from the last checkpoint with resume=auto",
            1,
        )
