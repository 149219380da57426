import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_sets import make_folder, picture, shared
from PIL import Image

from pipelines import open_dataset
from pipelines.prepare import Options, prepare
from pipelines.shards import members


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stored(root: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    """Original name -> (JPEG bytes, label), read with tarfile alone."""
    found = {}
    for path in sorted((root / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
        for name, data in files.items():
            if name.endswith(".jpg"):
                key = name.removesuffix(".jpg")
                found[json.loads(files[f"{key}.json"])["name"]] = (data, int(files[f"{key}.cls"]))
    return found


def test_folder_kept_as_it_is(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    prepare(str(source), tmp_path / "data", Options(size=0, shard_size=5, processes=1))
    samples = stored(tmp_path / "data")
    assert len(samples) == 36
    for name, (data, label) in samples.items():
        assert data == (source / name).read_bytes()
        assert name.startswith(("cat", "dog", "owl")[label])
    names = list(samples)
    assert names != sorted(names)
    dataset = open_dataset(tmp_path / "data")
    stack = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data, _ in samples.values()]) / 255
    np.testing.assert_allclose(dataset.mean, stack.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, stack.std(axis=(0, 1, 2)), rtol=1e-12)


def test_resized(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=2, height=50, width=70)
    prepare(str(source), tmp_path / "data", Options(size=24, processes=1))
    for name, (data, _) in stored(tmp_path / "data").items():
        expected = Image.open(source / name).resize((24, 24), Image.Resampling.LANCZOS).convert("L")
        image = Image.open(io.BytesIO(data)).convert("L")
        assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean() < 2


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives_give_the_shards_of_the_folder(tmp_path: Path, kind: str) -> None:
    source = make_folder(tmp_path / "inside" / "pictures" / "train")
    make_folder(tmp_path / "inside" / "pictures" / "val", per_class=2)
    archive = tmp_path / f"archive.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in source.parent.rglob("*.jpg"):
                file.write(path, path.relative_to(tmp_path / "inside"))
    else:
        with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as file:  # type: ignore[call-overload]
            file.add(tmp_path / "inside", arcname=".")
    options = Options(size=0, processes=1)
    prepare(str(archive), tmp_path / "from_archive", options)
    prepare(str(tmp_path / "inside"), tmp_path / "from_folder", options)
    assert {name: split.labels.tolist() for name, split in open_dataset(tmp_path / "from_archive").splits.items()} == {
        name: split.labels.tolist() for name, split in open_dataset(tmp_path / "from_folder").splits.items()
    }
    assert set(stored(tmp_path / "from_archive", "test").values()) == set(
        stored(tmp_path / "from_folder", "test").values()
    )
    assert len(stored(tmp_path / "from_archive", "test")) == 6


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
    prepare(str(source), tmp_path / "data", Options(quality=95, processes=1))
    assert open_dataset(tmp_path / "data").classes == ["0", "1", "2", "3"]
    for split, first in (("train", 0), ("test", 15)):
        for name, (data, label) in stored(tmp_path / "data", split).items():
            number = first + int(name.split("/")[1])
            image = Image.open(io.BytesIO(data))
            assert image.mode == "L"
            assert label == labels[number]
            np.testing.assert_allclose(np.asarray(image, float), images[number], atol=12)
    (source / "train-images-idx3-ubyte").write_bytes(b"short")
    with pytest.raises(ValueError, match="is not an IDX file of 3 dimensions"):
        prepare(str(source), tmp_path / "other", Options(processes=1))


def test_index_files_point_at_the_members(tmp_path: Path) -> None:
    prepare(str(make_folder(tmp_path / "source")), tmp_path / "data", Options(size=0, shard_size=5, processes=1))
    for path in sorted((tmp_path / "data" / "train").glob("*.tar")):
        lines = path.with_suffix(".idx").read_text().splitlines()
        fields = [line.split(" ") for line in lines[1:]]
        assert lines[0] == f"v1.2 {len(fields)}"
        listed = [
            (line[at + 3], int(line[at + 1]), int(line[at + 2])) for line in fields for at in range(0, len(line), 4)
        ]
        assert listed == [(member.name, member.offset, member.size) for member in members(path)]


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    prepare(str(make_folder(tmp_path / "source")), tmp_path / "data", Options(size=0, processes=1))
    shard = str(tmp_path / "data" / "train" / "000000.tar")
    read = {s["json"]["name"]: s["cls"] for s in webdataset.WebDataset(shard, shardshuffle=False).decode()}
    assert read == {name: label for name, (_, label) in stored(tmp_path / "data").items()}


def test_cifar10(tmp_path: Path) -> None:
    result = run(shared("cifar10-jpeg.tar.gz"), tmp_path / "data", "size=0")
    assert result.returncode == 0, result.stderr
    dataset = open_dataset(tmp_path / "data")
    assert {name: np.bincount(split.labels).tolist() for name, split in dataset.splits.items()} == {
        "train": [5000] * 10,
        "test": [1000] * 10,
    }
    # The published statistics of CIFAR-10's training images.
    np.testing.assert_allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=3e-4)
    again = run(shared("cifar10-jpeg.tar.gz"), tmp_path / "data", "size=0")
    assert again.stdout.startswith("already there")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar at all")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("mine")
    for arguments, message in (
        ((), "usage: python -m pipelines.prepare SOURCE DEST"),
        ((tmp_path / "nothing", tmp_path / "data"), "no such source"),
        ((tmp_path / "empty", tmp_path / "data"), "holds no images in class folders"),
        ((tmp_path / "text.tar", tmp_path / "data"), "is not a readable tar"),
        ((source, tmp_path / "data", "sizes=3"), "unknown option sizes; did you mean size?"),
        ((source, tmp_path / "data", "size=large"), "size"),
        ((source, tmp_path / "data", "quality=0"), "quality must be in 1..100, got 0"),
        ((source, tmp_path / "occupied"), "exists and is not a data set"),
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "data").exists()


def test_the_same_command_again_is_no_mistake_another_one_is(tmp_path: Path) -> None:
    source = os.fspath(make_folder(tmp_path / "source", per_class=1))
    prepare(source, tmp_path / "data", Options(size=0, processes=1))
    before = contents(tmp_path / "data")
    assert prepare(source, tmp_path / "data", Options(size=0, processes=1)).startswith("already there")
    with pytest.raises(ValueError, match="holds another source or other options"):
        prepare(source, tmp_path / "data", Options(size=16, processes=1))
    assert contents(tmp_path / "data") == before
