"""The backend "synthetic": random images, for measuring everything else."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from ..format import Split
from ..random_streams import Stream, torch_seed
from ..sampler import LocalBatch
from .base import to_device
from .config import Batch, LoaderConfig


class SyntheticLoader:
    """One random normal batch, made once; each local batch gets a slice of it, with the true labels of its samples.

    It costs next to nothing, so a run with it shows what a run would be if data were free. Do not write to it.
    """

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        generator = torch.Generator().manual_seed(torch_seed(Stream.SYNTHETIC, config.seed))
        shape = config.batch_size, 3, config.size, config.size
        images = torch.randn(shape, generator=generator)
        self._images = images.to(config.device, memory_format=torch.channels_last)
        self._labels, self._device = split.labels, config.device
        self.skipped: dict[int, str] = {}

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """(local_batch, images, labels) of each local batch."""
        for local_batch in local_batches:
            labels = to_device(self._device, self._labels[local_batch.samples].astype(np.int64))
            yield local_batch, self._images[: len(labels)], labels

    def close(self) -> None:
        """Nothing to end."""
