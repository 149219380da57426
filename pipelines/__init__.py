"""Shards in, batches out: a data set of tar shards, the exact order of its samples, and loaders that decode them."""

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import torch

from .order import Order, Part, evaluation_parts
from .shards import Dataset, Split, open_dataset

__all__ = ["Dataset", "Loader", "Order", "Part", "Split", "evaluation_parts", "open_dataset", "open_loader"]


class Loader(Protocol):
    """What every backend offers."""

    def batches(self, parts: Iterable[Part]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each part, images float32 (B, 3, size, size), (x/255 - mean)/std, and labels int64 (B,), on the device.

        Parts are taken a few ahead of use. The tensors belong to the caller. May be called again and again; a call ends
        an earlier iteration that was left midway.
        """

    def close(self) -> None:
        """Ends threads and frees memory."""


def open_loader(
    split: Split,
    *,
    backend: Literal["dali"] = "dali",
    augmentation: str = "none",
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int = 0,
    batch_size: int,
    device: torch.device,
    threads: int = 2,
    prefetch: int = 3,
    on_error: Literal["stop"] = "stop",
) -> Loader:
    """A loader of `split`.

    augmentation: a name in `pipelines.augment`; size: side of the images in pixels; batch_size: the largest part;
    threads: for reading, and again for decoding; prefetch: parts read ahead. ValueError for a bad setting, and from the
    iteration for a sample that cannot be read or decoded.
    """
    for name, value in (("size", size), ("batch_size", batch_size), ("threads", threads), ("prefetch", prefetch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if on_error != "stop":
        raise ValueError(f"on_error must be stop, got {on_error!r}")
    if backend == "dali":
        from .dali import DaliLoader

        return DaliLoader(
            split,
            augmentation=augmentation,
            size=size,
            mean=mean,
            std=std,
            seed=seed,
            batch_size=batch_size,
            device=device,
            threads=threads,
            prefetch=prefetch,
        )
    raise ValueError(f"backend must be dali, got {backend!r}")
