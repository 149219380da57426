"""Standard output and standard error that never end a command, whatever reads them and in whatever encoding.

`lenient` is for every command: what the terminal's encoding lacks is escaped. `detached` is for training, which no
terminal may delay either: a thread writes, and what it cannot write in time is dropped.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

_LIMIT_BYTES = 2**20
_PATIENCE_SECONDS = 2.0


def lenient() -> None:
    """Escape what the encodings of stdout and stderr lack; where one of them is closed, discard its text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reader_gone() -> bool:
    """Whether nothing reads a detached stdout any more: the launcher was killed."""
    return isinstance(sys.stdout, DetachedStream) and sys.stdout.reader_gone


@contextmanager
def detached() -> Iterator[None]:
    """Write stdout and stderr from threads while the context lasts; at its end what is left gets two seconds."""
    lenient()
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    replaced = []
    for name, stream in streams.items():
        try:
            stream.flush()
            descriptor = stream.fileno()
        except (OSError, ValueError):  # it is no file, or closed, or full
            descriptor = None
        if descriptor is not None:
            replaced.append(DetachedStream(descriptor, stream.encoding or "utf-8"))
            setattr(sys, name, replaced[-1])
    try:
        yield
    finally:
        for stream in replaced:
            stream.finish()
        for name, stream in streams.items():
            setattr(sys, name, stream)


def exit_now(text: str, code: int) -> NoReturn:
    """End the process at once, from any thread, with a line on stderr if it can be written within two seconds."""

    def write() -> None:
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())

    if sys.__stderr__ is not None:  # otherwise the descriptor is another file's by now
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(_PATIENCE_SECONDS)
    os._exit(code)


class DetachedStream(io.TextIOBase):
    """A text stream whose `write` neither waits nor fails.

    Args:
        descriptor: the file written to.
        encoding: of the text; what it lacks is escaped.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self.reader_gone = False
        """Whether nothing reads the stream any more"""
        self._descriptor = descriptor
        self._encoding = encoding
        self._chunks: deque[bytes] = deque()
        self._waiting = 0
        self._dropped = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Hand the text to the thread; it is dropped while a megabyte waits to be written."""
        data = text.encode(self._encoding, "backslashreplace")
        with self._changed:
            if self._waiting + len(data) > _LIMIT_BYTES:
                self._dropped += len(data)
            elif data:
                if self._dropped:
                    data = f"\n[{self._dropped} bytes of output were dropped here]\n".encode(self._encoding) + data
                    self._dropped = 0
                self._chunks.append(data)
                self._waiting += len(data)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Nothing: the thread writes as fast as the reader reads."""

    def finish(self) -> None:
        """Wait until all is written, at most two seconds after the last progress, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            waiting, since = self._waiting, time.monotonic()
            while self._waiting and time.monotonic() - since < _PATIENCE_SECONDS:
                self._changed.wait(_PATIENCE_SECONDS)
                if self._waiting != waiting:
                    waiting, since = self._waiting, time.monotonic()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._chunks and not self._closing:
                    self._changed.wait()
                if not self._chunks:
                    return
                data = self._chunks.popleft()
            self._write(data)
            with self._changed:
                self._waiting -= len(data)
                self._changed.notify_all()

    def _write(self, data: bytes) -> None:
        """Through the descriptor: a thread that hangs in sys.stdout would hold its lock when the interpreter exits."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view) :]
            except BlockingIOError:
                time.sleep(0.05)
            except OSError as error:  # a full disk, a terminal that hung up
                self.reader_gone = self.reader_gone or error.errno == errno.EPIPE
                return
