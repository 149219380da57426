"""Batches that threads write, with OpenCV and simplejpeg, into NumPy arrays.

Both libraries release the interpreter lock, so threads write into one preallocated batch at the same time, and nothing
is copied between processes.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from .. import augment
from ..sampler import LocalBatch
from .base import check_size
from .config import Batch, LoaderConfig, Triple
from .decode import decode
from .reader import SampleError

_GROUP = 8
"""Images normalized at a time."""


@dataclass
class Pending:
    """A batch that threads are writing: `wait` for it, or `cancel` what has not begun."""

    local_batch: LocalBatch
    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    wait: Callable[[], None]
    cancel: Callable[[], object]


def batches_in_order(
    local_batches: Iterator[LocalBatch],
    config: LoaderConfig,
    start: Callable[[LocalBatch], Pending],
    check: Callable[[], None],
) -> Iterator[Batch]:
    """Each local batch with its images and labels, `config.prefetch` of them started ahead of use.

    Args:
        start: begins a batch.
        check: raises if this iteration has ended.
    """
    pending: deque[Pending] = deque()
    try:
        while True:
            check()
            while len(pending) < config.prefetch and (following := next(local_batches, None)) is not None:
                check_size(following, config)
                pending.append(start(following))
            if not pending:
                return
            batch = pending.popleft()
            batch.wait()
            local_batch = batch.local_batch
            images, labels = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
            del batch  # nothing may refer to the memory but the caller's tensors
            yield local_batch, images.to(config.device), labels.to(config.device)
            del images, labels
    finally:
        for batch in pending:
            batch.cancel()


class Renderer:
    """The steps of `pipelines.augment` on images, for use from any number of threads."""

    def __init__(self, size: int, mean: Triple, std: Triple, jitters: bool) -> None:
        self._size, self._jitters = size, jitters
        levels = np.arange(256, dtype=np.float64) / 255
        # Normalization by table: exact, and one pass with the conversion to float.
        self._tables = [((levels - m) / s).astype(np.float32) for m, s in zip(mean, std, strict=True)]
        self._whole = [size, size, 0, 0, 0]
        self._local = threading.local()

    def batch(self, out: NDArray[np.float32], paint: Callable[[int, NDArray[np.uint8]], None]) -> None:
        """Writes the normalized images to `out`, (B, 3, size, size); paint(row, pixels) fills uint8 (size, size, 3).

        A few images are normalized at a time: every call into a library lets another thread take the interpreter lock,
        and waiting for it again costs more than the pixels of a small image.
        """
        size, local = self._size, self._local
        if not hasattr(local, "pixels"):
            local.pixels = np.empty((_GROUP, size, size, 3), np.uint8)
            local.planes = [np.empty((_GROUP, size * size), np.uint8) for _ in range(3)]
        pixels = local.pixels
        for start in range(0, len(out), _GROUP):
            group = out[start : start + _GROUP]
            count = len(group)
            for row in range(count):
                paint(start + row, pixels[row])
            channels = [plane[:count] for plane in local.planes]
            cv2.split(pixels[:count].reshape(count, size * size, 3), channels)
            for channel, (plane, table) in enumerate(zip(channels, self._tables, strict=True)):
                cv2.LUT(plane, table, dst=group[:, channel].reshape(count, size * size))

    def decode(self, encoded: bytes, drawn: augment.Row, pixels: NDArray[np.uint8]) -> None:
        """Writes the augmented sample to `pixels`, uint8 (size, size, 3); SampleError if it cannot be decoded."""
        if not self._jitters and drawn.steps[2:] == self._whole:
            try:
                if simplejpeg.decode_jpeg(encoded, buffer=pixels).shape == pixels.shape:
                    return
            except ValueError:  # damaged, larger, or no JPEG
                pass
        self.place(decode(encoded), drawn, pixels)

    def place(self, image: Any, drawn: augment.Row, pixels: NDArray[np.uint8]) -> None:
        """The same from decoded RGB pixels, uint8 (H, W, 3)."""
        size = self._size
        (y, x, height, width, down, right, mirror), jitter = drawn
        image = image[y : y + height, x : x + width]
        if image.shape[:2] != (height, width):
            raise SampleError("it is smaller than the index says")
        if (height, width) != (size, size):
            image = _resize(image, size)
        if self._jitters:
            image = cv2.transform(image, augment.color_map(jitter))
        if not (down or right):
            if mirror:
                cv2.flip(image, 1, dst=pixels)
            else:
                pixels[:] = image
            return
        if mirror:
            image, right = cv2.flip(image, 1), -right
        pixels.fill(0)
        pixels[max(-down, 0) : size - max(down, 0), max(-right, 0) : size - max(right, 0)] = image[
            max(down, 0) : size - max(-down, 0), max(right, 0) : size - max(-right, 0)
        ]


def _resize(image: Any, size: int) -> Any:
    if image.shape[0] <= size and image.shape[1] <= size:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    # OpenCV has no antialiased bilinear filter; PyTorch's works on channels-last bytes.
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


class Buffers:
    """Batches in memory that is used again once nothing refers to the tensors made of it.

    Fresh memory of this size comes from the kernel page by page, which costs a fifth of the decoding.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._free: list[NDArray[np.float32]] = []

    def take(self, count: int) -> NDArray[np.float32]:
        """The first `count` rows of a free buffer, which is free again when this array dies: tensors keep it alive."""
        buffer = self._free.pop() if self._free else np.empty(self._shape, np.float32)
        loan = buffer[:count]
        weakref.finalize(loan, self._free.append, buffer).atexit = False
        return loan
