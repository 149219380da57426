"""The memory of batches, in a file without a name that processes share, and its layout.

Three parts: what each process is reading, and for each batch its rows (what they are to show) and its images.
"""

import mmap
import os
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..format.dataset import INDEX_DTYPE
from .config import LoaderConfig

READING = np.dtype([("since", "<f8"), ("sample", "<i8")])
"""The sample that a process is reading, and since when in seconds of the monotonic clock; 0 if it reads none."""

ROW = np.dtype([("sample", "<i8"), ("entry", INDEX_DTYPE), ("steps", "<i4", 7), ("jitter", "<f4", 3)])
"""A sample, its entry in the index, and its geometry as in `augment.Row`."""


@dataclass
class SharedBatch:
    """A batch in shared memory.

    Attributes:
        rows: what the images are to show, ROW (batch_size,).
        cancelled: whether nobody waits for them any more, bool (1,).
        images: as `Memory` describes them.
    """

    rows: NDArray[Any]
    cancelled: NDArray[np.bool_]
    images: NDArray[Any]


class Memory:
    """Batches in the file of a descriptor, by number.

    Images (batch_size, size, size, 3) are what the device needs: float32, normalized, for a CPU; uint8, a quarter of
    the bytes, for a device that normalizes them itself.

    Attributes:
        settings: what it was made with.
    """

    def __init__(self, descriptor: int, processes: int, batch_size: int, size: int, normalized: bool) -> None:
        self.descriptor = descriptor
        self.settings = {
            "descriptor": descriptor, "processes": processes, "batch_size": batch_size, "size": size,
            "normalized": normalized,
        }  # fmt: skip
        self._batch_size, self._normalized = batch_size, normalized
        self._shape = batch_size, size, size, 3
        self._head_bytes = _pages(processes * READING.itemsize)
        self._rows_bytes = _pages(batch_size * ROW.itemsize + 1)
        self._batch_bytes = self._rows_bytes + _pages(int(np.prod(self._shape)) * (4 if normalized else 1))
        self._processes = processes
        self._batches: list[SharedBatch] = []

    def reading(self) -> NDArray[Any]:
        """What each process is reading, READING (processes,)."""
        self._grow(self._head_bytes)
        return np.frombuffer(mmap.mmap(self.descriptor, self._head_bytes), READING, self._processes)

    def batch(self, number: int) -> SharedBatch:
        """The batch of that number; there is room for it from then on."""
        while len(self._batches) <= number:
            start = self._head_bytes + len(self._batches) * self._batch_bytes
            self._grow(start + self._batch_bytes)
            block = mmap.mmap(self.descriptor, self._batch_bytes, offset=start)
            rows = np.frombuffer(block, ROW, self._batch_size)
            cancelled = np.frombuffer(block, np.bool_, 1, offset=rows.nbytes)
            images = np.frombuffer(block, np.float32 if self._normalized else np.uint8, offset=self._rows_bytes)
            images = images[: int(np.prod(self._shape))].reshape(self._shape)
            self._batches.append(SharedBatch(rows, cancelled, images))
        return self._batches[number]

    def _grow(self, size: int) -> None:
        if os.fstat(self.descriptor).st_size < size:
            os.ftruncate(self.descriptor, size)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def is_normalized(config: LoaderConfig) -> bool:
    """Whether batches are normalized before they are on the device: where it is the CPU."""
    return config.device.type == "cpu"


class Buffers:
    """Batches in memory that is used again once nothing refers to the tensors made of it.

    Fresh memory of this size comes from the kernel page by page, which costs a fifth of the decoding.
    """

    def __init__(self, config: LoaderConfig, normalize: bool = True) -> None:
        """Of bytes, also for a CPU, without `normalize`."""
        descriptor = os.memfd_create("batches", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        normalized = normalize and is_normalized(config)
        self.memory = Memory(descriptor, config.threads, config.batch_size, config.size, normalized)
        self._count, self._free = 0, list[int]()

    def take(self, count: int) -> tuple[int, NDArray[Any]]:
        """The number of a free batch and its first `count` images.

        It is free again when that array dies: tensors keep it alive.
        """
        if not self._free:
            self._free.append(self._count)
            self._count += 1
        number = self._free.pop()
        images = self.memory.batch(number).images[:count]
        weakref.finalize(images, self._free.append, number).atexit = False
        return number, images
