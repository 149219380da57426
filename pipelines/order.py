"""Which sample stands at which position of which epoch, for any world size, from any position.

Everything here is a pure function of (seed, epoch, number of samples): the world size only decides how a global batch
is shared out, so runs on 1, 2 or 64 ranks see the same global batches, and any step is a place to start from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Remainder = Literal["keep", "drop"]

# Fourth word of the Philox counter: keeps the streams of order and augmentation apart.
_ORDER_STREAM = 1


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


@dataclass(frozen=True)
class Order:
    """Cuts each epoch's permutation of `samples` samples into global batches of `global_batch`.

    remainder: "keep" makes a last, smaller global batch of what is left over; "drop" leaves it out of that epoch.
    Rank r of n takes the r-th of n contiguous pieces of each global batch; pieces differ by at most one sample, and
    in a small last batch some may be empty, so that every rank has `steps` steps.
    """

    samples: int
    global_batch: int
    seed: int
    remainder: Remainder = "keep"

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError("samples must be at least 1, got 0: the split is empty")
        if self.global_batch < 1:
            raise ValueError(f"global_batch must be at least 1, got {self.global_batch}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        if self.remainder not in ("keep", "drop"):
            raise ValueError(f"remainder must be keep or drop, got {self.remainder!r}")
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
        return permutation(self.samples, self.seed, epoch)

    def part(self, epoch: int, step: int, rank: int, size: int) -> Part:
        """The part of rank `rank` of `size` in global batch `step` of `epoch`."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step must be in 0..{self.steps - 1}, got {step}")
        first = step * self.global_batch
        last = min(first + self.global_batch, self.samples)
        start, stop = _share(first, last, rank, size)
        return Part(epoch, step, self.sequence(epoch)[start:stop], np.arange(start, stop), last - first)

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


def _share(first: int, last: int, rank: int, size: int) -> tuple[int, int]:
    """Bounds of the rank-th of `size` contiguous pieces of [first, last)."""
    if not 0 <= rank < size:
        raise ValueError(f"rank must be in 0..{size - 1}, got {rank}")
    count = last - first
    return first + count * rank // size, first + count * (rank + 1) // size


@lru_cache(maxsize=2)
def permutation(samples: int, seed: int, epoch: int) -> Ids:
    """0 .. samples-1 in an order that depends on the arguments alone, on every machine; read-only."""
    # Raw Philox words are fixed by its definition; numpy's own shuffles may change between its versions.
    words = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, _ORDER_STREAM]).random_raw(samples)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order
