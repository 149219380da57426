"""Every random number of a run: named streams of a counter-based generator (Philox 4x64).

A draw is a function of (stream, seed, index) alone. Seed and index are the key of the generator, the stream is the
highest word of its counter, so two streams of one key never share a block. A list of numbers as a seed would not do:
NumPy pads it with zeros, which makes `[s, 3]` and `[s, 3, 0]` the same.
"""

from enum import IntEnum

import numpy as np

from .permutation import KEYS, Permutation

_WORD = 1 << 64


class Stream(IntEnum):
    """What random numbers are for; a number is never used again for something else. In brackets: the index."""

    SAMPLE = 1
    """Order of the samples (epoch)."""
    AUGMENTATION = 2
    """Augmentation; the block is a position (epoch)."""
    SHARD = 3
    """Order of the shards, with shuffle=window (epoch)."""
    PREPARE = 4
    """Order in which `pipelines.prepare` stores the images (split)."""
    HOLDOUT = 5
    """Images that `pipelines.prepare` holds out as the test split (class)."""
    STREAM_SHARD = 6
    """Shards dealt out to the ranks of the webdataset backend (epoch)."""
    STREAM_SHUFFLE = 7
    """Shuffle buffer of a rank of the webdataset backend; the block is a rank (epoch)."""
    SYNTHETIC = 8
    """Images of the synthetic backend."""
    INSPECT = 9
    """Images on the contact sheet of `pipelines.inspect`."""
    SPLIT = 10
    """Images split off the training set."""
    CONFUSION = 11
    """Images and labels of the confusion set."""
    METRIC_POOL = 12
    """Training images the metrics are taken on."""
    METRIC_TRIAL = 13
    """Images of one trial of a metric (trial)."""
    PENALTY_SHARE = 14
    """Batches, and their dropout, on which the penalty's share of a step is measured (trial)."""
    OVERHEAD_BUDGET = 15
    """How many sub-batches a step penalizes under an overhead budget (step)."""
    STEP = 16
    """Dropout, and which sub-batches the sampled estimator takes, in a training step (step)."""
    BOOTSTRAP = 17
    """Seeds that are drawn again for the intervals of a study's correlations."""
    AVERAGE_STATISTICS = 18
    """Training images from which BatchNorm's statistics of averaged weights are taken."""
    MIXING = 19
    """mixup, CutMix and random erasing; the block is a position (epoch)."""


def philox(stream: Stream, seed: int, index: int = 0, *, block: int = 0) -> np.random.Philox:
    """The bit generator of a stream, from which raw words are drawn.

    Args:
        stream: what the numbers are for.
        seed: of the run, 0 <= seed < 2**64.
        index: epoch, step or whatever else the stream counts, 0 <= index < 2**64.
        block: where to start, in blocks of four 64-bit words, 0 <= block < 2**64.

    Raises:
        ValueError: seed, index or block is out of range.
    """
    for name, value in (("seed", seed), ("index", index), ("block", block)):
        if not 0 <= value < _WORD:
            raise ValueError(f"{name} must be in 0..2**64-1, got {value}")
    return np.random.Philox(
        key=np.array([seed, index], np.uint64), counter=np.array([block, 0, 0, int(stream)], np.uint64)
    )


def generator(stream: Stream, seed: int, index: int = 0) -> np.random.Generator:
    """A NumPy generator for the stream; arguments as for `philox`."""
    return np.random.Generator(philox(stream, seed, index))


def torch_seed(stream: Stream, seed: int, index: int = 0, rank: int = 0) -> int:
    """A seed of 64 bits for a `torch.Generator`, of its own for every rank; arguments as for `philox`.

    Never equal to a seed that a user sets (below 2**31), in its lower 32 bits either: PyTorch's CPU generator ignores
    the others.
    """
    return int(philox(stream, seed, index, block=rank).random_raw()) | 1 << 63 | 1 << 31


def permutation(stream: Stream, count: int, seed: int, index: int = 0, *, part: int = 0) -> Permutation:
    """0 .. count-1 in an order that depends on the arguments alone, on every machine; nothing is computed yet.

    Args:
        stream: what the order is for.
        count: of elements.
        seed: as for `philox`.
        index: the same.
        part: of a stream that shuffles several parts, each by itself.
    """
    # Raw Philox words are fixed by its definition; NumPy's own shuffles may change between its versions.
    return Permutation(count, philox(stream, seed, index, block=part * KEYS // 4).random_raw(KEYS))
