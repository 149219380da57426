"""The backend "torch": our index, positioned reads, simplejpeg and OpenCV in threads, PyTorch only to hold the result.

For machines without DALI, and as an independent check of it. Both libraries release the interpreter lock, so threads
write into one preallocated batch at the same time, and nothing is copied between processes.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray

from . import augment
from .order import Part
from .reader import Faults, Files, OnError, SampleError, Workers, chunks
from .shards import Split

# Each of our threads does its own work; OpenCV's pool would only compete with them.
cv2.setNumThreads(0)

_GROUP = 8
"""Images normalized at a time."""


@dataclass
class _Pending:
    """A batch being written by the threads."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    tasks: list[Future[None]]


class TorchLoader:
    """Batches of one split, decoded by threads; see `pipelines.open_loader` for the arguments."""

    def __init__(
        self,
        split: Split,
        *,
        augmentation: str,
        color_jitter: float,
        size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        seed: int,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int,
        on_error: OnError,
    ) -> None:
        self._split, self._seed, self._size, self._device = split, seed, size, device
        self._augmentation, self._color_jitter = augment.augmentation(augmentation), color_jitter
        self._batch_size, self._threads, self._prefetch = batch_size, threads, prefetch
        self._render = Renderer(size, mean, std, bool(color_jitter))
        self._labels = split.labels
        self._heights, self._widths = split.index["height"], split.index["width"]
        self._files, self._faults = Files(split, threads), Faults(split, on_error)
        self._workers = Workers(threads)
        self._buffers = Buffers((batch_size, 3, size, size))
        self._iteration = 0

    @property
    def skipped(self) -> dict[int, str]:
        """Why samples were left out, by id (on_error="skip")."""
        return self._faults.skipped

    def batches(self, parts: Iterable[Part]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) of each part; an earlier, unfinished iteration of this loader ends by this call."""
        self._iteration += 1
        return self._batches(iter(parts), self._iteration)

    def close(self) -> None:
        """Ends the threads."""
        self._iteration += 1
        self._workers.close()

    def _batches(self, parts: Iterator[Part], iteration: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pending: deque[_Pending] = deque()
        try:
            while True:
                if iteration != self._iteration:
                    raise RuntimeError("this iteration ended when another one of the loader began, or it was closed")
                while len(pending) < self._prefetch and (part := next(parts, None)) is not None:
                    pending.append(self._start(part))
                if not pending:
                    return
                batch = pending.popleft()
                for task in batch.tasks:
                    self._files.gather(task)
                images, labels = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
                del batch
                yield images.to(self._device), labels.to(self._device)
                del images, labels
        finally:
            for batch in pending:
                for task in batch.tasks:
                    task.cancel()

    def _start(self, part: Part) -> _Pending:
        if len(part.samples) > self._batch_size:
            raise ValueError(f"batch_size must hold the largest part, got {self._batch_size} and {len(part.samples)}")
        batch = _Pending(self._buffers.take(len(part.samples)), self._labels[part.samples], [])
        # For the whole part, in the first free thread: a draw costs as much for a few samples as for many.
        geometry = self._workers.submit(partial(self._draw, part.epoch, part.positions, part.samples))
        for piece in chunks(part.samples, self._threads):
            fill = partial(self._fill, part, piece, geometry, batch.images[piece], batch.labels[piece])
            batch.tasks.append(self._workers.submit(fill))
        return batch

    def _fill(
        self,
        part: Part,
        piece: slice,
        geometry: Future[list[augment.Row]],
        images: NDArray[np.float32],
        labels: NDArray[np.int64],
    ) -> None:
        samples, positions, rows = part.samples[piece].tolist(), part.positions[piece], geometry.result()[piece]

        def paint(row: int, pixels: NDArray[np.uint8]) -> None:
            sample, drawn = samples[row], rows[row]
            while True:
                try:
                    return self._paint(sample, drawn, pixels)
                except SampleError as error:
                    sample = self._faults.substitute(sample, error)
                    labels[row] = self._labels[sample]
                    (drawn,) = self._draw(part.epoch, positions[row : row + 1], np.array([sample]))

        self._render.batch(images, paint)

    def _paint(self, sample: int, drawn: augment.Row, pixels: NDArray[np.uint8]) -> None:
        encoded = self._files.read(sample)
        try:
            self._render.decode(encoded, drawn, pixels)
        except SampleError as error:
            raise SampleError(f"cannot decode {self._split.where(sample)}: {error}") from None

    def _draw(self, epoch: int, positions: NDArray[np.int64], samples: NDArray[np.int64]) -> list[augment.Row]:
        heights, widths = self._heights[samples], self._widths[samples]
        geometry = augment.draw(self._augmentation, self._seed, epoch, positions, heights, widths, self._color_jitter)
        return geometry.rows()


class Renderer:
    """Carries out the steps of `pipelines.augment` on images, in any number of threads."""

    def __init__(
        self, size: int, mean: tuple[float, float, float], std: tuple[float, float, float], jitters: bool
    ) -> None:
        self._size, self._jitters = size, jitters
        levels = np.arange(256, dtype=np.float64) / 255
        # Normalization by table: exact, and one pass with the conversion to float.
        self._tables = [((levels - m) / s).astype(np.float32) for m, s in zip(mean, std, strict=True)]
        self._whole = [size, size, 0, 0, 0]
        self._local = threading.local()

    def batch(self, out: NDArray[np.float32], paint: Callable[[int, NDArray[np.uint8]], None]) -> None:
        """Writes the normalized images to `out`, (B, 3, size, size); paint(row, pixels) fills uint8 (size, size, 3).

        A few images are normalized at a time: every call into a library lets another thread take the interpreter lock,
        and waiting for it again costs more than a small image's pixels.
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
        """Writes the sample so drawn to `pixels`, uint8 (size, size, 3); SampleError if it cannot be decoded."""
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


def decode(encoded: bytes) -> Any:
    """RGB pixels, uint8 (H, W, 3), of a JPEG or PNG; stored orientation, alpha dropped. SampleError if it cannot."""
    try:
        if encoded[:2] == b"\xff\xd8":
            return simplejpeg.decode_jpeg(encoded)
    except ValueError:
        pass  # OpenCV judges as DALI does: what is cut short is an error, a damaged segment is not
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise SampleError(str(error)) from None
    if image is None:
        raise SampleError("truncated, damaged, or no image")
    return image


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
