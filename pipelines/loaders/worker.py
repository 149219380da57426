"""Processes that read, decode and augment samples into shared memory, for the backend "torch".

A process of its own, `supervise`, loads the libraries and forks as many as are wanted: that is fast, they share its
memory, and no thread of the trainer is forked with them. They take requests from one pipe and answer through another:
records shorter than PIPE_BUF go through whole, so that all of them can use the same two. They end when the trainer
does, however it does: nobody holds the other end of the pipe of requests then.
"""

import contextlib
import os
import select
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from .. import augment
from ..format.dataset import Shard, Split
from ..format.remote import locate
from .memory import Memory, SharedBatch
from .reader import Files, SampleError, Workers, reading_threads
from .render import Renderer

PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from pipelines.loaders.worker import supervise
supervise(json.load(sys.stdin))
"""

REQUEST = struct.Struct("<iii")
"""The number of a batch, its first row and the one after its last."""

READY, DONE, FAULT, ERROR, DIED = b"r", b"d", b"f", b"e", b"x"

_REPLY = struct.Struct("<iiici")
_MAX_TEXT = 4096 - _REPLY.size  # PIPE_BUF of Linux


class Reply(NamedTuple):
    """DONE with the rows start..stop of a batch but those of a FAULT; or an ERROR at a row, which ends the request.

    READY is about all processes, DIED about one.
    """

    number: int
    start: int
    stop: int
    kind: bytes
    text: str


def send(descriptor: int, reply: Reply) -> None:
    """Writes a reply."""
    text = reply.text.encode("utf-8", "surrogateescape")[:_MAX_TEXT]
    os.write(descriptor, _REPLY.pack(*reply[:4], len(text)) + text)


def take_replies(received: bytearray) -> Iterator[Reply]:
    """The whole replies of what was received, which are removed from it."""
    while len(received) >= _REPLY.size:
        number, start, stop, kind, length = _REPLY.unpack_from(received)
        if len(received) < _REPLY.size + length:
            return
        text = received[_REPLY.size : _REPLY.size + length].decode("utf-8", "surrogateescape")
        del received[: _REPLY.size + length]
        yield Reply(number, start, stop, kind, text)


def supervise(setup: dict[str, Any]) -> None:
    """Forks the processes, and reports the first that ends."""
    if setup["shrinks"]:
        import torch  # which then need not be loaded by each of them

        torch.set_num_threads(1)
    for place in range(setup["processes"]):
        if os.fork() == 0:
            try:
                _Worker(setup, place).serve()
            except BrokenPipeError:  # the trainer has ended
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    os.close(setup["requests"])
    send(setup["replies"], Reply(0, 0, 0, READY, ""))
    code = os.waitstatus_to_exitcode(os.wait()[1])
    how = f"was killed by signal {-code}, perhaps because memory ran out" if code < 0 else f"ended with code {code}"
    with contextlib.suppress(BrokenPipeError):
        send(setup["replies"], Reply(0, 0, 0, DIED, how))
    os._exit(0)  # tearing PyTorch down takes a second


class _Worker:
    def __init__(self, setup: dict[str, Any], place: int) -> None:
        self._requests, self._replies = setup["requests"], setup["replies"]
        self._memory = Memory(**setup["memory"])
        self._reading: NDArray[Any] = self._memory.reading()[place : place + 1]
        # Only the entries of the samples under way, by id: all that `Files` asks of an index.
        self._index: dict[int, Any] = {}
        shards = tuple(Shard(locate(path), *facts) for path, *facts in setup["shards"])
        self._split = Split("", shards, cast(NDArray[Any], self._index))
        readers = reading_threads(self._split, setup["processes"]) // setup["processes"]
        self._files, self._render = Files(self._split, readers, setup["cache_bytes"]), Renderer(**setup["render"])
        self._workers = Workers(readers) if readers > 1 else None

    def serve(self) -> None:
        threading.Thread(target=self._end_with_trainer, daemon=True).start()
        while record := os.read(self._requests, REQUEST.size):
            number, start, stop = REQUEST.unpack(record)
            self._fill(self._memory.batch(number), number, start, stop)

    def _end_with_trainer(self) -> None:
        # Also while a read hangs.
        poll = select.poll()
        poll.register(self._requests, 0)  # nothing but POLLHUP
        poll.poll()
        os._exit(0)

    def _fill(self, batch: SharedBatch, number: int, start: int, stop: int) -> None:
        rows = batch.rows[start:stop]
        samples = rows["sample"].tolist()
        self._index.clear()
        self._index.update(zip(samples, rows["entry"], strict=True))
        drawn = list(map(augment.Row, rows["steps"].tolist(), rows["jitter"].tolist()))
        reads = self._begin_reading(batch, samples)
        faults, row = 0, 0

        def paint(place: int, pixels: NDArray[np.uint8]) -> None:
            nonlocal faults, row
            row = place
            if batch.cancelled[0]:
                return
            try:
                self._paint(samples[row], reads[row], drawn[row], pixels)
            except SampleError as error:
                faults += 1
                send(self._replies, Reply(number, start + row, start + row + 1, FAULT, str(error)))

        try:
            self._render.batch(batch.images[start:stop], paint)
        except ValueError as error:
            send(self._replies, Reply(number, start + row, stop, ERROR, str(error)))
        send(self._replies, Reply(number, start, stop, DONE, ""))

    def _begin_reading(self, batch: SharedBatch, samples: list[int]) -> list[Callable[[], bytes]]:
        """What gives the encoded image of each sample; those at URLs are asked for side by side."""
        if self._workers is None:
            return [partial(self._files.read, sample) for sample in samples]

        def read(sample: int) -> bytes:
            return b"" if batch.cancelled[0] else self._files.read(sample)  # of a cancelled one nothing is painted

        return [self._workers.submit(partial(read, sample)).result for sample in samples]

    def _paint(self, sample: int, read: Callable[[], bytes], drawn: augment.Row, pixels: NDArray[np.uint8]) -> None:
        self._reading[0] = time.monotonic(), sample
        try:
            encoded = read()
        finally:
            self._reading[0] = 0, 0
        try:
            self._render.decode(encoded, drawn, pixels)
        except SampleError as error:
            raise SampleError(f"cannot decode {self._split.where(sample)}: {error}") from None
