"""The backend "torch": our index, positioned reads, simplejpeg and OpenCV in processes, PyTorch to hold the result.

For machines without DALI, and as an independent check of it. Threads would wait for each other: an image takes a
handful of short calls into libraries, and after each of them Python's interpreter lock is needed again. Processes
write into memory that they share with the trainer, and its own thread is not disturbed by them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..format import Split
from ..sampler import Ids, LocalBatch
from . import reader
from .base import IndexedLoader, Pending, batches_in_order
from .config import Batch, LoaderConfig
from .memory import Buffers, Memory
from .reader import SampleError, Workers, chunks
from .render import normalization
from .worker import DIED, DONE, FAULT, PROGRAM, READY, REQUEST, Reply, take_replies


@dataclass
class _UnderWay:
    """A batch that the processes are writing.

    Attributes:
        number: of its memory.
        images: keeps its memory from being used for another batch.
        samples: after substitution.
        missing: rows of which the processes have not reported yet.
        bad: reports other than that a row is done, by row.
    """

    number: int
    local_batch: LocalBatch
    images: NDArray[Any]
    labels: NDArray[np.int64]
    samples: Ids
    missing: int
    bad: dict[int, Reply] = field(default_factory=dict)


class TorchLoader(IndexedLoader):
    """Batches of one split, decoded by processes; see `LoaderConfig`."""

    def __init__(self, split: Split, config: LoaderConfig, normalize: bool = True) -> None:
        """Without `normalize`, images are uint8 (B, size, size, 3)."""
        super().__init__(split, config)
        self._tables = normalization(config.mean, config.std) if normalize else None
        self._buffers = Buffers(config, normalize)
        self._reading = self._buffers.memory.reading()
        # Geometry takes a fraction of a millisecond of Python a batch, which a thread of its own spends.
        self._sender = Workers(1)
        self._processes: _Processes | None = None
        self._under_way: dict[int, _UnderWay] = {}

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """(local_batch, images, labels) of each local batch; this call ends an earlier, unfinished iteration."""
        check = self._iterations.begin()
        return batches_in_order(iter(local_batches), self._config, self._start, check, self._tables)

    def close(self) -> None:
        """Ends the processes."""
        self._iterations.end()
        self._sender.close()
        if self._processes:
            self._processes.close()

    def _start(self, local_batch: LocalBatch) -> Pending:
        self._processes = self._processes or self._open(local_batch.samples)
        samples = local_batch.samples.copy()
        number, images = self._buffers.take(len(samples))
        labels = self._labels[samples].astype(np.int64)
        batch = _UnderWay(number, local_batch, images, labels, samples, len(samples))
        self._under_way[number] = batch
        self._buffers.memory.batch(number).cancelled[0] = False
        # One for each process: a report wakes the trainer up, and who has done his part begins with the next batch.
        # The pipe of requests never fills up, it holds five thousand.
        pieces = chunks(samples, min(self._config.threads, max(2000 // self._config.prefetch, 1)), per_thread=1)
        sent = self._sender.submit(partial(self._send, batch, slice(0, len(samples)), pieces))
        wait, cancel = partial(self._wait, batch, sent), partial(self._cancel, batch, sent)
        return Pending(local_batch, images, labels, wait, cancel)

    def _open(self, samples: Ids) -> _Processes:
        size = self._config.size
        shrinks = bool((self._heights[samples] > size).any() or (self._widths[samples] > size).any())
        return _Processes(self._split, self._config, self._buffers.memory, shrinks)

    def _send(self, batch: _UnderWay, rows: slice, pieces: list[slice]) -> None:
        """Asks for these rows of the batch, in pieces."""
        assert self._processes is not None
        samples, wanted = batch.samples[rows], self._buffers.memory.batch(batch.number).rows[rows]
        drawn = self._draw(batch.local_batch.epoch, batch.local_batch.positions[rows], samples)
        wanted["sample"], wanted["entry"] = samples, self._split.index[samples]
        wanted["steps"], wanted["jitter"] = drawn.steps(), drawn.jitter
        for piece in pieces:
            self._processes.request(batch.number, piece)

    def _wait(self, batch: _UnderWay, sent: Future[None]) -> None:
        """Returns when all images are there, those of substitutes too."""
        sent.result()
        while True:
            while batch.missing:
                self._receive()
            if not batch.bad:
                break
            bad, batch.bad = batch.bad, {}
            for row, reply in sorted(bad.items()):
                if reply.kind != FAULT:
                    raise ValueError(reply.text)
                sample = self._faults.substitute(int(batch.samples[row]), SampleError(reply.text))
                batch.samples[row], batch.labels[row] = sample, self._labels[sample]
                batch.missing += 1
                self._send(batch, slice(row, row + 1), [slice(row, row + 1)])
        del self._under_way[batch.number]

    def _cancel(self, batch: _UnderWay, sent: Future[None]) -> None:
        self._buffers.memory.batch(batch.number).cancelled[0] = True
        if sent.cancel() or not batch.missing:
            self._under_way.pop(batch.number, None)

    def _receive(self) -> None:
        """Takes in what the processes have reported, and waits for it if there is nothing."""
        assert self._processes is not None
        for reply in self._processes.receive(self._place):
            batch = self._under_way[reply.number]
            if reply.kind == DONE:
                batch.missing -= reply.stop - reply.start
                if not batch.missing and self._buffers.memory.batch(batch.number).cancelled[0]:
                    del self._under_way[batch.number]
            else:
                batch.bad[reply.start] = reply

    def _place(self) -> str:
        """What the processes are waiting for the longest."""
        reads = [read for read in self._reading.tolist() if read[0]]
        return self._split.where(min(reads)[1]) if reads else "decoding"


class _Processes:
    """The processes of `worker`, and the two pipes to and from them."""

    def __init__(self, split: Split, config: LoaderConfig, memory: Memory, shrinks: bool) -> None:
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        setup = {
            "processes": config.threads,
            "requests": requests,
            "replies": replies,
            "memory": memory.settings,
            "render": {
                "size": config.size, "mean": config.mean, "std": config.std, "jitters": bool(config.color_jitter)
            },
            "shards": [(os.fspath(shard.path), shard.samples, shard.bytes, shard.version) for shard in split.shards],
            "cache_bytes": config.cache_bytes,
            "shrinks": shrinks,
        }  # fmt: skip
        # A Ctrl-C in a terminal, or a SIGTERM to all processes of a job, is meant for the trainer, which still needs
        # batches for the step under way. What is blocked here stays blocked in the processes.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(requests, replies, memory.descriptor),
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(requests)
            os.close(replies)
        self.close = weakref.finalize(self, _close, process, self._requests, self._replies)
        self._received, self._ready = bytearray(), False
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(json.dumps(setup).encode())

    def request(self, number: int, rows: slice) -> None:
        """Asks for these rows of that batch."""
        with contextlib.suppress(BrokenPipeError):  # they have ended, which `receive` reports
            os.write(self._requests, REQUEST.pack(number, rows.start, rows.stop))

    def receive(self, place: Callable[[], str]) -> list[Reply]:
        """Replies, at least one; ValueError if none comes for a minute, waiting at `place`, or a process has ended."""
        found: list[Reply] = []
        while not found:
            # Loading the libraries may take long where they are on a network mount.
            patience = reader.STALL_SECONDS * (1 if self._ready else 10)
            if not select.select([self._replies], [], [], patience)[0]:
                raise reader.stalled(place())
            received = os.read(self._replies, 1 << 16)
            self._received += received
            found = list(take_replies(self._received))
            ended = [reply.text for reply in found if reply.kind == DIED]
            if ended or not received:
                raise ValueError(f"a process that decodes images {(ended or ['could not start'])[0]}")
            self._ready = self._ready or bool(found)
        return [reply for reply in found if reply.kind != READY]


def _close(process: subprocess.Popen[bytes], *descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:  # still loading libraries
        process.kill()
        process.wait()
