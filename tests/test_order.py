import tracemalloc

import numpy as np
import pytest

from pipelines import Order, evaluation_parts

SIZES = (1, 2, 3, 8)


@pytest.mark.parametrize("size", SIZES)
def test_every_sample_once_an_epoch(size: int) -> None:
    order = Order(samples=103, global_batch=20, seed=3)
    parts = [part for rank in range(size) for part in order.parts(epoch=2, rank=rank, size=size)]
    assert sorted(np.concatenate([part.samples for part in parts])) == list(range(103))
    assert sorted(np.concatenate([part.positions for part in parts])) == list(range(103))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("remainder", ["keep", "drop"])
def test_global_batches_do_not_depend_on_the_world_size(size: int, remainder: str) -> None:
    order = Order(103, 20, seed=3, remainder=remainder)  # type: ignore[arg-type]
    assert order.steps == (6 if remainder == "keep" else 5)
    for step in range(order.steps):
        alone = order.part(1, step, 0, 1)
        ranks = [order.part(1, step, rank, size) for rank in range(size)]
        np.testing.assert_array_equal(np.concatenate([part.samples for part in ranks]), alone.samples)
        np.testing.assert_array_equal(np.concatenate([part.positions for part in ranks]), alone.positions)
        counts = [len(part.samples) for part in ranks]
        assert max(counts) - min(counts) <= 1
        assert {part.global_size for part in ranks} == {len(alone.samples)}


def test_any_step_is_a_place_to_start() -> None:
    order = Order(50, 8, seed=1)
    whole = list(order.parts(4, rank=1, size=2))
    for start in range(order.steps):
        rest = list(order.parts(4, rank=1, size=2, start=start))
        assert [part.step for part in rest] == [part.step for part in whole[start:]]
        for part, expected in zip(rest, whole[start:], strict=True):
            np.testing.assert_array_equal(part.samples, expected.samples)


def test_seed_and_epoch_change_the_sequence() -> None:
    sequences = [Order(40, 8, seed).sequence(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(sequence) for sequence in sequences}) == 4


def test_the_sequence_is_fixed_for_good() -> None:
    # Written down once: a run resumed by a later version must see the same order.
    assert Order(8, 4, seed=7).sequence(3).tolist() == [6, 4, 0, 2, 5, 3, 1, 7]


@pytest.mark.parametrize("size", SIZES)
def test_evaluation_sees_every_sample_once(size: int) -> None:
    parts = [part for rank in range(size) for part in evaluation_parts(37, 4, rank, size)]
    assert sorted(np.concatenate([part.samples for part in parts])) == list(range(37))
    assert all(0 < len(part.samples) <= 4 for part in parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be at least 1"),
        ({"global_batch": 0}, "global_batch must be at least 1, got 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"mixing": "shuffle"}, "mixing must be full or window, got .shuffle."),
        ({"remainder": "pad"}, "remainder must be keep or drop, got 'pad'"),
        ({"global_batch": 11, "remainder": "drop"}, "global_batch must be at most 10"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Order(**{"samples": 10, "global_batch": 4, "seed": 0, **settings})  # type: ignore[arg-type]


def test_bad_places() -> None:
    order = Order(10, 4, 0)
    with pytest.raises(ValueError, match=r"step must be in 0\.\.2, got 3"):
        order.part(0, 3, 0, 1)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        order.part(0, 0, 2, 2)


def neighbours_in_one_shard(order: Order, shards: np.ndarray) -> float:
    """Share of neighbours in the sequence that come from the same shard: 1 unmixed, 1/shards perfectly mixed."""
    stand = shards[order.sequence(0)]
    return float((stand[1:] == stand[:-1]).mean())


def test_mixing() -> None:
    shards = np.repeat(np.arange(100), 500)
    full = Order(50_000, 100, seed=1)
    window = Order(50_000, 100, seed=1, mixing="window", shards=shards, window=10)
    # The share is a mean of 50 000 draws: three standard deviations are 0.0013 and 0.004.
    assert abs(neighbours_in_one_shard(full, shards) - 1 / 100) < 0.0015
    assert abs(neighbours_in_one_shard(window, shards) - 1 / 10) < 0.0045
    # Nothing is left of the order on disk, whose correlation with the place in the sequence is 1.
    for order in (full, window):
        assert abs(np.corrcoef(order.sequence(0), np.arange(50_000))[0, 1]) < 0.3
        places = np.empty(50_000, int)
        places[order.sequence(0)] = np.arange(50_000)
        within = [np.corrcoef(places[start : start + 500], np.arange(500))[0, 1] for start in range(0, 50_000, 500)]
        assert abs(np.mean(within)) < 3 / np.sqrt(50_000)


def test_a_window_bounds_the_shards_in_use() -> None:
    shards = np.repeat(np.arange(40), 25)
    order = Order(1000, 10, seed=4, mixing="window", shards=shards, window=8)
    sequence = order.sequence(2)
    assert sorted(sequence) == list(range(1000))
    windows = [set(shards[sequence[start : start + 200]]) for start in range(0, 1000, 200)]
    assert [len(window) for window in windows] == [8] * 5
    assert set.union(*windows) == set(range(40))
    assert order.sequence(3).tolist() != sequence.tolist()


def test_planning_an_epoch_of_imagenet_fits_in_100_megabytes() -> None:
    samples = 1_281_167
    shards = (np.arange(samples) // 1000).astype(np.int32)
    for mixing in ("full", "window"):
        tracemalloc.start()
        order = Order(samples, 4096, seed=0, mixing=mixing, shards=shards)  # type: ignore[arg-type]
        planned = sum(len(part.samples) for part in order.parts(0, rank=63, size=64))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert planned == samples // 64 + 1
        assert peak < 100e6


def test_a_window_needs_to_know_the_shards() -> None:
    with pytest.raises(ValueError, match="mixing=window needs the shard of each of the 10 samples"):
        Order(10, 4, 0, mixing="window")
