"""Encoded images become the rows of a batch: decoded, augmented and normalized with simplejpeg and OpenCV."""

import threading
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from .. import augment
from .config import Triple
from .decode import decode
from .reader import SampleError

_GROUP = 8
"""Images normalized at a time."""


def normalization(mean: Triple, std: Triple) -> NDArray[np.float32]:
    """What each level of each channel becomes, float32 (256, 3): exact, and one pass with the conversion to float."""
    levels = np.arange(256, dtype=np.float64) / 255
    return np.stack([((levels - m) / s).astype(np.float32) for m, s in zip(mean, std, strict=True)], axis=1)


class Renderer:
    """The steps of `pipelines.augment` on images, for use from any number of threads."""

    def __init__(self, size: int, mean: Triple, std: Triple, jitters: bool) -> None:
        self._size, self._jitters = size, jitters
        self._table = normalization(mean, std)[None]
        self._whole = [size, size, 0, 0, 0]
        self._local = threading.local()

    def batch(self, out: NDArray[Any], paint: Callable[[int, NDArray[np.uint8]], None]) -> None:
        """Fills a batch; paint(row, pixels) fills uint8 (size, size, 3).

        Args:
            out: (B, size, size, 3): normalized images float32, or pixels as they are, uint8.
            paint: called for one row after the other.
        """
        if out.dtype == np.uint8:
            for row in range(len(out)):
                paint(row, out[row])
            return
        # A few images are normalized at a time: every call into a library lets another thread take the interpreter
        # lock, and waiting for it again costs more than the pixels of a small image.
        size, local = self._size, self._local
        if not hasattr(local, "pixels"):
            local.pixels = np.empty((_GROUP, size, size, 3), np.uint8)
        pixels = local.pixels
        for start in range(0, len(out), _GROUP):
            group = out[start : start + _GROUP]
            count = len(group)
            for row in range(count):
                paint(start + row, pixels[row])
            flat = count, size * size, 3
            cv2.LUT(pixels[:count].reshape(flat), self._table, dst=group.reshape(flat))

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
    # OpenCV has no antialiased bilinear filter; PyTorch's works on channels-last bytes. Loading it takes seconds, which
    # a process that shrinks nothing does without.
    import torch

    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
