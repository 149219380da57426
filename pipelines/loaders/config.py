"""What a loader is given and what it offers, whichever backend it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, get_args

from ..augment import augmentation
from ..sampler import LocalBatch

if TYPE_CHECKING:  # importing PyTorch takes seconds, which the processes of `pipelines.prepare` do without
    import torch

Backend = Literal["dali", "torch", "resident", "webdataset", "synthetic"]
OnError = Literal["stop", "skip"]
Triple: TypeAlias = tuple[float, float, float]
Batch: TypeAlias = "tuple[LocalBatch, torch.Tensor, torch.Tensor]"


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a split becomes batches. ValueError for a value that makes no sense."""

    backend: Backend = "dali"
    """torch is simplejpeg and OpenCV in processes; resident decodes so once, and keeps all images on the device, for
    augmentations that only flip and shift; webdataset decodes in threads, without the exact order, on a stream of the
    shards (rank and world_size are for it); synthetic is random images."""
    augmentation: str = "none"
    """A name in `pipelines.augment.AUGMENTATIONS`."""
    color_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation, in [0, 1)."""
    size: int
    """Side of the images in pixels."""
    mean: Triple
    """Per RGB channel, of pixels in 0..1."""
    std: Triple
    """The same."""
    seed: int = 0
    """Of the augmentation."""
    batch_size: int
    """Samples in the largest local batch."""
    device: torch.device
    """Where the tensors are."""
    threads: int = 2
    """That read and decode: threads, with dali as many of each; processes with torch."""
    prefetch: int = 3
    """Batches read ahead."""
    cache_bytes: int = 0
    """Largest size of the local copies of what is read from shards at URLs, below XDG_CACHE_HOME, for all processes of
    this user; 0: none."""
    on_error: OnError = "stop"
    """Stop at a sample that cannot be read or decoded, or skip it: the next one that can be takes its place."""
    rank: int = 0
    """Of this process; decides which shards the backend webdataset reads."""
    world_size: int = 1
    """Number of ranks. Pass it: with the default, every rank of the backend webdataset reads all shards."""
    local_size: int = 1
    """Number of ranks on this machine: on a CPU, each of the backend resident may take its share of the memory."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("backend", self.backend, get_args(Backend)),
            ("on_error", self.on_error, get_args(OnError)),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")
        augmentation(self.augmentation)
        for name, number, least in (
            ("size", self.size, 1),
            ("batch_size", self.batch_size, 1),
            ("threads", self.threads, 1),
            ("prefetch", self.prefetch, 1),
            ("cache_bytes", self.cache_bytes, 0),
            ("world_size", self.world_size, 1),
            ("local_size", self.local_size, 1),
            ("seed", self.seed, 0),
        ):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"color_jitter must be in 0..1, 1 excluded, got {self.color_jitter}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in 0..{self.world_size - 1}, got {self.rank}")
        if self.backend == "webdataset" and self.on_error != "stop":
            raise ValueError("backend webdataset cannot skip samples alike on every rank; set on_error to stop")


class Loader(Protocol):
    """What every backend offers."""

    @property
    def skipped(self) -> dict[int, str]:
        """With on_error="skip": why samples were skipped so far, by sample id, on this rank."""

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """Each local batch with its images and labels, on the device.

        Local batches are taken a few ahead of use. The tensors belong to the caller. May be called again and again; a
        call ends an earlier iteration that was not finished.

        Yields:
            The local batch; images float32 (B, 3, size, size), (x/255 - mean)/std, in the memory format channels_last,
            in which convolutions are faster; labels int64 (B,).

        Raises:
            ValueError: bad data, with the shard and the sample; or a local batch larger than `batch_size`.
        """

    def close(self) -> None:
        """Ends threads and frees memory."""
