import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_data_set

from pipelines import Dataset, Loader, LoaderConfig, Sampler, Split, evaluation_batches, open_loader
from pipelines.format import Shard

# The library leaves its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Collects them in the test that left them, where their warnings are ignored."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_data_set(tmp_path_factory.mktemp("webdataset"))  # shards of 7, 7, 7 and 6 samples


def config(dataset: Dataset, **more: object) -> LoaderConfig:
    defaults = {"size": 32, "mean": dataset.mean, "std": dataset.std, "batch_size": 32, "device": torch.device("cpu")}
    return LoaderConfig(**{"backend": "webdataset", **defaults, **more})  # type: ignore[arg-type]


def open_train(dataset: Dataset, **more: object) -> Loader:
    return open_loader(dataset.splits["train"], config(dataset, **more))


def stored(dataset: Dataset) -> dict[tuple[int, ...], int]:
    """Rounded pixels of every training sample -> its id, by the torch backend."""
    loader = open_loader(dataset.splits["train"], config(dataset, backend="torch"))
    images = torch.cat([images for _, images, _ in loader.batches(evaluation_batches(27, 32, 0, 1))])
    loader.close()
    return {identity(image): sample for sample, image in enumerate(images)}


def identity(image: torch.Tensor) -> tuple[int, ...]:
    return tuple((image[:, ::5, ::5] * 1000).round().int().flatten().tolist())


def epoch(loader: Loader, dataset: Dataset, number: int = 0, rank: int = 0, size: int = 1) -> list[int]:
    """Ids of the samples an epoch brings, checked against their labels."""
    known, labels, seen = stored(dataset), dataset.splits["train"].labels, []
    for _, images, found in loader.batches(Sampler(27, 8, seed=0).local_batches(number, rank, size)):
        ids = [known[identity(image)] for image in images]
        np.testing.assert_array_equal(found.numpy(), labels[ids])
        seen += ids
    return seen


def test_alone_every_sample_once_an_epoch_in_another_order(dataset: Dataset) -> None:
    loader = open_train(dataset)
    epochs = [epoch(loader, dataset, number) for number in (0, 1)]
    loader.close()
    assert all(sorted(seen) == list(range(27)) for seen in epochs)
    assert epochs[0] != epochs[1] != list(range(27))


def test_of_a_part_of_the_samples_each_once_with_the_labels_given(dataset: Dataset) -> None:
    """As data.train_images and data.confusion_images make it."""
    whole = dataset.splits["train"]
    ids = np.array([2, 5, 8, 20, 26, 1, 9])
    part = whole.subset(ids)
    part.index["label"] = np.arange(7)
    loader = open_loader(part, config(dataset))
    known = stored(dataset)
    batches = list(loader.batches(Sampler(7, 3, seed=0).local_batches(0, 0, 1)))
    seen = [known[identity(image)] for _, images, _ in batches for image in images]
    assert sorted(seen) == sorted(ids)
    assert [ids[label] for _, _, labels in batches for label in labels.tolist()] == seen
    loader.close()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_shards_of_their_own_and_full_batches(dataset: Dataset, size: int) -> None:
    shard = dataset.splits["train"].index["shard"]
    dealt = []
    for rank in range(size):
        loader = open_train(dataset, rank=rank, world_size=size)
        sampler = Sampler(27, 8, seed=0)
        batches = list(loader.batches(sampler.local_batches(0, rank, size)))
        assert all(len(local_batch.samples) == len(images) == len(labels) for local_batch, images, labels in batches)
        assert [local_batch.step for local_batch, _, _ in batches] == list(range(sampler.steps))
        dealt.append(set(shard[epoch(loader, dataset, 0, rank, size)].tolist()))
        loader.close()
    assert sum(len(shards) for shards in dealt) == 4
    assert set.union(*dealt) == {0, 1, 2, 3}


def test_the_same_seed_gives_the_same_stream_and_augmentation(dataset: Dataset) -> None:
    runs = []
    for _ in range(2):
        loader = open_train(dataset, augmentation="random_resized_crop", seed=9)
        runs.append(torch.cat([images for _, images, _ in loader.batches(Sampler(27, 8, 0).local_batches(3, 0, 1))]))
        loader.close()
    assert torch.equal(*runs)


def test_what_a_stream_cannot_promise_is_refused(dataset: Dataset) -> None:
    loader = open_train(dataset)
    with pytest.raises(ValueError, match="backend webdataset cannot start at step 2 of an epoch"):
        next(loader.batches(Sampler(27, 8, 0).local_batches(0, 0, 1, start=2)))
    with pytest.raises(ValueError, match="cannot see every sample exactly once, as evaluation must"):
        next(loader.batches(evaluation_batches(27, 8, 0, 1)))
    loader.close()
    for more, message in (
        ({"on_error": "skip"}, "cannot skip samples alike on every rank"),
        ({"world_size": 5}, "needs a shard for every rank, got 4 and 5 ranks"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0\.\.1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            open_train(dataset, **more)


def test_faults_of_a_stream(dataset: Dataset, tmp_path: Path) -> None:
    data = (dataset.path / "train" / "000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:9000])
    index = dataset.splits["train"].index[:7]
    damaged = data[: index[0]["offset"]] + bytes(300) + data[index[0]["offset"] + 300 :]
    (tmp_path / "bad.tar").write_bytes(damaged)
    for name, message in (
        ("cut.tar", r"shard .*cut\.tar has 9000 bytes where its index says"),
        ("nothing.tar", r"cannot read .*nothing\.tar, sample 0 at byte \d+: No such file"),
        ("bad.tar", r"cannot decode .*bad\.tar, sample 0 at byte 512"),
    ):
        split = Split("train", (Shard(tmp_path / name, 7, len(data)),), index)
        loader = open_loader(split, config(dataset))
        with pytest.raises(ValueError, match=message):
            list(loader.batches(Sampler(7, 7, 0).local_batches(0, 0, 1)))
        loader.close()
