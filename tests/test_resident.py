"""The backend "resident": to the last bit what "torch" gives, from images that are decoded once."""

import gc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import make_data_set

from pipelines import Dataset, Loader, LoaderConfig, LocalBatch, Sampler, evaluation_batches, open_loader
from pipelines.loaders import resident

OFFERED = ("none", "flip", "crop1_flip", "crop4_flip")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_data_set(tmp_path_factory.mktemp("resident"))


def config_of(dataset: Dataset, **settings: object) -> LoaderConfig:
    given = {"size": 32, "seed": 5, "batch_size": 32, "device": torch.device("cpu"), "backend": "resident", **settings}
    return LoaderConfig(mean=dataset.mean, std=dataset.std, **given)  # type: ignore[arg-type]


def open_train(dataset: Dataset, **settings: object) -> Loader:
    return open_loader(dataset.splits["train"], config_of(dataset, **settings))


def overwrite(dataset: Dataset, sample: int) -> None:
    entry = dataset.splits["train"].index[sample]
    with dataset.splits["train"].shards[entry["shard"]].path.open("r+b") as file:
        file.seek(int(entry["offset"]))
        file.write(bytes(int(entry["size"])))


@pytest.mark.parametrize("augmentation", OFFERED)
def test_batches_are_those_of_torch_at_any_world_size_and_start(dataset: Dataset, augmentation: str) -> None:
    sampler = Sampler(len(dataset.splits["train"]), 8, seed=2)
    loaders = [open_train(dataset, backend=backend, augmentation=augmentation) for backend in ("torch", "resident")]
    for epoch, rank, size, start in ((0, 0, 1, 0), (1, 0, 1, 2), (1, 0, 3, 0), (1, 2, 3, 1), (2, 7, 8, 0)):
        expected, found = (list(loader.batches(sampler.local_batches(epoch, rank, size, start))) for loader in loaders)
        assert len(found) == sampler.steps - start
        for (_, images, labels), (_, others, other_labels) in zip(expected, found, strict=True):
            assert (others.dtype, other_labels.dtype) == (torch.float32, torch.int64)
            assert others.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)
    for loader in loaders:
        loader.close()


def test_tensors_belong_to_the_caller_and_iterations_end(dataset: Dataset) -> None:
    loader = open_train(dataset, augmentation="flip")
    nothing = LocalBatch(0, 0, np.arange(0), np.arange(0), 3)
    local_batches = [nothing, *evaluation_batches(27, 10, 0, 1)]
    first = [(images, images.clone(), labels, labels.clone()) for _, images, labels in loader.batches(local_batches)]
    assert first[0][0].shape == (0, 3, 32, 32)
    for images, _, labels, _ in first:
        images.zero_()
        labels.fill_(-1)
    again = loader.batches(local_batches)
    for (_, kept, _, kept_labels), (_, images, labels) in zip(first, again, strict=True):
        assert torch.equal(images, kept)
        assert torch.equal(labels, kept_labels)
    abandoned = loader.batches(local_batches)
    next(abandoned)
    next(loader.batches(local_batches))
    with pytest.raises(RuntimeError, match="ended when another one"):
        next(abandoned)
    with pytest.raises(ValueError, match="batch_size must hold the largest local batch, got 32 and 33"):
        next(loader.batches([LocalBatch(0, 0, np.arange(33) % 27, np.arange(33), 33)]))
    batches = loader.batches(local_batches)
    loader.close()
    with pytest.raises(RuntimeError, match="or it was closed"):
        next(batches)


def test_loaders_of_a_split_share_its_images_until_both_are_closed(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []

    def counted(*given: object, real: type = resident.TorchLoader, **more: object) -> object:
        decoded.append(1)
        return real(*given, **more)

    monkeypatch.setattr(resident, "TorchLoader", counted)
    augmented, plain = open_train(dataset, augmentation="crop4_flip"), open_train(dataset)
    assert len(decoded) == 1
    augmented.close()
    assert sum(len(labels) for _, _, labels in plain.batches(evaluation_batches(27, 10, 0, 1))) == 27
    again = open_train(dataset)
    assert len(decoded) == 1
    plain.close()
    again.close()
    gc.collect()
    open_train(dataset).close()
    assert len(decoded) == 2


def test_a_subset_has_its_own_images_and_labels(dataset: Dataset) -> None:
    split = dataset.splits["train"].subset(np.array([20, 3, 11]))
    split.index["label"] = [7, 8, 9]
    pairs = []
    for backend in ("torch", "resident"):
        loader = open_loader(split, config_of(dataset, backend=backend))
        pairs.append(next(loader.batches(evaluation_batches(3, 3, 0, 1)))[1:])
        loader.close()
    assert torch.equal(pairs[0][0], pairs[1][0])
    assert pairs[1][1].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"augmentation": "random_resized_crop"}, "augmentation=random_resized_crop"),
        ({"augmentation": "center_crop"}, "augmentation=center_crop"),
        ({"color_jitter": 0.2}, "color_jitter=0.2"),
        ({"size": 28}, "size 28 and images stored 32 x 32"),
    ],
)
def test_what_needs_more_than_flips_and_shifts_is_refused(
    dataset: Dataset, settings: dict[str, object], got: str
) -> None:
    with pytest.raises(ValueError, match=f"at the size they are stored at, got {got}: use torch or dali$"):
        open_train(dataset, **settings)


def test_images_of_unequal_sizes_are_refused(dataset: Dataset) -> None:
    split = dataset.splits["train"]
    index = split.index.copy()
    index["height"][3] = 40
    with pytest.raises(ValueError, match=r"got size 32 and images stored of unequal sizes: use torch or dali$"):
        open_loader(replace(split, index=index), config_of(dataset))


def test_what_does_not_fit_is_refused_with_bytes_needed_and_free(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "free_memory", lambda: 2 * 82_900)
    message = (
        r"resident needs 82,947 bytes for the 27 images of train, 82,900 are free for each rank of this machine: use"
    )
    with pytest.raises(ValueError, match=message):
        open_train(dataset, local_size=2)
    open_train(dataset).close()  # alone on the machine
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 80_000_000_000))
    with pytest.raises(
        ValueError, match="82,947 bytes for the 27 images of train, 1,000 are free for cuda:1: use torch"
    ):
        open_train(dataset, device=torch.device("cuda", 1))


def test_a_damaged_sample_is_reported_at_the_start(tmp_path: Path) -> None:
    dataset = make_data_set(tmp_path)
    overwrite(dataset, 20)
    with pytest.raises(ValueError, match=r"cannot decode .*sample 20"):
        open_train(dataset)


def test_skip_puts_the_substitutes_of_torch_and_counts_them_when_met(tmp_path: Path) -> None:
    dataset = make_data_set(tmp_path)
    for sample in (4, 5, 26):
        overwrite(dataset, sample)
    sampler = Sampler(27, 8, seed=2)
    loaders = [
        open_train(dataset, backend=backend, augmentation="crop4_flip", on_error="skip", prefetch=1)
        for backend in ("torch", "resident")
    ]
    met: set[int] = set()
    for (batch, images, labels), (_, others, other_labels) in zip(
        *(loader.batches(sampler.local_batches(0, 0, 1)) for loader in loaders), strict=True
    ):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)
        met |= {4, 5, 26} & set(batch.samples.tolist())
        assert set(loaders[1].skipped) == met
    assert loaders[0].skipped == loaders[1].skipped
    for loader in loaders:
        loader.close()


def test_batches_reach_another_device(dataset: Dataset) -> None:
    loader = open_train(dataset, device=torch.device("meta"), augmentation="crop1_flip")
    for local_batch, images, labels in loader.batches(evaluation_batches(27, 10, 0, 1)):
        assert images.device.type == labels.device.type == "meta"
        assert images.shape == (len(local_batch.samples), 3, 32, 32)
    loader.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("augmentation", OFFERED)
def test_on_a_gpu_the_same_without_waiting_for_it(dataset: Dataset, augmentation: str) -> None:
    sampler = Sampler(27, 8, seed=2)
    plain = open_train(dataset, augmentation=augmentation, backend="torch")
    loader = open_train(dataset, augmentation=augmentation, device=torch.device("cuda", 0))
    expected = list(plain.batches(sampler.local_batches(0, 0, 1)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [(images, labels) for _, images, labels in loader.batches(sampler.local_batches(0, 0, 1))]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (_, images, labels), (others, other_labels) in zip(expected, found, strict=True):
        assert torch.equal(images, others.cpu())
        assert torch.equal(labels, other_labels.cpu())
    for each in (plain, loader):
        each.close()
