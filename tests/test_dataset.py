import errno
import json
import os
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_data_set

from benchmarks.scale import write_data_set
from pipelines import Dataset, Sampler, open_dataset
from pipelines.format import dataset as dataset_module
from pipelines.format.dataset import INDEX
from pipelines.loaders.reader import Files


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_data_set(tmp_path)


def edit_manifest(dataset: Dataset, **changes: object) -> None:
    path = dataset.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(dataset: Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(dataset.path)


def test_open(dataset: Dataset) -> None:
    assert dataset.classes == ["cat", "dog", "owl"]
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 27, "test": 9}
    assert np.bincount(dataset.splits["train"].labels).tolist() == [9, 9, 9]
    assert [shard.samples for shard in dataset.splits["train"].shards] == [7, 7, 7, 6]
    assert open_dataset(dataset.path).fingerprint == dataset.fingerprint


def test_a_subset_reads_the_same_samples(dataset: Dataset) -> None:
    split = dataset.splits["train"]
    ids = np.array([20, 3, 11])
    subset = split.subset(ids)
    assert len(subset) == 3
    np.testing.assert_array_equal(subset.labels, split.labels[ids])
    assert [Files(subset, 1).read(sample) for sample in range(3)] == [Files(split, 1).read(sample) for sample in ids]
    with pytest.raises(ValueError, match=r"ids of a subset must be in 0\.\.26, got 3\.\.27"):
        split.subset(np.array([3, 27]))


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no data set at .*make one with: python -m pipelines\.prepare"):
        open_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has neither manifest\.json nor \.tar shards"):
        open_dataset(tmp_path)


def test_a_missing_shard(dataset: Dataset) -> None:
    path = dataset.splits["train"].shards[1].path
    path.unlink()
    refused(dataset, f"shard {re.escape(os.fspath(path))} cannot be opened")


def test_a_truncated_or_emptied_shard(dataset: Dataset) -> None:
    path = dataset.splits["train"].shards[1].path
    os.truncate(path, 5000)
    refused(dataset, f"{re.escape(os.fspath(path))} has 5000 bytes where its index says")
    os.truncate(path, 0)
    refused(dataset, "has 0 bytes where")


def test_a_damaged_index(dataset: Dataset) -> None:
    path = dataset.path / "train" / INDEX
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(dataset, "is not the index that manifest.json describes")
    path.write_bytes(data[:50])
    refused(dataset, "cannot be read")


def test_a_label_out_of_range(dataset: Dataset) -> None:
    edit_manifest(dataset, classes=["cat", "dog"])
    refused(dataset, r"labels 0\.\.2, out of range for 2 classes")


def test_a_damaged_manifest(dataset: Dataset) -> None:
    edit_manifest(dataset, format=99)
    refused(dataset, "has format 99")
    edit_manifest(dataset, format=1, splits={})
    refused(dataset, "empty")
    edit_manifest(dataset, splits={"train": {}})
    refused(dataset, "is damaged")
    (dataset.path / "manifest.json").write_text("{")
    refused(dataset, "cannot be read")


def test_a_shard_replaced_under_a_reader(dataset: Dataset) -> None:
    split = dataset.splits["train"]
    shard = split.shards[0]
    data = shard.path.read_bytes()
    shard.path.write_bytes(bytes(len(data)))
    with pytest.raises(ValueError, match=f"index and shard disagree at {re.escape(os.fspath(shard.path))}, sample 2"):
        Files(split, 1).read(2)
    shard.path.write_bytes(data[:-512])
    with pytest.raises(ValueError, match="truncated or replaced"):
        Files(split, 1).read(2)
    shard.path.unlink()
    with pytest.raises(ValueError, match="No such file"):
        Files(split, 1).read(2)


def test_open_files_are_bounded(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.loaders.reader._OPEN_FILES", 2)
    split = dataset.splits["train"]
    files = Files(split, threads=1)
    opened = set()
    for sample in [*range(27), *range(27)]:
        files.read(sample)
        links = [os.path.realpath(f"/proc/self/fd/{descriptor}") for descriptor in os.listdir("/proc/self/fd")]
        now = [link for link in links if link.startswith(str(dataset.path)) and link.endswith(".tar")]
        assert len(now) <= 2
        opened.update(now)
    assert opened == {str(shard.path) for shard in split.shards}


def test_a_directory_that_may_not_be_read(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", denied)
        with pytest.raises(ValueError, match=r"no data set at .* \(Permission denied\)"):
            open_dataset(dataset.path)
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read .*Permission denied"):
        open_dataset(dataset.path)


def test_a_large_index_is_verified_once_a_machine(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(dataset.path.parent / "cache"))
    monkeypatch.setattr("pipelines.format.dataset._LARGE_BYTES", 0)
    verified = []
    verify = dataset_module._verify
    monkeypatch.setattr(dataset_module, "_verify", lambda path, *rest: (verified.append(path), verify(path, *rest)))
    path = dataset.path / "train" / INDEX

    def times() -> int:
        verified.clear()
        open_dataset(dataset.path)
        return verified.count(path)

    assert [times(), times()] == [1, 0]
    # Again after any change, also one that keeps size and time of modification, and by another manifest.
    os.utime(path, ns=(1, 1))
    assert [times(), times()] == [1, 0]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + b"\1")
    os.utime(path, ns=(1, 1))
    refused(dataset, "is not the index that manifest.json describes")
    path.write_bytes(data)
    assert [times(), times()] == [1, 0]
    edit_manifest(dataset, classes=["cat", "dog"])
    refused(dataset, r"labels 0\.\.2, out of range for 2 classes")
    edit_manifest(dataset, classes=["cat", "dog", "owl"])
    # Where the cache cannot be written to, every process verifies.
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert [times(), times()] == [1, 1]


@pytest.mark.parametrize("large_bytes", [0, 1 << 40])
def test_opening_an_index_takes_memory_for_a_small_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_bytes: int
) -> None:
    samples = 500_000  # an index of 14 MB
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    monkeypatch.setattr(dataset_module, "_LARGE_BYTES", large_bytes)
    monkeypatch.setattr(dataset_module, "_CHUNK", 1000)
    write_data_set(tmp_path / "data", samples, 10_000)
    for _ in range(2):
        tracemalloc.start()
        split = open_dataset(tmp_path / "data").splits["train"]
        assert split.sides == (128, 128)
        assert split.shard_sizes.tolist() == [10_000] * 50
        batch = Sampler(samples, 96 * 64, 0).local_batch(0, 0, 5, 64)
        assert (split.labels[batch.samples] == batch.samples % 1000).all()
        assert (split.index["offset"][batch.samples] == 512 + 2048 * (batch.samples % 10_000)).all()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1e6


@pytest.mark.parametrize("chunk", [1, 4, 27])
def test_a_fault_anywhere_in_the_index_is_found(dataset: Dataset, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(dataset_module, "_CHUNK", chunk)
    split = dataset.splits["train"]
    dataset_module.check_index(Path("x"), split.shards, dataset_module.chunks(split.index), 3)
    for row in (0, 13, 26):
        for field, value, message in (
            ("shard", 4, "x names a shard that does not exist"),
            ("shard", -1, "x names a shard that does not exist"),
            ("label", 3, r"x has labels 0\.\.3, out of range for 3 classes"),
            ("label", -1, r"x has labels -1\.\.2, out of range for 3 classes"),
            ("offset", 100, r"x points outside of .*0000\d+\.tar"),
            ("size", -1, r"x points outside of .*0000\d+\.tar"),
            ("size", 1 << 24, r"x points outside of .*0000\d+\.tar"),
        ):
            index = split.index.copy()
            index[field][row] = value
            with pytest.raises(ValueError, match=message):
                dataset_module.check_index(Path("x"), split.shards, dataset_module.chunks(index), 3)
        rows = np.delete(split.index, row)
        with pytest.raises(ValueError, match="x has 26 samples where the manifest counts another number"):
            dataset_module.check_index(Path("x"), split.shards, dataset_module.chunks(rows), 3)
        index = split.index.copy()
        index["height"][row] += 1
        assert split.sides == (32, 32)
        assert replace(split, index=index).sides is None


def test_shard_sizes_of_parts(dataset: Dataset) -> None:
    split = dataset.splits["train"]
    assert split.shard_sizes.tolist() == [7, 7, 7, 6]
    assert split.subset(np.array([0, 1, 7, 20, 26, 2])).shard_sizes.tolist() == [2, 1, 1, 1, 1]
    assert split.subset(np.array([], int)).shard_sizes.tolist() == []
