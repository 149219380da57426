"""The backend "resident": all images of a split on the device, decoded once by the backend "torch".

For data sets that fit there, such as CIFAR: no CPU decodes as many images a second as a GPU trains on. A batch is
gathered, shifted, mirrored and normalized on the device, in a few operations over all its pixels, and nothing waits for
the device. Order and geometry are those of every backend, and the images are to the last bit those of "torch".
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from weakref import WeakValueDictionary

import numpy as np
import torch

from ..augment import Geometry
from ..format import Split
from ..free_memory import free_memory
from ..sampler import Ids, LocalBatch, evaluation_batches
from .base import IndexedLoader, check_size, normalized, to_device
from .config import Batch, LoaderConfig
from .render import normalization
from .torch import TorchLoader

_DECODED_TOGETHER = 256  # images
_opened: "WeakValueDictionary[tuple[int, torch.device, str], _Images]" = WeakValueDictionary()
"""Loaders of one split, augmented and as it is, share its images while one of them is open."""


class ResidentLoader(IndexedLoader):
    """Batches of one split, all of whose images are on the device; see `LoaderConfig`.

    Raises:
        ValueError: a sample cannot be read or decoded, images are not of the size trained on, the augmentation does
            more than flip and shift them, or they do not fit the memory.
    """

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        super().__init__(split, config)
        stored = "of unequal sizes" if split.sides is None else "{} x {}".format(*split.sides)
        for unfit, got in (
            (self._augmentation.area or self._augmentation.center, f"augmentation={config.augmentation}"),
            (config.color_jitter, f"color_jitter={config.color_jitter}"),
            (split.sides != (config.size, config.size), f"size {config.size} and images stored {stored}"),
        ):
            if unfit:
                raise ValueError(
                    f"backend resident only flips and shifts images at the size they are stored at, got {got}: "
                    "use torch or dali"
                )
        key = (id(split), config.device, config.on_error)
        images = _opened.get(key)
        if images is None:
            images = _opened[key] = _Images(split, config)
        self._images: _Images | None = images
        self._skipped: dict[int, str] = {}
        self._tables = torch.from_numpy(normalization(config.mean, config.std)).to(config.device)

    @property
    def skipped(self) -> dict[int, str]:
        """Why samples of the batches so far were skipped, by id (on_error="skip")."""
        return self._skipped

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        """(local_batch, images, labels) of each local batch; this call ends an earlier, unfinished iteration."""
        return self._batches(iter(local_batches), self._iterations.begin())

    def close(self) -> None:
        """Frees the memory, unless another loader of the split is open."""
        self._iterations.end()
        self._images = None

    def _batches(self, local_batches: Iterator[LocalBatch], check: Callable[[], None]) -> Iterator[Batch]:
        while True:
            check()
            local_batch = next(local_batches, None)
            if local_batch is None:
                return
            check_size(local_batch, self._config)
            assert self._images is not None
            samples = local_batch.samples
            if self._images.skipped:
                met = self._images.skipped.keys() & set(samples.tolist())
                self._skipped.update({sample: self._images.skipped[sample] for sample in sorted(met)})
            geometry = self._draw(local_batch.epoch, local_batch.positions, samples)
            yield local_batch, *self._images.gather(samples, geometry, self._tables)


class _Images:
    """The images of a split on a device.

    Attributes:
        pixels: one after the other, and a black one at the end, uint8 (len(split) * size * size + 1, 3).
        labels: of the images, int64 (len(split),), on the CPU.
        skipped: why another image is in the place of a sample, by its id.
    """

    def __init__(self, split: Split, config: LoaderConfig) -> None:
        self._split = split  # whose id belongs to no other meanwhile
        self._size, self._black = config.size, len(split) * config.size**2
        _check_room(3 * (self._black + 1), split, config)
        self.pixels = torch.zeros((self._black + 1, 3), dtype=torch.uint8, device=config.device)
        self.labels = np.empty(len(split), np.int64)
        count = min(_DECODED_TOGETHER, len(split))
        decoding = replace(config, backend="torch", augmentation="none", batch_size=count, device=torch.device("cpu"))
        images = self.pixels[:-1].view(len(split), config.size, config.size, 3)
        with closing(TorchLoader(split, decoding, normalize=False)) as loader:
            for batch, decoded, labels in loader.batches(evaluation_batches(len(split), count, 0, 1)):
                images[batch.samples[0] : batch.samples[-1] + 1] = decoded
                self.labels[batch.samples] = labels.numpy()
            self.skipped = loader.skipped

    def gather(self, samples: Ids, geometry: Geometry, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch, augmented and normalized by the tables, and its labels."""
        count, size, black = len(samples), self._size, self._black
        sides = np.arange(size)
        y = sides + geometry.shift[:, :1]
        x = np.where(geometry.mirror[:, None] == 1, size - 1 - sides, sides) + geometry.shift[:, 1:]
        # Where a pixel is in `pixels` is the sum of a number of its row and one of its column: few to send to the
        # device. What was shifted in is a sum that is too large.
        rows = np.where((y >= 0) & (y < size), samples[:, None] * size**2 + y * size, black)
        columns = np.where((x >= 0) & (x < size), x, black)
        packed = np.concatenate([rows.ravel(), columns.ravel(), self.labels[samples]])
        of_rows, of_columns, labels = to_device(self.pixels.device, packed).split([count * size, count * size, count])
        places = (of_rows.view(count, size, 1) + of_columns.view(count, 1, size)).clamp_(max=black)
        pixels = self.pixels.index_select(0, places.flatten()).view(count, size, size, 3)
        return normalized(pixels, tables), labels


def _check_room(needed: int, split: Split, config: LoaderConfig) -> None:
    """ValueError if the device has not so many bytes free."""
    device = config.device
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], str(device)
    else:
        free, where = free_memory() // config.local_size, "each rank of this machine"
    if needed > free:
        raise ValueError(
            f"backend resident needs {needed:,} bytes for the {len(split):,} images of {split.name}, "
            f"{free:,} are free for {where}: use torch or dali"
        )
