import tracemalloc
from typing import Literal

import numpy as np
import pytest

from pipelines import Sampler, evaluation_batches

SIZES = (1, 2, 3, 8)


def sequence(sampler: Sampler, epoch: int) -> np.ndarray:
    """All sample ids in the order of the epoch."""
    return sampler.at(epoch, np.arange(sampler.samples))


@pytest.mark.parametrize("size", SIZES)
def test_every_sample_once_an_epoch(size: int) -> None:
    sampler = Sampler(samples=103, global_batch=20, seed=3)
    batches = [batch for rank in range(size) for batch in sampler.local_batches(epoch=2, rank=rank, world_size=size)]
    assert sorted(np.concatenate([batch.samples for batch in batches])) == list(range(103))
    assert sorted(np.concatenate([batch.positions for batch in batches])) == list(range(103))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("drop_last", [False, True])
def test_global_batches_do_not_depend_on_the_world_size(size: int, drop_last: bool) -> None:
    sampler = Sampler(103, 20, seed=3, drop_last=drop_last)
    assert sampler.steps == (5 if drop_last else 6)
    for step in range(sampler.steps):
        alone = sampler.local_batch(1, step, 0, 1)
        ranks = [sampler.local_batch(1, step, rank, size) for rank in range(size)]
        np.testing.assert_array_equal(np.concatenate([batch.samples for batch in ranks]), alone.samples)
        np.testing.assert_array_equal(np.concatenate([batch.positions for batch in ranks]), alone.positions)
        counts = [len(batch.samples) for batch in ranks]
        assert max(counts) - min(counts) <= 1
        assert {batch.global_size for batch in ranks} == {len(alone.samples)}


def test_any_step_is_a_place_to_start() -> None:
    sampler = Sampler(50, 8, seed=1)
    whole = list(sampler.local_batches(4, rank=1, world_size=2))
    for start in range(sampler.steps):
        rest = list(sampler.local_batches(4, rank=1, world_size=2, start=start))
        assert [batch.step for batch in rest] == [batch.step for batch in whole[start:]]
        for batch, expected in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(batch.samples, expected.samples)


def test_seed_and_epoch_change_the_sequence() -> None:
    sequences = [sequence(Sampler(40, 8, seed), epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(found) for found in sequences}) == 4


def test_the_sequence_is_fixed_for_good() -> None:
    # Written down once: a run resumed by a later version must see the same order.
    assert sequence(Sampler(8, 4, seed=7), 3).tolist() == [5, 0, 6, 4, 3, 2, 7, 1]


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_sees_every_sample_once(size: int) -> None:
    batches = [batch for rank in range(size) for batch in evaluation_batches(37, 4, rank, size)]
    assert sorted(np.concatenate([batch.samples for batch in batches])) == list(range(37))
    assert all(0 < len(batch.samples) <= 4 for batch in batches)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"global_batch": 0}, "global_batch must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"shuffle": "mixing"}, "shuffle must be full or window, got .mixing."),
        ({"global_batch": 11, "drop_last": True}, "global_batch must be at most 10"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**{"samples": 10, "global_batch": 4, "seed": 0, **settings})  # type: ignore[arg-type]


def test_bad_places() -> None:
    sampler = Sampler(10, 4, 0)
    with pytest.raises(ValueError, match=r"step must be in 0\.\.2, got 3"):
        sampler.local_batch(0, 3, 0, 1)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        sampler.local_batch(0, 0, 2, 2)


def neighbours_in_one_shard(sampler: Sampler, shards: np.ndarray) -> float:
    """Share of neighbours in the sequence that come from the same shard: 1 unshuffled, 1/shards perfectly shuffled."""
    stand = shards[sequence(sampler, 0)]
    return float((stand[1:] == stand[:-1]).mean())


def test_shuffling() -> None:
    shards = np.repeat(np.arange(100), 500)
    full = Sampler(50_000, 100, seed=1)
    window = Sampler(50_000, 100, seed=1, shuffle="window", shard_sizes=np.full(100, 500), window=10)
    # The share is a mean of 50 000 draws: three standard deviations are 0.0013 and 0.004.
    assert abs(neighbours_in_one_shard(full, shards) - 1 / 100) < 0.0015
    assert abs(neighbours_in_one_shard(window, shards) - 1 / 10) < 0.0045
    # Nothing is left of the order on disk, whose correlation with the place in the sequence is 1.
    for sampler in (full, window):
        assert abs(np.corrcoef(sequence(sampler, 0), np.arange(50_000))[0, 1]) < 0.3
        places = np.empty(50_000, int)
        places[sequence(sampler, 0)] = np.arange(50_000)
        within = [np.corrcoef(places[start : start + 500], np.arange(500))[0, 1] for start in range(0, 50_000, 500)]
        assert abs(np.mean(within)) < 3 / np.sqrt(50_000)


def test_a_window_bounds_the_shards_in_use() -> None:
    shards = np.repeat(np.arange(40), 25)
    sampler = Sampler(1000, 10, seed=4, shuffle="window", shard_sizes=np.full(40, 25), window=8)
    found = sequence(sampler, 2)
    assert sorted(found) == list(range(1000))
    windows = [set(shards[found[start : start + 200]]) for start in range(0, 1000, 200)]
    assert [len(window) for window in windows] == [8] * 5
    assert set.union(*windows) == set(range(40))
    assert sequence(sampler, 3).tolist() != found.tolist()


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_planning_an_epoch_of_imagenet_fits_in_megabytes(shuffle: Literal["full", "window"]) -> None:
    samples = 1_281_167
    sizes = np.append(np.full(1281, 1000), 167)
    tracemalloc.start()
    sampler = Sampler(samples, 4096, seed=0, shuffle=shuffle, shard_sizes=sizes)
    planned = sum(len(batch.samples) for batch in sampler.local_batches(0, rank=63, world_size=64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert planned == samples // 64 + 1
    assert peak < 10e6


def test_windows_of_shards_of_any_length() -> None:
    sizes = np.array([1, 5, 3, 0, 1, 1, 8, 2])  # a shard all of whose samples were held out, too
    shards = np.repeat(np.arange(8), sizes)
    sampler = Sampler(21, 4, seed=1, shuffle="window", shard_sizes=sizes, window=3)
    for epoch in range(20):
        found = sequence(sampler, epoch)
        assert sorted(found) == list(range(21))
        ends = [end for end in range(1, 22) if set(shards[found[:end]]).isdisjoint(shards[found[end:]])]
        assert len(ends) >= 3, "three windows of whole shards"
    assert len({tuple(sequence(sampler, epoch)) for epoch in range(20)}) == 20


def test_a_window_needs_to_know_the_shards() -> None:
    for sizes in (None, np.array([5, 4])):
        with pytest.raises(ValueError, match="shuffle=window needs shard_sizes that add up to the 10 samples"):
            Sampler(10, 4, 0, shuffle="window", shard_sizes=sizes)
