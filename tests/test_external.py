import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from data_sets import jpeg, picture
from PIL import Image

from pipelines import LoaderConfig, evaluation_batches, open_dataset, open_loader
from pipelines.loaders.reader import Files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **more) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def first_batch(root: Path, split: str = "train", backend: str = "torch") -> tuple[np.ndarray, list[int]]:
    """Pixels 0..255 (B, 32, 32, 3) and labels of the first sixteen samples."""
    config = LoaderConfig(
        backend=backend,  # type: ignore[arg-type]
        size=32,
        mean=(0, 0, 0),
        std=(1 / 255,) * 3,  # type: ignore[arg-type]
        batch_size=16,
        device=torch.device("cpu"),
    )
    loader = open_loader(open_dataset(root).splits[split], config)
    local_batch = next(evaluation_batches(min(16, len(open_dataset(root).splits[split])), 16, 0, 1))
    _, images, labels = next(loader.batches([local_batch]))
    loader.close()
    return images.permute(0, 2, 3, 1).numpy(), labels.tolist()


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_shards_of_the_webdataset_library(tmp_path: Path, backend: str) -> None:
    for number in range(3):
        (tmp_path / "data").mkdir(exist_ok=True)
        with webdataset.TarWriter(str(tmp_path / "data" / f"imagenet1k-train-{number:04d}.tar")) as writer:
            for key in range(4):
                label = 4 * number + key
                writer.write(
                    {"__key__": f"n{key:08d}_{label}", "jpg": jpeg(label), "cls": label, "json": {"label": 99}}
                )
    with webdataset.TarWriter(str(tmp_path / "data" / "imagenet1k-validation-00.tar")) as writer:
        writer.write({"__key__": "val/a", "png": png(50), "cls": 2})
    dataset = open_dataset(tmp_path / "data")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 12, "test": 1}
    assert len(dataset.classes) == 12
    images, labels = first_batch(tmp_path / "data", backend=backend)
    assert labels == list(range(12))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(jpeg(label)))) for label in labels])
    np.testing.assert_allclose(images, expected, atol=1.01)
    images, labels = first_batch(tmp_path / "data", "test", backend)
    assert labels == [2]
    np.testing.assert_allclose(images[0], picture(50), atol=0.01)


@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar", "v7"])
def test_shards_of_tar_itself(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "files" / ("deep" if kind in ("ustar", "v7") else "d" * 120)
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"img.{number}.v2.JPEG").write_bytes(jpeg(number))
        (folder / f"img.{number}.v2.json").write_text(json.dumps({"caption": "ünï", "label": number % 3}))
        (folder / f"._img.{number}.v2.JPEG").write_bytes(b"resource fork")
    (folder / "README").write_text("no sample")
    (tmp_path / "data" / "val").mkdir(parents=True)
    shard = tmp_path / "data" / "val" / "a.tar"
    command = ["tar", f"--format={kind}", "--sort=name", "-cf", shard, "-C", tmp_path / "files", "."]
    subprocess.run([*map(str, command)], check=True)
    split = open_dataset(tmp_path / "data").splits["test"]
    assert split.labels.tolist() == [0, 1, 2, 0, 1]
    assert [Files(split, 1).read(sample) for sample in range(5)] == [jpeg(number) for number in range(5)]


def test_the_index_is_built_once_and_again_when_a_shard_changes(tmp_path: Path, cache: Path) -> None:
    shard = tmp_path / "data" / "0.tar"
    write_tar(shard, [("a.jpg", jpeg(1)), ("a.cls", b"1")])
    fingerprint = open_dataset(tmp_path / "data").fingerprint
    built = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert open_dataset(tmp_path / "data").fingerprint == fingerprint
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")} == built
    write_tar(shard, [("a.jpg", jpeg(1)), ("a.cls", b"0"), ("b.jpg", jpeg(2)), ("b.cls", b"01\n")])
    dataset = open_dataset(tmp_path / "data")
    assert dataset.splits["train"].labels.tolist() == [0, 1]
    assert dataset.fingerprint != fingerprint


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", jpeg(1))], r"a has an image but no label; a member a\.cls or \.json is needed"),
        ([("a.jpg", jpeg(1)), ("a.cls", b"dog")], r"a\.cls holds no label \(b'dog'\)"),
        ([("a.jpg", jpeg(1)), ("a.cls", b"-1")], r"a\.cls holds no label \(b'-1'\)"),
        ([("a.jpg", jpeg(1)), ("a.json", b'{"caption": 3}')], r"a\.json holds no label"),
        ([("a.cls", b"1"), ("a.txt", b"text")], r"holds no \.jpg, \.jpeg or \.png image"),
    ],
)
def test_bad_members(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "data" / "0.tar", members)
    with pytest.raises(ValueError, match=rf"0\.tar.*{message}"):
        open_dataset(tmp_path / "data")


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    shard = tmp_path / "data" / "0.tar"
    write_tar(shard, [("a.jpg", jpeg(1)), ("a.cls", b"1"), ("b.jpg", jpeg(2)), ("b.cls", b"1")])
    whole = shard.read_bytes()
    for cut in (0, 700, 1024, 512 * 5, 512 * 6, 512 * 7 + 100):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"0\.tar (is truncated|is not a readable tar)"):
            open_dataset(tmp_path / "data")
    shard.write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(ValueError, match=r"0\.tar is not a readable tar .*uncompressed"):
        open_dataset(tmp_path / "data")


def test_a_member_without_content_is_a_fault_of_that_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", jpeg(2)), ("b.cls", b"0")])
    with pytest.raises(ValueError, match=r"zero bytes: .*0\.tar, sample 0"):
        first_batch(tmp_path / "data")


def test_an_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "data" / "0.tar", [("a.jpg", jpeg(1)), ("a.cls", b"1")])
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(ValueError, match="XDG_CACHE_HOME must name a writable folder"):
        open_dataset(tmp_path / "data")
