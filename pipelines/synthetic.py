"""The backend "synthetic": random images, for measuring everything else."""

from collections.abc import Iterable, Iterator

import torch

from .order import Part
from .shards import Split


class SyntheticLoader:
    """One random normal batch, made once; each part gets a slice of it, with the true labels of its samples.

    It costs next to nothing, so a run with it shows what a run would be if data were free. Not to be written to.
    """

    def __init__(self, split: Split, *, size: int, seed: int, batch_size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._images = torch.randn(batch_size, 3, size, size, generator=generator).to(device)
        self._labels, self._device = split.labels, device
        self.skipped: dict[int, str] = {}

    def batches(self, parts: Iterable[Part]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) of each part."""
        for part in parts:
            labels = torch.from_numpy(self._labels[part.samples]).to(self._device)
            yield self._images[: len(labels)], labels

    def close(self) -> None:
        """Nothing to end."""
