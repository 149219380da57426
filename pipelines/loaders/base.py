"""What several backends have in common."""

from collections.abc import Callable

from .. import augment
from ..format import Split
from ..sampler import Ids, LocalBatch
from .config import LoaderConfig
from .reader import Faults, Files, Workers


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
        self._files, self._faults = Files(split, config.threads), Faults(split, config.on_error)
        self._workers = Workers(config.threads)
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
