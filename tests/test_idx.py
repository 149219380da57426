import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
from data_sets import picture, stored
from PIL import Image

from pipelines import open_dataset
from pipelines.prepare import Options, prepare


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray) -> None:
    head = bytes([0, 0, 8, 3]) + b"".join(side.to_bytes(4, "big") for side in images.shape)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
    head = bytes([0, 0, 8, 1]) + len(labels).to_bytes(4, "big")
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def test_idx_files(tmp_path: Path) -> None:
    images = np.stack([picture(number, 28, 28)[..., 0] for number in range(20)])
    labels = (np.arange(20) % 4).astype(np.uint8)
    source = tmp_path / "source"
    source.mkdir()
    write_idx(source, "train", images[:15], labels[:15])
    write_idx(source, "t10k", images[15:], labels[15:])
    prepare(str(source), tmp_path / "data", Options(processes=1))
    assert open_dataset(tmp_path / "data").classes == ["0", "1", "2", "3"]
    for split, first in (("train", 0), ("test", 15)):
        for name, (data, label) in stored(tmp_path / "data", split).items():
            number = first + int(name.split("/")[1])
            image = Image.open(io.BytesIO(data))
            assert image.mode == "L"
            assert label == labels[number]
            assert (np.asarray(image) == images[number]).all()
    (source / "train-images-idx3-ubyte").write_bytes(b"short")
    with pytest.raises(ValueError, match="is not an IDX file of 3 dimensions"):
        prepare(str(source), tmp_path / "other", Options(processes=1))


@pytest.mark.parametrize(
    "names",
    [
        "{0}-images.idx3-ubyte {0}-labels.idx1-ubyte",
        "MNIST/raw/{0}-images-idx3-ubyte MNIST/raw/{0}-labels-idx1-ubyte",
        "{0}-images-idx3-ubyte/{0}-images-idx3-ubyte {0}-labels-idx1-ubyte/{0}-labels-idx1-ubyte",
    ],
)
def test_names_of_idx_files(tmp_path: Path, names: str) -> None:
    plain, source = tmp_path / "plain", tmp_path / "source"
    plain.mkdir()
    for prefix in ("train", "t10k"):
        write_idx(plain, prefix, np.stack([picture(k, 28, 28)[..., 0] for k in range(4)]), np.arange(4, dtype=np.uint8))
        for old, new in zip(("images-idx3", "labels-idx1"), names.format(prefix).split(), strict=True):
            (source / new).parent.mkdir(parents=True, exist_ok=True)
            (source / new).write_bytes((plain / f"{prefix}-{old}-ubyte").read_bytes())
    for name in ("plain", "source"):
        prepare(str(tmp_path / name), tmp_path / f"{name}-data", Options(processes=1))
    assert stored(tmp_path / "source-data", "test") == stored(tmp_path / "plain-data", "test")
    assert len(stored(tmp_path / "source-data")) == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["emnist-letters-train-images-idx3-ubyte"],
            "whose name is not of MNIST: rename it to train-images-idx3-ubyte",
        ),
        (["train-images-idx3-ubyte.zip"], "whose name is not of MNIST"),
        (["train-images-idx3-ubyte"], r"has no train-labels-idx1-ubyte\[.gz\]"),
        (["t10k-images-idx3-ubyte"], r"has no train-images-idx3-ubyte\[.gz\]"),
        (
            ["a/train-images-idx3-ubyte", "b/train-images-idx3-ubyte"],
            "has IDX files in several folders, a, b; give one",
        ),
    ],
)
def test_idx_files_that_are_not_understood(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        prepare(str(tmp_path / "source"), tmp_path / "data", Options(processes=1))


def fake_command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_fashion_mnist_comes_from_its_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "package" / "fashion-mnist"
    files.mkdir(parents=True)
    images = np.stack([picture(number, 28, 28)[..., 0] for number in range(30)])
    labels = (np.arange(30) % 10).astype(np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(files, prefix, images, labels)
        for path in list(files.glob(f"{prefix}*ubyte")):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    fake_command(tmp_path / "bin", "apt-get", '[ "$*" = "download dataset-fashion-mnist" ] && echo > dataset_1_all.deb')
    unpack = f'[ "$1" = -x ] && mkdir -p "$3/usr/share/datasets" && cp -r {files} "$3/usr/share/datasets"'
    fake_command(tmp_path / "bin", "dpkg-deb", unpack)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    prepare("fashion-mnist", tmp_path / "data", Options(processes=1))
    dataset = open_dataset(tmp_path / "data")
    assert dataset.classes[0] == "T-shirt/top"
    assert dataset.classes[9] == "Ankle boot"
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 30, "test": 30}
    assert set(dataset.splits["train"].index["height"]) == {28}


def test_fashion_mnist_that_cannot_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(tmp_path / "bin", "apt-get", "echo 'E: Unable to locate package dataset-fashion-mnist' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    message = "cannot fetch fashion-mnist, apt-get failed: E: Unable to locate package .*; give a folder"
    with pytest.raises(ValueError, match=message):
        prepare("fashion-mnist", tmp_path / "data", Options(processes=1))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="needs apt-get and dpkg-deb; give a folder with its four IDX files instead"):
        prepare("fashion-mnist", tmp_path / "data", Options(processes=1))
    assert not list(tmp_path.glob("data*"))
