import errno
import fcntl
import gzip
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from data_sets import jpeg, make_folder, picture, shared
from PIL import Image

from pipelines import cli, open_dataset
from pipelines.prepare import Options, main, prepare
from pipelines.shards import members


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stored(root: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    """Original name -> (image bytes, label), read with tarfile alone."""
    found = {}
    for path in sorted((root / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
        for name, data in files.items():
            key, _, extension = name.partition(".")
            if extension in ("jpg", "png"):
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


def test_a_shard_is_the_tar_that_tarfile_writes(tmp_path: Path) -> None:
    prepare(str(make_folder(tmp_path / "source")), tmp_path / "data", Options(processes=1))
    for shard in (tmp_path / "data").glob("*/*.tar"):
        expected = io.BytesIO()
        with (
            tarfile.open(shard) as ours,
            tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as theirs,
        ):
            for member in ours:
                entry = tarfile.TarInfo(member.name)
                entry.size = member.size
                theirs.addfile(entry, ours.extractfile(member))
        assert shard.read_bytes() == expected.getvalue()


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


def make_varied(root: Path) -> Path:
    make_folder(root, per_class=30)
    (root / "cat" / "broken.jpg").write_bytes(jpeg(1)[:-200])
    (root / "dog" / "empty.jpg").write_bytes(b"")
    return root


def test_shards_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    source = make_varied(tmp_path / "source")
    for processes in (1, 4):
        dest = tmp_path / str(processes) / "data"
        dest.parent.mkdir()
        prepare(str(source), dest, Options(size=24, shard_size=11, test_fraction=0.2, processes=processes))
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    assert len(list((tmp_path / "1").rglob("*.tar"))) == 9


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


@pytest.mark.parametrize("cut", [False, True])
def test_an_interruption_at_any_instant_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    source = make_varied(tmp_path / "source")
    options = Options(size=16, shard_size=20, test_fraction=0.2, processes=1)
    prepare(str(source), tmp_path / "whole", options)
    expected = contents(tmp_path / "whole")
    remaining = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise Killed
            return function(*arguments, **more)

        return call

    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them would take a minute
    for module, name in ((os, "fsync"), (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    dest = tmp_path / "data"
    for instant in range(1, 200):
        remaining = instant
        try:
            prepare(str(source), dest, options)
        except Killed:
            remaining = 0
            assert not dest.exists() or open_dataset(dest)
            journal = tmp_path / "data.partial" / "journal.jsonl"
            if cut and journal.exists() and len(journal.read_bytes().splitlines()) > 1:
                journal.write_bytes(journal.read_bytes()[:-7])
            prepare(str(source), dest, options)
            found = contents(dest)
            found.pop("journal.jsonl", None)
            assert found == expected
            assert not (tmp_path / "data.partial").exists()
            shutil.rmtree(dest)
        else:
            break
    assert 30 < instant < 200


def test_a_killed_run_continues_where_it_was(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=300)
    command = [sys.executable, "-m", "pipelines.prepare", source, tmp_path / "data", "size=32", "shard_size=50"]
    with subprocess.Popen([*map(str, command), "processes=2"], cwd=Path(__file__).parents[1]) as process:
        while len(list(tmp_path.glob("data.partial/train/*.tar"))) < 4:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("data.partial/train/*.tar")}
    assert 4 <= len(kept) < 18
    result = run(source, tmp_path / "data", "size=32", "shard_size=50")
    assert result.returncode == 0, result.stderr
    same = [(tmp_path / "data" / "train" / path.name).stat().st_mtime_ns == kept[path] for path in kept]
    assert sum(same) >= len(kept) - 1  # the last may have been renamed but not yet recorded
    prepare(str(source), tmp_path / "other", Options(size=32, shard_size=50, processes=1))
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


def test_what_another_preparation_left_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(make_folder(tmp_path / "source", per_class=5))
    monkeypatch.setattr("pipelines.prepare._finish_split", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "data", Options(size=16, processes=1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="was left by another source or other options; remove it to start anew"):
        prepare(source, tmp_path / "data", Options(size=24, processes=1))


def test_two_preparations_at_once_are_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=2)
    (tmp_path / "data.partial").mkdir()
    with (tmp_path / "data.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another preparation is writing"):
            prepare(str(source), tmp_path / "data", Options(size=16, processes=1))


def test_a_full_disk_is_one_line_and_can_be_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_folder(tmp_path / "source"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(sys, "argv", ["", source, str(tmp_path / "data"), "size=16", "processes=1"])
    with pytest.raises(SystemExit, match="2"):
        cli.run("pipelines.prepare", main)
    assert capsys.readouterr().err == "pipelines.prepare: [Errno 28] No space left on device\n"
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    prepare(source, tmp_path / "data", Options(size=16, processes=1))
    assert len(stored(tmp_path / "data")) == 36


def encoded(image: Image.Image, kind: str, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(1000)))
    packed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_bad_files_are_left_out_and_listed(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    bad = {
        "cat/zero.jpg": (b"", "zero bytes"),
        "cat/cut.jpg": (jpeg(1)[:-300], "truncated"),
        "dog/page.jpg": (b"<html>502 Bad Gateway</html>", "not an image"),
        "dog/bomb.png": (bomb(60_000), "more than 100000000 pixels"),
        "dog/small-bomb.png": (bomb(11_000), "11000 x 11000 pixels, more than 100000000"),
        "owl/notes.txt": (b"to do", "not an image"),
        "owl/cut.png": (encoded(Image.fromarray(picture(1)), "PNG")[:-900], "cannot be decoded"),
    }
    for name, (data, _) in bad.items():
        (source / name).write_bytes(data)
    (source / "owl" / "link.jpg").symlink_to("nowhere")
    os.mkfifo(source / "owl" / "pipe.jpg")
    result = run(source, tmp_path / "data", "size=0", "shard_size=10")
    assert result.returncode == 0, result.stderr
    assert "8 files left out" in result.stdout
    assert len(stored(tmp_path / "data")) == 36
    rejected = json.loads((tmp_path / "data" / "manifest.json").read_text())["rejected"]
    reasons = {entry["name"]: entry["reason"] for entry in rejected}
    assert set(reasons) == {*bad, "owl/link.jpg"}
    assert all(reason in reasons[name] for name, (_, reason) in bad.items()), reasons
    assert reasons["owl/link.jpg"] == "No such file or directory"
    strict = run(source, tmp_path / "strict", "size=0", "strict=true")
    assert strict.returncode == 2
    assert any(f"{name}: " in strict.stderr for name in reasons)
    assert not (tmp_path / "strict").exists()


def test_only_bad_files_make_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "source" / "cat").mkdir(parents=True)
    (tmp_path / "source" / "cat" / "a.jpg").write_bytes(b"text")
    result = run(tmp_path / "source", tmp_path / "data")
    assert result.returncode == 2
    assert "no training image; 1 files were left out, the first because: not an image" in result.stderr
    assert not list(tmp_path.glob("data*"))


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    rgb = Image.fromarray(picture(3, 40, 40))
    grey = rgb.convert("L")
    alpha = rgb.copy()
    alpha.putalpha(Image.new("L", rgb.size, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    files = {
        "grey.png": (encoded(grey, "PNG"), grey),
        "grey.jpg": (encoded(grey, "JPEG", quality=95), grey),
        "cmyk.jpg": (encoded(rgb.convert("CMYK"), "JPEG", quality=95), rgb),
        "palette.png": (encoded(rgb.quantize(256), "PNG"), rgb.quantize(256)),
        "bits.png": (encoded(grey.convert("1"), "PNG"), grey.convert("1")),
        "deep.png": (encoded(Image.fromarray(np.asarray(grey, np.uint16) * 257), "PNG"), grey),
        "clear.png": (encoded(alpha, "PNG"), Image.new("RGB", rgb.size, "white")),
        "grey-clear.png": (encoded(alpha.convert("LA"), "PNG"), Image.new("L", rgb.size, "white")),
        "turned.jpg": (encoded(rgb.rotate(90), "JPEG", quality=95, exif=exif), rgb),
        "plain.webp": (encoded(rgb, "WEBP", lossless=True), rgb),
        "first.gif": (encoded(rgb.quantize(256), "GIF"), rgb.quantize(256)),
    }
    (tmp_path / "source" / "all").mkdir(parents=True)
    for name, (data, _) in files.items():
        (tmp_path / "source" / "all" / name).write_bytes(data)
    prepare(str(tmp_path / "source"), tmp_path / "data", Options(size=0, quality=95, processes=1))
    samples = stored(tmp_path / "data")
    assert len(samples) == len(files)
    for name, (_, expected) in files.items():
        image = Image.open(io.BytesIO(samples[f"all/{name}"][0]))
        assert image.mode in ("RGB", "L")
        difference = np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(expected.convert("RGB"), float))
        # Dots of a palette or of black and white are what JPEG keeps worst.
        assert difference.mean() < (8 if name in ("bits.png", "palette.png", "first.gif") else 3), name


def test_crop_keeps_the_shape_of_things(tmp_path: Path) -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = picture(5, 40, 40)
    (tmp_path / "source" / "all").mkdir(parents=True)
    Image.fromarray(wide).save(tmp_path / "source" / "all" / "wide.png")
    for resampling in ("lanczos", "area"):
        options = Options(size=20, mode="crop", filter=resampling, quality=95, processes=1)  # type: ignore[arg-type]
        prepare(str(tmp_path / "source"), tmp_path / resampling, options)
        image = Image.open(io.BytesIO(stored(tmp_path / resampling)["all/wide.png"][0]))
        assert image.size == (20, 20)
        expected = picture(5, 40, 40).reshape(20, 2, 20, 2, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(image, float) - expected).mean() < 5


def test_awkward_names_come_through(tmp_path: Path) -> None:
    names = [
        "a.b.c.jpg",
        "with space.jpg",
        "überfüß 猫.jpg",
        "x" * 200 + ".jpg",
        "new\nline.jpg",
        "JPG",
        "no.ext.",
        "-rf.jpg",
    ]
    encoded_names = [os.fsencode(name) for name in names] + [b"latin-\xe9.jpg"]
    folder = tmp_path / "source" / "müll.d ir"
    folder.mkdir(parents=True)
    for number, name in enumerate(encoded_names):
        Path(os.fsdecode(os.path.join(os.fsencode(folder), name))).write_bytes(jpeg(number))
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as file:
        file.add(tmp_path / "source", arcname="source")
    for source in (tmp_path / "source", archive):
        dest = tmp_path / f"from-{source.name}"
        prepare(str(source), dest, Options(size=0, processes=1))
        found = {Path(name).name: data for name, (data, _) in stored(dest).items()}
        assert found == {os.fsdecode(name): jpeg(number) for number, name in enumerate(encoded_names)}
        assert open_dataset(dest).classes == ["müll.d ir"]


def test_shards_by_bytes(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    prepare(str(source), tmp_path / "data", Options(size=0, shard_bytes=30_720, processes=1))
    sizes = [shard.bytes for shard in open_dataset(tmp_path / "data").splits["train"].shards]
    assert len(sizes) > 2
    assert max(sizes) <= 30_720
    assert min(sizes[:-1]) > 20_000


def test_hold_out_is_stratified(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=20)
    prepare(str(source), tmp_path / "data", Options(size=0, test_fraction=0.25, processes=1))
    assert not set(stored(tmp_path / "data")) & set(stored(tmp_path / "data", "test"))
    counts = {
        name: np.bincount(split.labels).tolist() for name, split in open_dataset(tmp_path / "data").splits.items()
    }
    assert counts == {"train": [15, 15, 15], "test": [5, 5, 5]}
    with pytest.raises(ValueError, match="is a data set already prepared"):
        prepare(str(tmp_path / "data"), tmp_path / "other", Options(processes=1))
    make_folder(tmp_path / "two" / "train")
    make_folder(tmp_path / "two" / "test")
    with pytest.raises(ValueError, match="test_fraction is for a source without a test split"):
        prepare(str(tmp_path / "two"), tmp_path / "other", Options(test_fraction=0.1, processes=1))


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "source", per_class=2)
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(ValueError, match=r"cannot list .*dog: Permission denied; make it readable"):
        prepare(str(source), tmp_path / "data", Options(processes=1))
    assert not list(tmp_path.glob("data*"))


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


def test_fashion_mnist_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_command(tmp_path / "bin", "apt-get", "echo 'E: Unable to locate package dataset-fashion-mnist' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    message = "cannot fetch fashion-mnist, apt-get failed: E: Unable to locate package .*; give a folder"
    with pytest.raises(ValueError, match=message):
        prepare("fashion-mnist", tmp_path / "data", Options(processes=1))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="needs apt-get and dpkg-deb; give a folder with its four IDX files instead"):
        prepare("fashion-mnist", tmp_path / "data", Options(processes=1))
    assert not list(tmp_path.glob("data*"))
