"""SIGTERM and SIGINT as a request to stop after the step under way."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class StopRequest:
    """From `listen` on, SIGTERM and a first SIGINT request a stop; a second SIGINT ends the process at once.

    Args:
        seconds: how long after the request the process may still run; then it exits, saved or not.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, seconds: float) -> None:
        self.requested = False
        self._seconds = seconds
        self._previous_handlers: list[Any] = []

    def listen(self) -> None:
        """Install the handlers; may be called again."""
        if self._previous_handlers:
            return
        # Python calls a handler when the main thread gets back to it, which may be waiting for another worker. The
        # wakeup descriptor reaches this thread at once.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()
        self._previous_handlers = [signal.signal(number, lambda *_: None) for number in self._SIGNALS]
        signal.set_wakeup_fd(self._writer)

    def close(self) -> None:
        """Restore the handlers that were there before."""
        if self._previous_handlers:
            signal.set_wakeup_fd(-1)
            os.close(self._writer)
            for number, handler in zip(self._SIGNALS, self._previous_handlers, strict=True):
                signal.signal(number, handler)
            self._previous_handlers = []

    def request(self) -> None:
        """Request a stop."""
        if not self.requested:
            self.requested = True
            timer = threading.Timer(self._seconds, self._overdue)
            timer.daemon = True
            timer.start()

    def _listen(self, reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGINT and self.requested:
                os._exit(130)
            if received[0] in self._SIGNALS:
                self.request()
        os.close(reader)

    def _overdue(self) -> None:
        message = (
            f"\nerror: not all workers finished their step within shutdown_timeout_seconds={self._seconds:g}: "
            "exiting without saving it; resume from the last checkpoint with resume=auto\n"
        )
        try:
            os.write(2, message.encode())
        finally:
            os._exit(1)
