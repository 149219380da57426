"""Encoded images by sample id: positioned reads from the shards, a few threads ahead of use.

Messages have the shard and the sample. A fault of one sample is a SampleError, which `on_error="skip"` survives; a
fault of a whole shard (missing, truncated, replaced, stalled) always ends the iteration.
"""

import errno
import io
import os
import queue
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from itertools import pairwise
from typing import TypeAlias, TypeVar

from PIL import Image

from ..format import Split
from ..format.dataset import check_shard
from ..format.image_header import MAX_PIXELS, sides
from ..format.jpeg import is_plain
from ..format.remote import Url
from ..format.remote_shards import RemoteShards
from ..format.tar import number
from ..sampler import Ids
from .config import OnError

T = TypeVar("T")

_Tasks: TypeAlias = "queue.SimpleQueue[Callable[[], None] | None]"

_HEADER_BYTES = 512
STALL_SECONDS = 60
_OPEN_FILES = 256  # over all threads of a reader; the usual limit of a process is 1024
_CONNECTIONS = 16


class SampleError(ValueError):
    """One sample cannot be read or decoded; the rest of the shard can."""


class Workers:
    """A few daemon threads. Unlike an executor's they never keep a process from ending while a read hangs."""

    def __init__(self, threads: int) -> None:
        self._tasks: _Tasks = queue.SimpleQueue()
        running = [threading.Thread(target=_work, args=(self._tasks,), daemon=True) for _ in range(threads)]
        for thread in running:
            thread.start()
        # Also when the process ends: a daemon thread caught inside a library then can bring the process down.
        self._end = weakref.finalize(self, _end, self._tasks, running)

    def submit(self, function: Callable[[], T]) -> "Future[T]":
        """Runs the function in one of the threads."""
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
        """Ends the threads once the tasks before are done; waits for them a second each, no longer."""
        self._end()


def _work(tasks: _Tasks) -> None:
    while (task := tasks.get()) is not None:
        task()
        del task  # it holds its result, and so a batch, until the next one comes


def _end(tasks: _Tasks, threads: list[threading.Thread]) -> None:
    for _ in threads:
        tasks.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=1)


class Files:
    """Reads samples of one split with at most 256 open descriptors; for use from `threads` threads.

    A shard is checked against the index when it is opened, and every sample against the tar header before it, so that a
    shard replaced under a running job is detected.
    """

    def __init__(self, split: Split, threads: int, cache_bytes: int = 0) -> None:
        """`cache_bytes` is the largest size of the local copies of what was read from URLs; 0: none are kept."""
        self._split = split
        self._remote = RemoteShards(split.shards, cache_bytes)
        self._limit = max(_OPEN_FILES // threads, 1)
        self._local = threading.local()
        self._reading: dict[int, tuple[float, int]] = {}

    def read(self, sample: int) -> bytes:
        """The encoded image of `sample`."""
        offset, size, shard, _, height, width = self._split.index[sample].item()
        thread = threading.get_ident()
        self._reading[thread] = (time.monotonic(), sample)
        try:
            if isinstance(self._split.shards[shard].path, Url):
                block = self._remote.read(shard, offset - _HEADER_BYTES, offset + size)
            else:
                block = os.pread(self._open(shard), _HEADER_BYTES + size, offset - _HEADER_BYTES)
        except OSError as error:
            kind = SampleError if error.errno == errno.EIO else ValueError
            raise kind(f"cannot read {self._split.where(sample)}: {error.strerror}") from error
        finally:
            del self._reading[thread]
        # The field of the tar header with the size of the member.
        if len(block) != _HEADER_BYTES + size or number(block[124:136]) != size:
            raise SampleError(
                f"index and shard disagree at {self._split.where(sample)}: the shard was changed; "
                "restore it or prepare the data set again"
            )
        if not size:
            raise SampleError(f"zero bytes: {self._split.where(sample)}")
        image = block[_HEADER_BYTES:]
        try:
            found = refuse_bomb(image)
            if 0 in found:
                raise SampleError("no size in its header: truncated, damaged, or no image")
            if found != (height, width):
                raise SampleError(f"it is {found[0]} x {found[1]} by its header, {height} x {width} in the index")
        except SampleError as error:
            raise SampleError(f"cannot decode {self._split.where(sample)}: {error}") from None
        return image

    def read_plain(self, sample: int) -> bytes:
        """The same in a form that every decoder decodes alike, see `plain`."""
        encoded = self.read(sample)
        try:
            return plain(encoded)
        except SampleError as error:
            raise SampleError(f"cannot decode {self._split.where(sample)}: {error}") from None

    def gather(self, future: "Future[T]") -> T:
        """The result of a task that reads; ValueError when it takes longer than a minute."""
        try:
            return future.result(timeout=STALL_SECONDS)
        except TimeoutError:
            reads = list(self._reading.values())
            raise stalled(self._split.where(min(reads)[1]) if reads else "decoding") from None

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


def reading_threads(split: Split, threads: int) -> int:
    """How many threads of a loader read: those that decode; 16 or more where shards are at URLs, which answer late."""
    return max(threads, _CONNECTIONS) if any(isinstance(shard.path, Url) for shard in split.shards) else threads


def stalled(place: str) -> ValueError:
    """The error of a read that takes longer than a minute."""
    return ValueError(f"no sample came for {STALL_SECONDS} s, waiting at {place}; is a disk or network mount stalled?")


def refuse_bomb(encoded: bytes) -> tuple[int, int]:
    """Height and width by the header; SampleError if that is more than MAX_PIXELS, whatever decodes it afterwards.

    A header without a size, 0 x 0, passes: decoders refuse it too.
    """
    height, width = sides(encoded)
    if height * width > MAX_PIXELS:
        raise SampleError(f"{height} x {width} pixels, more than {MAX_PIXELS}")
    return height, width


def plain(encoded: bytes) -> bytes:
    """The image as it is, or where decoders would decode it differently the pixels that Pillow does, as a PNG.

    That is a JPEG of an uncommon kind, among them those that DALI refuses for stray bytes between their segments, and
    CMYK without Adobe's marker, which DALI takes for inverted. SampleError if Pillow cannot decode it.
    """
    if encoded[:2] != b"\xff\xd8" or is_plain(encoded):
        return encoded
    buffer = io.BytesIO()
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.convert("RGB").save(buffer, "PNG", compress_level=1, icc_profile=None)
    except Exception as error:  # a decoder fed with damaged bytes may raise nearly anything
        raise SampleError(f"truncated, damaged, or no image ({' '.join(str(error).split())})") from None
    return buffer.getvalue()


class Faults:
    """Substitutes for samples that cannot be read or decoded.

    stop: its error is raised. skip: the next sample (by id, from the start again after the last) that can be decoded
    takes its place. The substitute depends on the data alone, so all ranks have as many steps and any world size trains
    on the same images. skipped: why samples were skipped so far, by sample id. More than one in a hundred is an error.
    """

    def __init__(self, split: Split, on_error: OnError) -> None:
        self._samples, self._on_error = len(split), on_error
        self.skipped: dict[int, str] = {}
        self._lock = threading.Lock()

    def substitute(self, sample: int, error: SampleError) -> int:
        """The sample to try in place of `sample`; raises if there is none."""
        if self._on_error == "stop":
            raise error
        limit = max(self._samples // 100, min(10, self._samples - 1))
        with self._lock:  # threads that fail together report the same count
            if len(self.skipped) <= limit:
                self.skipped[sample] = str(error)
        if len(self.skipped) > limit:
            raise ValueError(
                f"{len(self.skipped)} of {self._samples} samples cannot be decoded, more than on_error=skip allows; "
                f"the last: {error}; see which with: python -m pipelines.verify"
            )
        return (sample + 1) % self._samples


def chunks(samples: Ids, threads: int, per_thread: int = 4) -> list[slice]:
    """A batch in pieces, a few per thread so that the threads finish together."""
    pieces = max(min(len(samples), per_thread * threads), 1)
    bounds = [len(samples) * piece // pieces for piece in range(pieces + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds) if start < stop]


class _File:
    """A descriptor that is closed with its last reference, also when its thread ends."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)
