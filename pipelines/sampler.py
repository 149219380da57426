"""Which sample is at which position of which epoch, for any world size, from any position.

Everything here is a pure function of (seed, epoch, the samples): the world size only decides how a global batch is
split, so runs on 1, 2 or 64 ranks see the same global batches, and a run can start at any step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from .random_streams import Stream, permutation

Ids = NDArray[np.int64]
Shuffle = Literal["full", "window"]
_TOGETHER = 64
"""Steps whose samples are looked up at a time"""


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
        shard_sizes: samples of each shard, in the order of the ids, (shards,); needed for shuffle="window" alone.
        window: shards shuffled as one.
        unit: samples that stay together on one rank, a sub-batch.
    """

    samples: int
    global_batch: int
    seed: int
    drop_last: bool = False
    shuffle: Shuffle = "full"
    shard_sizes: Ids | None = field(default=None, repr=False)
    window: int = 16
    unit: int = 1
    _windows: dict[int, "_Windows"] = field(default_factory=dict, init=False, repr=False)
    """Of the last epoch that was asked for."""

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
        if self.shuffle == "window" and (self.shard_sizes is None or np.sum(self.shard_sizes) != self.samples):
            raise ValueError(f"shuffle=window needs shard_sizes that add up to the {self.samples} samples")
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

    def at(self, epoch: int, positions: Ids) -> Ids:
        """The ids of the samples at these positions of the epoch's order, int64, in the shape of `positions`."""
        if self.shard_sizes is None or self.shuffle == "full":
            return permutation(Stream.SAMPLE, self.samples, self.seed, epoch)[positions]
        if epoch not in self._windows:
            self._windows.clear()
            self._windows[epoch] = _Windows(self.shard_sizes, self.window, self.seed, epoch)
        return self._windows[epoch].at(positions)

    def local_batch(self, epoch: int, step: int, rank: int, world_size: int) -> LocalBatch:
        """The samples of one rank in global batch `step` of `epoch`."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step must be in 0..{self.steps - 1}, got {step}")
        (batch,) = self._local_batches(epoch, [step], rank, world_size)
        return batch

    def largest_local_batch(self, world_size: int) -> int:
        """Samples in the largest local batch of any step and rank."""
        unit = self.unit if self.global_batch % self.unit == 0 else 1
        return -(-(self.global_batch // unit) // world_size) * unit

    def local_batches(self, epoch: int, rank: int, world_size: int, start: int = 0) -> Iterator[LocalBatch]:
        """The local batches of one rank from step `start` to the end of the epoch."""
        for first in range(start, self.steps, _TOGETHER):
            yield from self._local_batches(epoch, range(first, min(first + _TOGETHER, self.steps)), rank, world_size)

    def _local_batches(self, epoch: int, steps: Sequence[int], rank: int, world_size: int) -> Iterator[LocalBatch]:
        """Their samples are looked up together, which costs little more than those of one step."""
        firsts = [step * self.global_batch for step in steps]
        lasts = [min(first + self.global_batch, self.samples) for first in firsts]
        bounds = [_share(first, last, rank, world_size, self.unit) for first, last in zip(firsts, lasts, strict=True)]
        positions = [np.arange(start, stop) for start, stop in bounds]
        samples = np.split(self.at(epoch, np.concatenate(positions)), np.cumsum([len(part) for part in positions])[:-1])
        for step, ids, places, first, last in zip(steps, samples, positions, firsts, lasts, strict=True):
            yield LocalBatch(epoch, step, ids, places, last - first)


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


class _Windows:
    """An epoch's order with shuffle="window": its memory grows with the number of shards, not of samples."""

    def __init__(self, shard_sizes: Ids, window: int, seed: int, epoch: int) -> None:
        self._seed, self._epoch = seed, epoch
        order = permutation(Stream.SHARD, len(shard_sizes), seed, epoch)[:]
        self._first_ids = _starts(shard_sizes)[order]
        self._starts = _starts(shard_sizes[order])  # positions of the shards
        self._bounds = np.append(self._starts[:-1:window], self._starts[-1])  # positions of the windows

    def at(self, positions: Ids) -> Ids:
        windows = np.searchsorted(self._bounds, positions, side="right") - 1
        places = np.empty_like(positions)  # in the order of the shards, before their samples are shuffled
        for window in np.unique(windows).tolist():
            start, stop = self._bounds[window : window + 2].tolist()
            inside = windows == window
            within = permutation(Stream.SAMPLE, stop - start, self._seed, self._epoch, part=window)
            places[inside] = start + within[positions[inside] - start]
        shards = np.searchsorted(self._starts, places, side="right") - 1
        return self._first_ids[shards] + places - self._starts[shards]


def _starts(sizes: Ids) -> Ids:
    """Where pieces of these sizes begin that lie one after the other, and the end."""
    return np.concatenate(([0], np.cumsum(sizes)))


def _share(first: int, last: int, rank: int, world_size: int, unit: int = 1) -> tuple[int, int]:
    """Bounds of the rank-th of `world_size` contiguous pieces of [first, last), in whole units if possible."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
    if (last - first) % unit:
        unit = 1
    count = (last - first) // unit
    return first + count * rank // world_size * unit, first + count * (rank + 1) // world_size * unit
