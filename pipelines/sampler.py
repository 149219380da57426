"""Which sample is at which position of which epoch, for any world size, from any position.

Everything here is a pure function of (seed, epoch, the samples): the world size only decides how a global batch is
split, so runs on 1, 2 or 64 ranks see the same global batches, and a run can start at any step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .random_streams import Stream, permutation, philox

Ids = NDArray[np.int64]
Shuffle = Literal["full", "window"]


@dataclass(frozen=True)
class LocalBatch:
    """The samples of one rank in one global batch.

    Attributes:
        epoch: 0, 1, ...
        step: of the epoch, 0, 1, ...
        samples: ids into the split, int64 (B,).
        positions: global positions in the epoch, int64 (B,), the counter of the random numbers of augmentation.
        global_size: samples in the whole global batch, over all ranks.
    """

    epoch: int
    step: int
    samples: Ids
    positions: Ids
    global_size: int


@dataclass(frozen=True, eq=False)
class Sampler:
    """Cuts each epoch's sequence of `samples` samples into global batches of `global_batch`.

    Rank r of n takes the r-th of n contiguous pieces of each global batch. Pieces differ by at most one `unit` of
    samples (by one sample in a batch that is not a whole number of units), and in a small batch some may be empty, so
    that every rank has `steps` steps.

    Attributes:
        samples: number of samples in the split.
        global_batch: samples in a global batch, over all ranks.
        seed: of the run.
        drop_last: drop a last, smaller global batch of an epoch rather than keep it.
        shuffle: "full" is a permutation of all samples. "window" is for disks on which jumping between files is slow:
            shards in random order, `window` of them at a time shuffled as one.
        shards: the shard of every sample, (samples,); needed for shuffle="window" alone.
        window: shards shuffled as one.
        unit: samples that stay together on one rank, a sub-batch.
    """

    samples: int
    global_batch: int
    seed: int
    drop_last: bool = False
    shuffle: Shuffle = "full"
    shards: NDArray[Any] | None = field(default=None, repr=False)
    window: int = 16
    unit: int = 1
    _sequences: dict[int, Ids] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}: the split is empty")
        if self.global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, got {self.global_batch}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.shuffle not in get_args(Shuffle):
            raise ValueError(f"shuffle must be full or window, got {self.shuffle!r}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 shard, got {self.window}")
        if self.unit < 1:
            raise ValueError(f"unit must be at least 1 sample, got {self.unit}")
        if self.shuffle == "window" and (self.shards is None or len(self.shards) != self.samples):
            raise ValueError(f"shuffle=window needs the shard of each of the {self.samples} samples")
        if self.steps == 0:
            raise ValueError(
                f"drop_last=true leaves no step: global_batch must be at most {self.samples}, the samples, "
                f"got {self.global_batch}"
            )

    @property
    def steps(self) -> int:
        """Global batches in an epoch, on every rank."""
        whole, left = divmod(self.samples, self.global_batch)
        return whole + (1 if left and not self.drop_last else 0)

    def sequence(self, epoch: int) -> Ids:
        """All sample ids in the order of this epoch, int64 (samples,); read-only."""
        if epoch not in self._sequences:
            if self.shards is None or self.shuffle == "full":
                sequence = permutation(Stream.SAMPLE, self.samples, self.seed, epoch)
            else:
                sequence = _windows(self.shards, self.window, self.seed, epoch)
            self._sequences.clear()
            self._sequences[epoch] = sequence
        return self._sequences[epoch]

    def local_batch(self, epoch: int, step: int, rank: int, world_size: int) -> LocalBatch:
        """The samples of one rank in global batch `step` of `epoch`."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step must be in 0..{self.steps - 1}, got {step}")
        first = step * self.global_batch
        last = min(first + self.global_batch, self.samples)
        start, stop = _share(first, last, rank, world_size, self.unit)
        return LocalBatch(epoch, step, self.sequence(epoch)[start:stop], np.arange(start, stop), last - first)

    def largest_local_batch(self, world_size: int) -> int:
        """Samples in the largest local batch of any step and rank."""
        unit = self.unit if self.global_batch % self.unit == 0 else 1
        return -(-(self.global_batch // unit) // world_size) * unit

    def local_batches(self, epoch: int, rank: int, world_size: int, start: int = 0) -> Iterator[LocalBatch]:
        """The local batches of one rank from step `start` to the end of the epoch."""
        for step in range(start, self.steps):
            yield self.local_batch(epoch, step, rank, world_size)


def evaluation_batches(samples: int, batch_size: int, rank: int, world_size: int) -> Iterator[LocalBatch]:
    """Every sample once over all ranks, in order; a rank that has none in the last global batch skips it.

    Args:
        samples: number of samples in the split.
        batch_size: most samples of a rank in a step.
        rank: this rank, of `world_size`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for step, first in enumerate(range(0, samples, batch_size * world_size)):
        last = min(first + batch_size * world_size, samples)
        start, stop = _share(first, last, rank, world_size)
        if start < stop:
            ids = np.arange(start, stop)
            yield LocalBatch(0, step, ids, ids, last - first)


def _windows(shards: NDArray[Any], window: int, seed: int, epoch: int) -> Ids:
    """Sample ids, window by window of randomly chosen shards, random within each window."""
    names, shard = np.unique(shards, return_inverse=True)
    rank = np.argsort(permutation(Stream.SHARD, len(names), seed, epoch))
    words = philox(Stream.SAMPLE, seed, epoch).random_raw(len(shards))
    order = np.lexsort((words, rank[shard] // window))
    order.setflags(write=False)
    return order


def _share(first: int, last: int, rank: int, world_size: int, unit: int = 1) -> tuple[int, int]:
    """Bounds of the rank-th of `world_size` contiguous pieces of [first, last), in whole units if possible."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if (last - first) % unit:
        unit = 1
    count = (last - first) // unit
    return first + count * rank // world_size * unit, first + count * (rank + 1) // world_size * unit
