import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_data_set

from pipelines import Dataset, open_dataset
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
