"""What several backends have in common."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import augment
from ..format import Split
from ..sampler import Ids, LocalBatch
from .config import Batch, LoaderConfig
from .reader import Faults


class Iterations:
    """A loader has one iteration at a time: a new one, or closing the loader, ends the one before."""

    def __init__(self) -> None:
        self._current = 0

    def begin(self) -> Callable[[], None]:
        """Starts an iteration; returns a check that raises RuntimeError once the iteration has ended."""
        self._current += 1
        number = self._current

        def check() -> None:
            if number != self._current:
                raise RuntimeError("this iteration ended when another one of the loader began, or it was closed")

        return check

    def end(self) -> None:
        """Ends the iteration, if there is one."""
        self._current += 1


class IndexedLoader:
    """Reads the samples that a local batch names, by the index of the split."""

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        self._split, self._config = split, config
        self._augmentation = augment.augmentation(config.augmentation)
        self._labels = split.labels
        self._heights, self._widths = split.index["height"], split.index["width"]
        self._faults = Faults(split, config.on_error)
        self._iterations = Iterations()

    @property
    def skipped(self) -> dict[int, str]:
        """Why samples were skipped, by id (on_error="skip")."""
        return self._faults.skipped

    def _draw(self, epoch: int, positions: Ids, samples: Ids) -> augment.Geometry:
        heights, widths = self._heights[samples], self._widths[samples]
        seed, color_jitter = self._config.seed, self._config.color_jitter
        return augment.draw(self._augmentation, seed, epoch, positions, heights, widths, color_jitter)


def check_size(local_batch: LocalBatch, config: LoaderConfig) -> None:
    """ValueError if the local batch does not fit into the memory of a batch."""
    if len(local_batch.samples) > config.batch_size:
        raise ValueError(
            f"batch_size must hold the largest local batch, got {config.batch_size} and {len(local_batch.samples)}"
        )


@dataclass
class Pending:
    """A batch that is being written: `wait` for it, or `cancel` what has not begun.

    Attributes:
        images: as `memory.Memory` describes them.
    """

    local_batch: LocalBatch
    images: NDArray[Any]
    labels: NDArray[np.int64]
    wait: Callable[[], None]
    cancel: Callable[[], object]


def batches_in_order(
    local_batches: Iterator[LocalBatch],
    config: LoaderConfig,
    start: Callable[[LocalBatch], Pending],
    check: Callable[[], None],
    tables: NDArray[np.float32] | None,
) -> Iterator[Batch]:
    """Each local batch with its images and labels, `config.prefetch` of them started ahead of use.

    Args:
        start: begins a batch.
        check: raises if this iteration has ended.
        tables: of the normalization, (256, 3); None: images of bytes stay as they are.
    """
    pending: deque[Pending] = deque()
    normalization = None if tables is None else torch.from_numpy(tables).to(config.device)
    try:
        while True:
            check()
            while len(pending) < config.prefetch and (following := next(local_batches, None)) is not None:
                check_size(following, config)
                pending.append(start(following))
            if not pending:
                return
            batch = pending.popleft()
            try:
                batch.wait()
            except BaseException:
                batch.cancel()
                raise
            local_batch = batch.local_batch
            images, labels = (to_device(config.device, values) for values in (batch.images, batch.labels))
            del batch  # nothing may refer to the memory but the caller's tensors
            if normalization is not None:
                images = (
                    normalized(images, normalization) if images.dtype == torch.uint8 else images.permute(0, 3, 1, 2)
                )
            yield local_batch, images, labels
            del images, labels
    finally:
        for batch in pending:
            batch.cancel()


def to_device(device: torch.device, values: NDArray[Any]) -> torch.Tensor:
    """The values on the device, for which nobody waits; on a CPU they share their memory."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        # PyTorch does not use pinned memory again before the copies from it have ended: nobody has to wait for them.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def normalized(pixels: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """float32 (B, 3, H, W) of uint8 (B, H, W, 3), by the tables (256, 3): to the last bit as on a CPU."""
    places = torch.add(torch.arange(3, dtype=torch.int32, device=pixels.device), pixels, alpha=3)
    return tables.flatten().index_select(0, places.flatten()).view(places.shape).permute(0, 3, 1, 2)
