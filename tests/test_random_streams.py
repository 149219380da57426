import hashlib
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import Sampler, augment
from pipelines.random_streams import Stream, generator, permutation, philox, torch_seed

SEEDS = (0, 1, 2, 7, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
INDICES = (0, 1, 2, 3, 100, 2**32, 2**64 - 1)


def test_no_two_keys_have_a_stream_in_common() -> None:
    # Blocks too: a stream that starts a little later must not be the continuation of another one.
    words = [
        philox(stream, seed, index, block=block).random_raw(8)
        for stream, seed, index, block in product(Stream, SEEDS, INDICES, (0, 2, 4))
    ]
    assert len(np.unique(np.concatenate(words))) == 8 * len(words)


def test_a_key_has_a_fixed_length_so_that_zeros_are_no_padding() -> None:
    first, second = np.random.default_rng([5, 3]), np.random.default_rng([5, 3, 0])
    assert (first.integers(2**62, size=4) == second.integers(2**62, size=4)).all(), "NumPy takes these for one seed"
    draws = {
        tuple(generator(stream, *key).integers(2**62, size=4).tolist())
        for stream, key in product(Stream, [(5,), (5, 3), (3, 5), (0, 5), (5, 5), (3,)])
    }
    assert len(draws) == 6 * len(Stream)
    assert (generator(Stream.SPLIT, 5).random(4) == generator(Stream.SPLIT, 5, 0).random(4)).all()


def test_seeds_of_pytorch_are_apart_from_each_other_and_from_those_of_users() -> None:
    seeds = [
        torch_seed(stream, seed, index, rank)
        for stream, seed, index, rank in product(Stream, SEEDS, INDICES, (0, 1, 2, 63))
    ]
    assert len(set(seeds)) == len(seeds)
    # The CPU generator keeps the lower 32 bits of a seed; a seed that a user gives is below 2**31.
    assert torch.equal(
        torch.rand(4, generator=torch.Generator().manual_seed(5)),
        torch.rand(4, generator=torch.Generator().manual_seed(5 + 2**32)),
    )
    assert all(2**63 <= seed < 2**64 and seed % 2**32 >= 2**31 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize("key", [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_a_key_out_of_range_is_refused(key: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"(seed|index) must be in 0\.\.2\*\*64-1, got"):
        philox(Stream.SAMPLE, *key)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def test_the_order_of_an_epoch_is_fixed_for_good() -> None:
    # A run that is resumed by a later version must see the same samples, or its checkpoint must be of another format.
    for seed, epoch, recorded in (
        (0, 0, "9335b210f6b9358b"),
        (7, 3, "673cb42de32cbd9a"),
        (2**40, 11, "71eb1686adfb73be"),
    ):
        order = permutation(Stream.SAMPLE, 1000, seed, epoch)[:]
        assert sorted(order) == list(range(1000))
        assert digest(order.astype("<i8")) == recorded
        assert (Sampler(1000, 10, seed).at(epoch, np.arange(1000)) == order).all()
    window = Sampler(24, 8, seed=9, shuffle="window", shard_sizes=np.full(6, 4), window=2)
    assert window.at(5, np.arange(24)).tolist() == [
        4, 5, 8, 10, 11, 7, 6, 9, 17, 16, 0, 19, 1, 3, 18, 2, 14, 15, 20, 21, 22, 13, 23, 12
    ]  # fmt: skip


def test_augmentation_is_fixed_for_good() -> None:
    assert digest(augment.uniform(5, 2, np.array([0, 1, 2, 9, 10, 400]))) == "a353b142aaacbcd7"
    sides = np.full(6, 48, np.int32), np.full(6, 40, np.int32)
    drawn = augment.draw(augment.AUGMENTATIONS["random_resized_crop"], 5, 2, np.arange(6), *sides, color_jitter=0.25)
    assert [row.steps for row in drawn.rows()] == [
        [11, 7, 36, 30, 0, 0, 1],
        [9, 4, 39, 36, 0, 0, 0],
        [2, 7, 26, 29, 0, 0, 1],
        [4, 3, 38, 31, 0, 0, 1],
        [3, 5, 28, 34, 0, 0, 0],
        [3, 6, 34, 32, 0, 0, 0],
    ]
    assert digest(drawn.jitter) == "1f7990e85eb18a64"


def test_importing_pipelines_is_cheap() -> None:
    heavy = "torch", "nvidia.dali", "webdataset", "cv2", "simplejpeg", "scipy", "tqdm"
    script = f"import sys, pipelines; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "[]\n", done.stderr
