"""Shards in, batches out: a data set of tar shards, the exact order of its samples, and loaders that decode them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .order import Order, Part, evaluation_parts
from .reader import OnError
from .shards import Dataset, Split, open_dataset

if TYPE_CHECKING:  # every process of `pipelines.prepare` would spend seconds on it
    import torch

__all__ = [
    "Dataset",
    "Loader",
    "Order",
    "Part",
    "Split",
    "evaluation_parts",
    "open_dataset",
    "open_loader",
    "open_stream",
]

Backend = Literal["dali", "torch", "webdataset", "synthetic"]


class Loader(Protocol):
    """What every backend offers."""

    @property
    def skipped(self) -> dict[int, str]:
        """With on_error="skip": why samples were left out so far, by sample id, on this rank."""

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
    backend: Backend = "dali",
    augmentation: str = "none",
    color_jitter: float = 0.0,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int = 0,
    batch_size: int,
    device: torch.device,
    threads: int = 2,
    prefetch: int = 3,
    on_error: OnError = "stop",
    rank: int | None = None,
    world_size: int | None = None,
) -> Loader:
    """A loader of `split`.

    backend: "dali", "torch" (simplejpeg and OpenCV in threads), "webdataset" (the same on a stream of the shards,
    without the exact order; it alone needs rank and world_size) or "synthetic" (random images); augmentation: a name in
    `pipelines.augment`; color_jitter: largest relative change of brightness, contrast and saturation; size: side of the
    images in pixels; batch_size: the largest part; threads: for reading, and with DALI as many again for decoding;
    prefetch: parts read ahead; on_error: "stop" at a sample that cannot be read or decoded, or "skip" it, the next one
    that can be standing in. ValueError for a bad setting, and from the iteration for bad data.
    """
    for name, value in (("size", size), ("batch_size", batch_size), ("threads", threads), ("prefetch", prefetch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= color_jitter < 1:
        raise ValueError(f"color_jitter must be in 0..1, 1 excluded, got {color_jitter}")
    if backend == "synthetic":
        from .synthetic import SyntheticLoader

        return SyntheticLoader(split, size=size, seed=seed, batch_size=batch_size, device=device)
    settings: dict[str, Any] = {
        "augmentation": augmentation,
        "color_jitter": color_jitter,
        "size": size,
        "mean": mean,
        "std": std,
        "seed": seed,
        "batch_size": batch_size,
        "device": device,
        "threads": threads,
        "prefetch": prefetch,
        "on_error": on_error,
    }
    # Imported here, so that a machine needs the libraries of the backend it uses and no other.
    if backend == "dali":
        try:
            from .dali import DaliLoader
        except ModuleNotFoundError as error:
            raise ValueError(f"backend dali needs the module {error.name}; install it or use torch") from None
        return DaliLoader(split, **settings)
    if backend == "torch":
        try:
            from .indexed import TorchLoader
        except ModuleNotFoundError as error:
            raise ValueError(f"backend torch needs the module {error.name}; install it or use dali") from None
        return TorchLoader(split, **settings)
    if backend == "webdataset":
        if rank is None or world_size is None:
            raise ValueError("backend webdataset needs rank and world_size, by which it deals out the shards")
        if settings.pop("on_error") != "stop":
            raise ValueError("backend webdataset cannot skip samples alike on every rank; set on_error to stop")
        # Whole paths, taken as they are: the library would run a shard of the relative name "pipe:COMMAND.tar".
        paths = [os.path.abspath(shard.path) for shard in split.shards]
        return _webdataset().StreamLoader(paths, rank=rank, world_size=world_size, **settings)  # type: ignore[no-any-return]
    raise ValueError(f"backend must be dali, torch, webdataset or synthetic, got {backend!r}")


def open_stream(
    urls: str | Sequence[str],
    *,
    rank: int,
    world_size: int,
    augmentation: str = "none",
    color_jitter: float = 0.0,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    seed: int = 0,
    batch_size: int,
    device: torch.device,
    threads: int = 2,
    prefetch: int = 3,
    shuffle: int = 2000,
    cache: Path | None = None,
) -> Loader:
    """A loader of shards that are streamed; see `pipelines.webdataset` for what it cannot promise.

    urls: local paths, http(s)://, pipe:COMMAND or what else the webdataset library opens, braces expanded
    ("https://host/train-{0000..0999}.tar"); shuffle: samples in the mixing buffer; cache: folder that keeps a copy of
    what was streamed. The other arguments are those of `open_loader`. Make the parts with Order(samples, ...), samples
    being the number in all shards.
    """
    module = _webdataset()
    return module.StreamLoader(  # type: ignore[no-any-return]
        module.expand(urls),
        rank=rank,
        world_size=world_size,
        shuffle=shuffle,
        cache=cache,
        augmentation=augmentation,
        color_jitter=color_jitter,
        size=size,
        mean=mean,
        std=std,
        seed=seed,
        batch_size=batch_size,
        device=device,
        threads=threads,
        prefetch=prefetch,
    )


def _webdataset() -> ModuleType:
    try:
        from . import webdataset
    except ModuleNotFoundError as error:
        raise ValueError(f"backend webdataset needs the module {error.name}; install it or use dali") from None
    return webdataset
