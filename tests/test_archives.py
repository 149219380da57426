"""Archives as a source: what is in them, or one line on what to do."""

import bz2
import errno
import gzip
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_sets import jpeg, make_folder, stored
from test_tar import make

from pipelines.prepare import Options, prepare

OPTIONS = Options(size=0, processes=1)
IMAGES = {f"{name}/{k}.jpg": jpeg(10 * c + k) for c, name in enumerate(("cat", "dog")) for k in range(3)}


def rejected(dest: Path) -> dict[str, str]:
    manifest = json.loads((dest / "manifest.json").read_text())
    return {entry["name"]: entry["reason"] for entry in manifest["rejected"] + manifest["skipped"]}


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def patched(path: Path, names: set[str], local: int, central: int, value: int) -> Path:
    """Sets a field of 16 bits in both headers of entries of a zip."""
    data = bytearray(path.read_bytes())
    for magic, field, length, start in ((b"PK\3\4", local, 26, 30), (b"PK\1\2", central, 28, 46)):
        at = -1
        while (at := data.find(magic, at + 1)) >= 0:
            size = int.from_bytes(data[at + length : at + length + 2], "little")
            if data[at + start : at + start + size].decode() in names:
                data[at + field : at + field + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)
    return path


def images_of(path: Path, dest: Path) -> dict[str, bytes]:
    prepare(str(path), dest, OPTIONS)
    return {name: data for name, (data, _) in stored(dest).items()}


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.tar", lambda data: data),
        ("a.TAR", lambda data: data),
        ("a.tar.gz", gzip.compress),
        ("a.tar", gzip.compress),
        ("a.tgz", bz2.compress),
        ("a.tar.xz", lzma.compress),
        ("a.download", gzip.compress),
        ("a.zip", lambda data: data),
    ],
)
def test_a_tar_is_known_by_its_content(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack(make(IMAGES)))
    assert images_of(tmp_path / name, tmp_path / "data") == IMAGES


@pytest.mark.parametrize("name", ["a.zip", "A.ZIP", "a.tar", "a"])
def test_a_zip_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    assert images_of(zipped(tmp_path / name, IMAGES), tmp_path / "data") == IMAGES


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.parquet", b"PAR1" + bytes(600), "is a Parquet file; write its images into class folders"),
        ("a.rar", b"Rar!\x1a\7" + bytes(600), "is of no known kind; unpack it and give the folder"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(600), "is of no known kind; unpack it"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600), "is compressed by zstd; unpack it first"),
        ("a.tar.gz", gzip.compress(b"no tar at all" * 99, mtime=0), r"a\.tar\.gz is not a readable tar"),
        ("a.tar.gz", gzip.compress(make(IMAGES), mtime=0)[:-2000], r"a\.tar\.gz cannot be unpacked"),
        ("a.tar.xz", lzma.compress(make(IMAGES))[:-2000], r"a\.tar\.xz cannot be unpacked"),
        ("a.zip", b"PK\3\4" + bytes(600), "is not a readable zip"),
        ("photo.jpg", jpeg(1), "is of no known kind"),
        ("a.tar", make({"train-images-idx3-ubyte": b"1234"}), "holds IDX files in an archive; unpack it and give"),
        ("a.tar", make({"more.zip": b"PK", "x.txt": b""}), r"of 2 other files the first is more\.zip: an archive in"),
    ],
)
def test_what_cannot_be_a_source_is_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(str(tmp_path / name), tmp_path / "data", OPTIONS)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    assert not list(tmp_path.glob("data*"))


def test_braces_and_a_cifar_zip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give one folder or archive \(braces and \* are not expanded\)"):
        prepare(str(tmp_path / "shard-{000..146}.tar"), tmp_path / "data", OPTIONS)
    names = [*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin", "batches.meta.txt"]
    archive = zipped(tmp_path / "cifar.zip", dict.fromkeys(names, b"x" * 3073))
    with pytest.raises(ValueError, match="is a zip of CIFAR; unpack it and give the folder"):
        prepare(str(archive), tmp_path / "data", OPTIONS)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ((6, 8, 1), "encrypted; unpack the zip with its password"),
        ((8, 10, 9), r"compressed by deflate64 \(method 9\); unpack the zip"),
        ((8, 10, 98), r"compressed by ppmd \(method 98\); unpack the zip"),
        ((8, 10, 77), r"compressed by unknown \(method 77\); unpack the zip"),
    ],
)
def test_entries_of_a_zip_that_python_cannot_read(tmp_path: Path, fields: tuple[int, int, int], reason: str) -> None:
    archive = patched(zipped(tmp_path / "a.zip", IMAGES), {"cat/1.jpg", "dog/2.jpg"}, *fields)
    assert images_of(archive, tmp_path / "data").keys() == IMAGES.keys() - {"cat/1.jpg", "dog/2.jpg"}
    listed = rejected(tmp_path / "data")
    assert listed.keys() == {"cat/1.jpg", "dog/2.jpg"}
    with pytest.raises(ValueError, match=rf"{archive} has no training image; 6 files.*{reason}"):
        prepare(str(patched(archive, set(IMAGES), *fields)), tmp_path / "other", OPTIONS)


def test_backslashes_in_a_zip_are_separators(tmp_path: Path) -> None:
    windows = {f"photos\\train\\{name}".replace("/", "\\"): data for name, data in IMAGES.items()}
    found = images_of(zipped(tmp_path / "a.zip", {"photos\\": b"", **windows}), tmp_path / "data")
    assert found == {f"photos/train/{name}": data for name, data in IMAGES.items()}
    mixed = zipped(tmp_path / "b.zip", {**IMAGES, "cat/a\\b.jpg": jpeg(50)})
    assert images_of(mixed, tmp_path / "mixed") == {**IMAGES, "cat/a\\b.jpg": jpeg(50)}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_of_files_with_one_name_the_last_is_taken_and_the_others_are_listed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        zipped(path, {**IMAGES, "cat/1.jpg": jpeg(70)})
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("cat/1.jpg", jpeg(71))
    else:
        path.write_bytes(make({**IMAGES, "cat/1.jpg": jpeg(70)}) + make({"./cat/1.jpg": jpeg(71)}))
    found = {os.path.normpath(name): data for name, data in images_of(path, tmp_path / "data").items()}
    assert found == {**IMAGES, "cat/1.jpg": jpeg(71)}
    assert rejected(tmp_path / "data") == {"cat/1.jpg": "replaced by a later file of the same name in the archive"}


def test_links_and_holes_in_a_tar(tmp_path: Path) -> None:
    links = {
        "cat/soft.jpg": (tarfile.SYMTYPE, "../dog/0.jpg"),
        "cat/hard.jpg": (tarfile.LNKTYPE, "cat/0.jpg"),
        "cat/gone.jpg": (tarfile.SYMTYPE, "/photos/0.jpg"),
        "dog/pipe": (tarfile.FIFOTYPE, ""),
    }
    (tmp_path / "a.tar").write_bytes(make({**links, **IMAGES}))
    taken = {"cat/soft.jpg": IMAGES["dog/0.jpg"], "cat/hard.jpg": IMAGES["cat/0.jpg"]}
    assert images_of(tmp_path / "a.tar", tmp_path / "data") == {**IMAGES, **taken}
    (tmp_path / "b.tar").write_bytes(make({**IMAGES, **links}))
    assert images_of(tmp_path / "b.tar", tmp_path / "other") == {**IMAGES, **taken}
    assert rejected(tmp_path / "other") == {
        "cat/gone.jpg": "a link to /photos/0.jpg, which is not in the archive",
        "dog/pipe": "a device or pipe, no file",
    }


def test_links_in_a_zip_are_listed(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", IMAGES)
    with zipfile.ZipFile(archive, "a") as opened:
        link = zipfile.ZipInfo("cat/link.jpg")
        link.external_attr = 0o120777 << 16
        opened.writestr(link, "0.jpg")
    assert images_of(archive, tmp_path / "data") == IMAGES
    assert rejected(tmp_path / "data") == {"cat/link.jpg": "a link in a zip; unpack the zip and give the folder"}


# Errors of the disk ---------------------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """Opening a file of this name fails as a disk does."""

    def opening(path: Any, *arguments: Any, **more: Any) -> Any:
        if str(path).endswith(name):
            raise OSError(code, os.strerror(code))
        return open(path, *arguments, **more)

    monkeypatch.setattr("pipelines.prepare.archives.open", opening, raising=False)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOENT, errno.EACCES, errno.ELOOP])
def test_a_file_that_cannot_be_read_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    source = make_folder(tmp_path / "source", per_class=3)
    failing(monkeypatch, "cat/1.jpg", code)
    prepare(str(source), tmp_path / "data", OPTIONS)
    assert len(stored(tmp_path / "data")) == 8
    assert rejected(tmp_path / "data") == {"cat/1.jpg": os.strerror(code)}


@pytest.mark.parametrize("code", [errno.ESTALE, errno.ENOTCONN, errno.EMFILE])
def test_an_error_of_the_whole_machine_ends_it_with_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    source = make_folder(tmp_path / "source", per_class=3)
    failing(monkeypatch, "cat/1.jpg", code)
    with pytest.raises(OSError, match=rf"{os.strerror(code)}: '{source}/cat/1\.jpg'"):
        prepare(str(source), tmp_path / "data", OPTIONS)
    monkeypatch.undo()
    prepare(str(source), tmp_path / "data", OPTIONS)
    assert len(stored(tmp_path / "data")) == 9


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    source = make_folder(tmp_path / "source", per_class=2)
    monkeypatch.setattr("fcntl.flock", flock)
    (tmp_path / "data.partial").mkdir()
    (tmp_path / "data.partial" / "lock").write_bytes(b"")  # as an interrupted preparation leaves it
    held = tmp_path / "data.partial" / "lock.held"
    held.write_text("1\nanother-host\n")
    with pytest.raises(
        ValueError, match=rf"another preparation is writing .*, or remove {held} if it ended on another"
    ):
        prepare(str(source), tmp_path / "data", OPTIONS)
    held.unlink()
    prepare(str(source), tmp_path / "data", OPTIONS)
    assert len(stored(tmp_path / "data")) == 6
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"manifest.json", "train"}
