"""Which sample stands at which position of which epoch, for any world size, from any position.

Everything here is a pure function of (seed, epoch, the samples): the world size only decides how a global batch is
shared out, so runs on 1, 2 or 64 ranks see the same global batches, and any step is a place to start from.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Remainder = Literal["keep", "drop"]
Mixing = Literal["full", "window"]

# Fourth word of the Philox counter: keeps the streams of samples, shards and (in augment.py) augmentation apart.
_SAMPLE_STREAM = 1
_SHARD_STREAM = 3


@dataclass(frozen=True)
class Part:
    """What one rank takes of one global batch.

    samples: ids into the split, int64 (B,); positions: global positions in the epoch, int64 (B,), the counter of the
    random numbers of augmentation; global_size: samples in the whole global batch, over all ranks.
    """

    epoch: int
    step: int
    samples: Ids
    positions: Ids
    global_size: int


@dataclass(frozen=True, eq=False)
class Order:
    """Cuts each epoch's sequence of `samples` samples into global batches of `global_batch`.

    remainder: "keep" makes a last, smaller global batch of what is left over; "drop" leaves it out of that epoch.
    mixing: "full" is a permutation of all samples. "window" is for disks on which jumping between files is slow:
    shards in random order, `window` of them at a time shuffled as one; it needs `shards`, the shard of every sample.
    Rank r of n takes the r-th of n contiguous pieces of each global batch; pieces differ by at most one `unit` of
    samples (by one sample in a batch that is not a whole number of units), and in a small batch some may be empty, so
    that every rank has `steps` steps.
    """

    samples: int
    global_batch: int
    seed: int
    remainder: Remainder = "keep"
    mixing: Mixing = "full"
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
        if self.remainder not in ("keep", "drop"):
            raise ValueError(f"remainder must be keep or drop, got {self.remainder!r}")
        if self.mixing not in ("full", "window"):
            raise ValueError(f"mixing must be full or window, got {self.mixing!r}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 shard, got {self.window}")
        if self.unit < 1:
            raise ValueError(f"unit must be at least 1 sample, got {self.unit}")
        if self.mixing == "window" and (self.shards is None or len(self.shards) != self.samples):
            raise ValueError(f"mixing=window needs the shard of each of the {self.samples} samples")
        if self.steps == 0:
            raise ValueError(
                f"remainder=drop leaves no step: global_batch must be at most {self.samples}, the samples, "
                f"got {self.global_batch}"
            )

    @property
    def steps(self) -> int:
        """Global batches in an epoch, on every rank."""
        whole, left = divmod(self.samples, self.global_batch)
        return whole + (1 if left and self.remainder == "keep" else 0)

    def sequence(self, epoch: int) -> Ids:
        """All sample ids in the order of this epoch, int64 (samples,); read-only."""
        if epoch not in self._sequences:
            if self.shards is None or self.mixing == "full":
                sequence = permutation(self.samples, self.seed, epoch)
            else:
                sequence = _windows(self.shards, self.window, self.seed, epoch)
            self._sequences.clear()
            self._sequences[epoch] = sequence
        return self._sequences[epoch]

    def part(self, epoch: int, step: int, rank: int, size: int) -> Part:
        """The part of rank `rank` of `size` in global batch `step` of `epoch`."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step must be in 0..{self.steps - 1}, got {step}")
        first = step * self.global_batch
        last = min(first + self.global_batch, self.samples)
        start, stop = _share(first, last, rank, size, self.unit)
        return Part(epoch, step, self.sequence(epoch)[start:stop], np.arange(start, stop), last - first)

    def largest_part(self, size: int) -> int:
        """Samples in the largest part of a global batch, of any rank of `size`."""
        unit = self.unit if self.global_batch % self.unit == 0 else 1
        return -(-(self.global_batch // unit) // size) * unit

    def parts(self, epoch: int, rank: int, size: int, start: int = 0) -> Iterator[Part]:
        """The parts of one rank from step `start` to the end of the epoch."""
        for step in range(start, self.steps):
            yield self.part(epoch, step, rank, size)


def evaluation_parts(samples: int, batch_size: int, rank: int, size: int) -> Iterator[Part]:
    """Every sample once over all ranks, in order, at most `batch_size` a rank and step; empty parts are left out."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    for step, first in enumerate(range(0, samples, batch_size * size)):
        last = min(first + batch_size * size, samples)
        start, stop = _share(first, last, rank, size)
        if start < stop:
            ids = np.arange(start, stop)
            yield Part(0, step, ids, ids, last - first)


def permutation(samples: int, seed: int, epoch: int) -> Ids:
    """0 .. samples-1 in an order that depends on the arguments alone, on every machine; read-only."""
    order = np.argsort(_words(samples, seed, epoch, _SAMPLE_STREAM), kind="stable")
    order.setflags(write=False)
    return order


def _windows(shards: NDArray[Any], window: int, seed: int, epoch: int) -> Ids:
    """Sample ids, window by window of randomly chosen shards, random within each window."""
    names, shard = np.unique(shards, return_inverse=True)
    place = np.argsort(np.argsort(_words(len(names), seed, epoch, _SHARD_STREAM), kind="stable"))
    order = np.lexsort((_words(len(shards), seed, epoch, _SAMPLE_STREAM), place[shard] // window))
    order.setflags(write=False)
    return order


def _words(count: int, seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    # Raw Philox words are fixed by its definition; numpy's own shuffles may change between its versions.
    return np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]).random_raw(count)


def _share(first: int, last: int, rank: int, size: int, unit: int = 1) -> tuple[int, int]:
    """Bounds of the rank-th of `size` contiguous pieces of [first, last), in whole units if that is."""
    if not 0 <= rank < size:
        raise ValueError(f"rank must be in 0..{size - 1}, got {rank}")
    if (last - first) % unit:
        unit = 1
    count = (last - first) // unit
    return first + count * rank // size * unit, first + count * (rank + 1) // size * unit
