import errno
import fcntl
import io
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from data_sets import jpeg, make_folder, run_prepare, shared, stored
from PIL import Image

from pipelines import open_dataset
from pipelines.format.tar import members
from pipelines.prepare import Options, prepare
from pipelines.prepare.__main__ import main


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


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


def test_index_files_point_at_the_members(tmp_path: Path) -> None:
    prepare(str(make_folder(tmp_path / "source")), tmp_path / "data", Options(size=0, shard_size=5, processes=1))
    for path in sorted((tmp_path / "data" / "train").glob("*.tar")):
        lines = path.with_suffix(".idx").read_text().splitlines()
        fields = [line.split(" ") for line in lines[1:]]
        assert lines[0] == f"v1.2 {len(fields)}"
        listed = [
            (line[at + 3], int(line[at + 1]), int(line[at + 2])) for line in fields for at in range(0, len(line), 4)
        ]
        with path.open("rb") as file:
            assert listed == [(member.name, member.offset, member.size) for member in members(file, str(path))]


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
    result = run_prepare(shared("cifar10-jpeg.tar.gz"), tmp_path / "data", "size=0")
    assert result.returncode == 0, result.stderr
    dataset = open_dataset(tmp_path / "data")
    assert {name: np.bincount(split.labels).tolist() for name, split in dataset.splits.items()} == {
        "train": [5000] * 10,
        "test": [1000] * 10,
    }
    # The published statistics of CIFAR-10's training images.
    np.testing.assert_allclose(dataset.mean, (0.4914, 0.4822, 0.4465), atol=3e-4)
    again = run_prepare(shared("cifar10-jpeg.tar.gz"), tmp_path / "data", "size=0")
    assert again.stdout.startswith("already there")


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar at all")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("mine")
    for arguments, message in (
        ((), "usage: infomcr prepare SOURCE DEST"),
        ((tmp_path / "nothing", tmp_path / "data"), "no such source"),
        ((tmp_path / "empty", tmp_path / "data"), "holds no images in class folders"),
        ((tmp_path / "text.tar", tmp_path / "data"), "is not a readable tar"),
        ((source, "new=1"), "a new path with = in its name is given as ./PATH"),
        ((tmp_path / "{0..3}.tar", tmp_path / "data"), "braces and * are not expanded"),
        ((source, tmp_path / "data", "sizes=3"), "unknown setting sizes: the nearest known one is size"),
        ((source, tmp_path / "data", "size=large"), "size"),
        ((source, tmp_path / "data", "quality=0"), "quality must be in 1..100, got 0"),
        ((source, tmp_path / "occupied"), "exists and is not a data set"),
    ):
        result = run_prepare(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert not (tmp_path / "data").exists()


def test_the_same_command_may_be_repeated_but_not_another_one(tmp_path: Path) -> None:
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
def test_a_preparation_can_be_resumed_after_an_interruption_at_any_instant(
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


def test_a_killed_preparation_is_resumed(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=300)
    command = [sys.executable, "-m", "pipelines.prepare", source, tmp_path / "data", "size=32", "shard_size=50"]
    with subprocess.Popen([*map(str, command), "processes=2"], cwd=Path(__file__).parents[1]) as process:
        while len(list(tmp_path.glob("data.partial/train/*.tar"))) < 4:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("data.partial/train/*.tar")}
    assert 4 <= len(kept) < 18
    result = run_prepare(source, tmp_path / "data", "size=32", "shard_size=50")
    assert result.returncode == 0, result.stderr
    same = [(tmp_path / "data" / "train" / path.name).stat().st_mtime_ns == kept[path] for path in kept]
    assert sum(same) >= len(kept) - 1  # the last may have been renamed but not yet recorded
    prepare(str(source), tmp_path / "other", Options(size=32, shard_size=50, processes=1))
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


def test_what_another_preparation_left_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(make_folder(tmp_path / "source", per_class=5))
    monkeypatch.setattr("pipelines.prepare.build._finish_split", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "data", Options(size=16, processes=1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is of another source, version or options; remove it to start anew"):
        prepare(source, tmp_path / "data", Options(size=24, processes=1))


def test_two_preparations_at_once_are_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=2)
    (tmp_path / "data.partial").mkdir()
    with (tmp_path / "data.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another preparation is writing"):
            prepare(str(source), tmp_path / "data", Options(size=16, processes=1))


def test_a_full_disk_is_one_line_and_the_preparation_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(make_folder(tmp_path / "source"))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main([source, str(tmp_path / "data"), "size=16", "processes=1"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    prepare(source, tmp_path / "data", Options(size=16, processes=1))
    assert len(stored(tmp_path / "data")) == 36


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
