"""Encoded images by sample id: positioned reads from the shards, done ahead by a few threads.

Errors become ValueErrors that name shard and sample; a read that hangs (a stalled network mount) is reported too.
"""

import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import numpy as np

from .shards import Split, check_shard

T = TypeVar("T")

_HEADER_BYTES = 512
_STALL_SECONDS = 60
_OPEN_FILES = 256  # over all threads of a reader; the usual limit of a process is 1024


class Workers:
    """A few daemon threads. Unlike an executor's they never keep a process from ending while a read hangs."""

    def __init__(self, threads: int) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        future: Future[T] = Future()

        def task() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def close(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()


class Files:
    """Reads samples of one split with at most 256 open descriptors; for use from `threads` threads.

    A shard is checked against the index when it is opened, and every sample against the tar header before it, so a
    shard replaced under a running job is noticed.
    """

    def __init__(self, split: Split, threads: int) -> None:
        self._split = split
        self._limit = max(_OPEN_FILES // threads, 1)
        self._local = threading.local()
        self._reading: dict[int, tuple[float, int]] = {}

    def read(self, sample: int) -> bytes:
        """The encoded image of `sample`."""
        offset, size, shard, *_ = self._split.index[sample].item()
        thread = threading.get_ident()
        self._reading[thread] = (time.monotonic(), sample)
        try:
            file = self._open(shard)
            block = os.pread(file, _HEADER_BYTES + size, offset - _HEADER_BYTES)
        except OSError as error:
            raise ValueError(f"cannot read {self._split.where(sample)}: {error.strerror}") from error
        finally:
            del self._reading[thread]
        if len(block) != _HEADER_BYTES + size or block[257:262] != b"ustar" or _tar_number(block[124:136]) != size:
            raise ValueError(
                f"index and shard disagree at {self._split.where(sample)}: the shard was changed; "
                "restore it or prepare the data set again"
            )
        return block[_HEADER_BYTES:]

    def waiting(self) -> str:
        """Which sample the oldest unfinished read is about, for messages."""
        reads = list(self._reading.values())
        return self._split.where(min(reads)[1]) if reads else "no shard"

    def _open(self, shard: int) -> int:
        files: OrderedDict[int, _File] = self._local.__dict__.setdefault("files", OrderedDict())
        if shard in files:
            files.move_to_end(shard)
        else:
            file = _File(os.open(self._split.shards[shard].path, os.O_RDONLY | os.O_CLOEXEC))
            check_shard(self._split.shards[shard], file.descriptor)
            files[shard] = file
            if len(files) > self._limit:
                files.popitem(last=False)
        return files[shard].descriptor


class _File:
    """A descriptor that closes itself, also when its thread ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def _tar_number(field: bytes) -> int:
    """A number of a tar header: octal text, or base 256 when its first bit is set; -1 if neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1


def chunks(ids: np.ndarray, threads: int) -> list[np.ndarray]:
    """Positions 0 .. len(ids)-1 in pieces, a few a thread, so that threads end together."""
    pieces = min(len(ids), 4 * threads)
    return np.array_split(np.arange(len(ids)), pieces) if pieces else []


def gather(future: "Future[T]", files: Files) -> T:
    """The result of a read; ValueError when it takes longer than a minute."""
    try:
        return future.result(timeout=_STALL_SECONDS)
    except TimeoutError:
        raise ValueError(
            f"a read has taken over {_STALL_SECONDS} s: {files.waiting()}; is its disk or network mount stalled?"
        ) from None
