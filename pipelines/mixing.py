"""mixup, CutMix and random erasing: changes of a whole batch, on its device, whichever backend decoded it.

The samples at the positions 2i and 2i + 1 of an epoch's order, which is random, are a pair. Images are erased each by
itself, then those of a pair are mixed with each other, with equal and opposite shares: what one gives the other takes,
in pixels and in labels. The size of a sub-batch is even, so a pair never leaves it. The numbers depend on (seed, epoch,
position) alone, so batches are the same at any world size and after any resume.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .augment import box_shapes, uniform
from .loaders.base import to_device
from .loaders.config import Batch, Loader
from .random_streams import Stream
from .sampler import LocalBatch

_ERASED_AREA, _ERASED_RATIO = (0.02, 1 / 3), (0.3, 10 / 3)
"""Of the image, from and to; width to height (Zhong et al. 2020)."""


@dataclass(frozen=True)
class Mixing:
    """What is done to the images and labels of a batch at random."""

    mixup: float
    """α of the Beta(α, α) from which a pair's share is drawn (Zhang et al. 2018); 0: no mixup."""
    cutmix: float
    """The same for CutMix (Yun et al. 2019). Where both are given, either takes half of the pairs."""
    erasing: float
    """Share of the images in which a box takes the mean colour (Zhong et al. 2020)."""
    seed: int
    classes: int
    unit: int
    """Samples that stay together on one rank, an even number; a global batch that is no multiple of it is not mixed."""

    def __call__(self, local_batch: LocalBatch, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The batch, changed; its tensors stay as they are.

        Args:
            local_batch: which samples they are.
            images: float32 (B, 3, H, W), normalized, so that 0 is the mean colour.
            labels: int64 (B,).

        Returns:
            Images (B, 3, H, W), channels_last; labels, with mixup or CutMix as probabilities, float32 (B, classes).
        """
        draws = uniform(self.seed, local_batch.epoch, local_batch.positions, Stream.MIXING)
        size = images.shape[2], images.shape[3]
        if self.erasing:
            inside = _inside(to_device(images.device, _erased_boxes(draws, self.erasing, size)), size)
            images = images.masked_fill(inside, 0.0)
        if self.mixup or self.cutmix:
            labels = F.one_hot(labels, self.classes).float()
            if local_batch.global_size % self.unit == 0 and len(labels):
                assert local_batch.positions[0] % 2 == 0
                boxes, shares = self._pairs(draws[::2], size)
                images, labels = _mixed(images, labels, boxes, shares)
        return images.contiguous(memory_format=torch.channels_last), labels

    def _pairs(
        self, draws: NDArray[np.float64], size: tuple[int, int]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Of each pair the box that its images exchange, and the share of itself that an image keeps outside of it."""
        cut = draws[:, 24] < 0.5 if self.mixup and self.cutmix else np.full(len(draws), self.cutmix > 0)
        shares = np.where(cut, _beta(self.cutmix or 1.0, draws[:, 25:27]), _beta(self.mixup or 1.0, draws[:, 25:27]))
        side = np.sqrt(1 - shares)[:, None] * size
        half = np.where(cut[:, None], side, 0).astype(np.int32) // 2
        centre = np.floor(draws[:, 27:29] * size).astype(np.int32)
        boxes = np.concatenate([np.maximum(centre - half, 0), np.minimum(centre + half, size)], axis=1)
        return boxes.astype(np.int32), np.where(cut, 1.0, shares).astype(np.float32)


class MixedLoader:
    """The batches of a loader, mixed."""

    def __init__(self, loader: Loader, mixing: Mixing) -> None:
        self._loader, self._mixing = loader, mixing

    @property
    def skipped(self) -> dict[int, str]:
        """Of the loader."""
        return self._loader.skipped

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """Of the loader, with the labels that `Mixing` returns."""
        found = self._loader.batches(local_batches)
        return ((batch, *self._mixing(batch, images, labels)) for batch, images, labels in found)

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()


def _mixed(
    images: Tensor, labels: Tensor, boxes: NDArray[np.int32], shares: NDArray[np.float32]
) -> tuple[Tensor, Tensor]:
    height, width = images.shape[2:]
    device = images.device
    others = to_device(device, np.arange(len(labels)) ^ 1)
    inside = _inside(to_device(device, np.repeat(boxes, 2, axis=0)), (height, width))
    kept = to_device(device, np.repeat(shares, 2))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / (height * width)
    share = to_device(device, np.repeat((shares * (1 - area)).astype(np.float32), 2))[:, None]
    weight = kept[:, None, None, None] * ~inside
    return images * weight + images[others] * (1 - weight), labels * share + labels[others] * (1 - share)


def _erased_boxes(draws: NDArray[np.float64], probability: float, size: tuple[int, int]) -> NDArray[np.int32]:
    """Top, left, bottom, right of each image's box, (B, 4); empty where none is erased."""
    sides = np.full((len(draws), 2), size, np.int32)
    shape = box_shapes(_ERASED_AREA, _ERASED_RATIO, sides, draws[:, 4:14], draws[:, 14:24])
    shape[draws[:, 0] >= probability] = 0
    first = np.floor(draws[:, 1:3] * (sides - shape + 1)).astype(np.int32)
    return np.concatenate([first, first + shape], axis=1)


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether a pixel is inside the box of its image, bool (B, 1, H, W)."""
    along = [
        (torch.arange(side, device=boxes.device) >= boxes[:, axis, None])
        & (torch.arange(side, device=boxes.device) < boxes[:, 2 + axis, None])
        for axis, side in enumerate(size)
    ]
    return (along[0][:, :, None] & along[1][:, None, :])[:, None]


def _beta(alpha: float, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers of the distribution Beta(α, α), from two uniform ones each (Devroye 1996)."""
    with np.errstate(divide="ignore", over="ignore"):
        cosine = np.cos(2 * np.pi * draws[:, 1])
        odds: NDArray[np.float64] = np.expm1(-np.log1p(-draws[:, 0]) / alpha)
        return 0.5 + 0.5 * cosine / np.sqrt(1 / odds + cosine**2)  # type: ignore[no-any-return]
