"""The order of an epoch without a sorted array of it: a permutation, mixed well, in constant memory."""

import math
import tracemalloc
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from pipelines import Sampler
from pipelines.permutation import KEYS, Permutation
from pipelines.random_streams import Stream, permutation

HUGE = 100_000_000


def orders(count: int, how_many: int, places: slice | list[int] = slice(None)) -> np.ndarray:
    """What stands at the places in so many epochs, (how_many, places)."""
    return np.stack([permutation(Stream.SAMPLE, count, 5, epoch)[places] for epoch in range(how_many)])


def likely(counts: np.ndarray, cells: int) -> None:
    """The counts are those of equally frequent cells, by a chi-square test; all seeds are fixed."""
    counts = np.concatenate((counts, np.zeros(cells - len(counts))))
    expected = counts.sum() / cells
    assert expected >= 5
    p = stats.chi2.sf(((counts - expected) ** 2).sum() / expected, cells - 1)
    assert 1e-3 < p < 1 - 1e-3


@pytest.mark.parametrize("count", [*range(70), 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, 65_536, 100_003])
def test_everything_once(count: int) -> None:
    for seed in (0, 2**64 - 1):
        order = permutation(Stream.SAMPLE, count, seed, 3)
        assert len(order) == count
        assert order[:].dtype == np.int64
        assert np.array_equal(np.sort(order[:]), np.arange(count))


def enciphered_by_hand(position: int, count: int, keys: list[int]) -> int:
    """The same in plain integers, written from the definition."""
    bits = max((count - 1).bit_length(), 2)
    widths = bits - bits // 2, bits // 2
    halves = [position >> widths[1], position % 2 ** widths[1]]
    for number, key in enumerate(keys[: 24 if bits < 8 else 10]):
        word = halves[1 - number % 2] ^ key
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            word = (word ^ word >> 33) * factor % 2**64
        halves[number % 2] ^= word >> 64 - widths[number % 2]
    found = halves[0] << widths[1] | halves[1]
    return found if found < count else enciphered_by_hand(found, count, keys)


@pytest.mark.parametrize("count", [2, 3, 17, 100, 129, 1000, 1_281_167, HUGE, 10**9, 2**40 + 1, 2**62])
def test_a_batch_is_what_plain_integers_give_one_by_one(count: int) -> None:
    keys = np.random.Philox(key=count).random_raw(KEYS)
    positions = sorted({number * (count - 1) // 49 for number in range(50)})
    expected = [enciphered_by_hand(position, count, keys.tolist()) for position in positions]
    assert Permutation(count, keys)[positions].tolist() == expected


def test_any_part_alone_is_that_part_of_the_whole() -> None:
    order = permutation(Stream.SAMPLE, 10_007, 1)
    whole = order[:]
    for part in (
        slice(5),
        slice(3, 9_000, 7),
        slice(10_000, None),
        slice(7, 7),
        [4, 4, 10_006],
        np.array([[1, 2], [3, 4]]),
    ):
        np.testing.assert_array_equal(order[part], whole[part])
    for outside in ([10_007], [-1]):
        with pytest.raises(IndexError, match=r"positions must be in 0\.\.10006, got"):
            order[outside]


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_of_few_elements_every_order_is_equally_frequent(count: int) -> None:
    numbers = {order: number for number, order in enumerate(permutations(range(count)))}
    found = [numbers[tuple(order)] for order in orders(count, 8 * math.factorial(count)).tolist()]
    likely(np.bincount(found, minlength=len(numbers)), len(numbers))


@pytest.mark.parametrize("count", [16, 17, 100, 128, 1000, 5000, HUGE])
def test_of_many_elements_every_one_is_equally_frequent_at_every_position(count: int) -> None:
    cells = min(count, 20)
    places = np.linspace(0, count - 1, cells).astype(np.int64)
    found = orders(count, 1000, places.tolist()) * cells // count
    for place in range(cells):
        likely(np.bincount(found[:, place], minlength=cells), cells)
    # Two neighbours together, and one position in two epochs that follow one another.
    pairs = orders(count, 2000, [count // 2, count // 2 + 1]) * 10 // count
    if count >= 1000:  # of fewer, neighbours differ visibly more often than by chance
        likely(np.bincount(pairs[:, 0] * 10 + pairs[:, 1], minlength=100), 100)
    if count % 10 == 0:
        likely(np.bincount(pairs[1:, 0] * 10 + pairs[:-1, 0], minlength=100), 100)


@pytest.mark.parametrize("seeds", [range(1000), [2**k + d for k in range(1, 63) for d in (-1, 0, 1)]])
def test_seeds_that_resemble_each_other_give_orders_that_do_not(seeds: list[int]) -> None:
    found = np.array([permutation(Stream.SAMPLE, HUGE, seed)[:10] for seed in sorted(set(seeds))])
    for place in range(10):
        likely(np.bincount(found[:, place] * 20 // HUGE, minlength=20), 20)


@pytest.mark.parametrize("count", [1000, 50_000, 1_281_167])
def test_an_order_has_the_rises_fixed_points_and_cycles_of_a_random_one(count: int) -> None:
    drawn = [permutation(Stream.SAMPLE, count, 3, epoch)[:] for epoch in range(1 + 2_000_000 // count)]
    rises = np.array([(np.diff(order) > 0).sum() for order in drawn])
    # Eulerian numbers: mean (n - 1)/2, variance (n + 1)/12.
    assert abs(rises.mean() - (count - 1) / 2) < 4 * np.sqrt((count + 1) / 12 / len(drawn))
    fixed = sum(int((order == np.arange(count)).sum()) for order in drawn)
    assert abs(fixed - len(drawn)) < 4 * np.sqrt(len(drawn))
    # The distance of neighbours: triangular, so that its square root is uniform.
    distances = np.abs(np.diff(drawn[0]))
    ranks = 1 - (1 - distances / count) ** 2
    likely(np.bincount((ranks * 50).astype(int).clip(0, 49), minlength=50), 50)


def test_a_rank_of_a_thousand_plans_its_part_of_a_hundred_million_samples_in_a_megabyte() -> None:
    # A sorted array of them would be 800 MB.
    tracemalloc.start()
    sampler = Sampler(HUGE, 98_304, seed=0)
    batches = [sampler.local_batch(epoch, step, 1023, 1024) for epoch in (0, 7) for step in (0, sampler.steps - 2)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [len(batch.samples) for batch in batches] == [96] * 4
    assert len(np.unique(np.concatenate([batch.samples for batch in batches]))) > 380
    assert peak < 1e6


def test_windows_of_a_hundred_million_samples_take_memory_by_the_shard() -> None:
    tracemalloc.start()
    sampler = Sampler(HUGE, 98_304, seed=0, shuffle="window", shard_sizes=np.full(10_000, 10_000))
    found = sampler.local_batch(1, 500, 7, 1024).samples
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(found)) == 96
    assert len(np.unique(found // 10_000)) <= 16
    assert peak < 4e6
