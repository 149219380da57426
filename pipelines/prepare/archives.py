"""The files of a folder or archive as byte ranges, and the labelled images among them."""

import bz2
import errno
import gzip
import lzma
import os
import posixpath
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..format.folders import walk
from ..format.tar import compression, members

_MAX_BYTES = 1 << 30  # of one image file; a zip may promise more than there is memory
_OPENERS: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
# Errors of reading that concern one file; any other, as of a mount that is gone, ends the preparation.
_OF_ONE_FILE = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source: `size` bytes at `offset` of `file`, or with a negative offset an entry of the zip `file`.

    Attributes:
        fault: why it cannot be read, if that is known before; else "".
    """

    name: str
    file: str
    offset: int
    size: int
    fault: str = field(default="", kw_only=True)

    def read(self) -> bytes:
        """Its bytes; ValueError if it is gone, unreadable, damaged in its archive or too large for an image."""
        if self.fault:
            raise ValueError(self.fault)
        if self.size > _MAX_BYTES:
            raise ValueError(f"{self.size} bytes, more than {_MAX_BYTES}")
        try:
            if self.offset < 0:
                archive = _open_zip(self.file)
                return archive.read(archive.infolist()[-1 - self.offset])
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            if error.errno in _OF_ONE_FILE:
                raise ValueError(str(error.strerror)) from error
            raise OSError(error.errno, error.strerror, self.file) from error
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError) as error:
            raise ValueError(f"damaged in its archive: {error}") from error


@dataclass(frozen=True, slots=True)
class Item(File):
    """One image of a split and its label.

    Attributes:
        pixels: the shape of raw pixels, uint8, if the bytes are no encoded image: (height, width) of grey ones,
            (3, height, width) of RGB.
    """

    split: str
    label: int
    pixels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Source:
    """classes: names by label; items: in an order that depends on the names alone.

    Attributes:
        skipped: what is not among the items: name (of a file, or of a folder, with a slash), files, reason.
    """

    classes: list[str]
    items: list[Item]
    skipped: list[dict[str, Any]] = field(default_factory=list)


def labelled(file: File, split: str, label: int, name: str = "") -> Item:
    """The file as an image of a split; name: in place of its own."""
    return Item(name or file.name, file.file, file.offset, file.size, split, label, fault=file.fault)


def in_folder(path: Path) -> list[File]:
    """The files below a folder, named by their paths from there."""
    names, repeated = walk(path)
    files = []
    for name in names:
        file = os.path.join(path, name)
        # A link that leads nowhere is listed, to be skipped with its reason.
        fault = "" if os.path.isfile(file) or not os.path.exists(file) else "a device, pipe or socket, no file"
        files.append(File(name, file, 0, os.path.getsize(file) if os.path.isfile(file) else 0, fault=fault))
    fault = "a link to a folder that is read already"
    return files + [File(name, os.path.join(path, name), 0, 0, fault=fault) for name in repeated]


def in_archive(path: Path, scratch: Path) -> list[File]:
    """The files of a zip or tar, by its content rather than its name; `scratch` is for a compressed one.

    Raises:
        ValueError: it is neither, is damaged, or cannot be read.
    """
    name = path.name.lower()
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return _in_zip(path)
    if compression(head):
        return in_tar(unpack(path, scratch / "source.tar"), str(path))
    if head[257:262] == b"ustar" or name.endswith(".tar"):
        return in_tar(path)
    if name.endswith(".zip"):
        return _in_zip(path)
    if head[:4] == b"PAR1":
        raise ValueError(f"{path} is a Parquet file; write its images into class folders, and give their folder")
    raise ValueError(f"{path} is of no known kind; unpack it and give the folder, or give a .tar, .tar.gz or .zip")


def in_tar(path: Path, where: str = "") -> list[File]:
    """The files of an uncompressed tar; where: its name in messages, if not its path."""
    return in_nested_tar(File(where or str(path), str(path), 0, path.stat().st_size))


def in_nested_tar(tar: File) -> list[File]:
    """The files of an uncompressed tar, which may itself be in a tar."""
    where = f"{tar.file}, {posixpath.basename(tar.name)}" if tar.offset else tar.name
    with open(tar.file, "rb") as file:
        inside = members(file, where, tar.offset, tar.offset + tar.size)
    return _latest([File(member.name, tar.file, member.offset, member.size, fault=member.fault) for member in inside])


def _in_zip(path: Path) -> list[File]:
    try:
        _open_zip.cache_clear()
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"{path} is not a readable zip: {error}") from error
    # Some programs of Windows write its own separator, which makes a folder and a file one name here.
    backslashes = not any("/" in entry.filename for entry in entries)
    files = []
    for number, entry in enumerate(entries):
        name = entry.filename.replace("\\", "/") if backslashes else entry.filename
        if not name.endswith("/"):
            files.append(File(name, str(path), -1 - number, entry.file_size, fault=_zip_fault(entry)))
    return _latest(files)


def _zip_fault(entry: zipfile.ZipInfo) -> str:
    if entry.flag_bits & 1:
        return "encrypted; unpack the zip with its password and give the folder"
    if entry.compress_type not in _ZIP_METHODS:
        method = zipfile.compressor_names.get(entry.compress_type, "unknown")  # type: ignore[attr-defined]
        return f"compressed by {method} (method {entry.compress_type}); unpack the zip and give the folder"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "a link in a zip; unpack the zip and give the folder"
    return ""


def _latest(files: list[File]) -> list[File]:
    """The files; of those with one name all but the last, which unpacking would leave, have a fault."""
    last = {posixpath.normpath(file.name): number for number, file in enumerate(files)}
    if len(last) == len(files):
        return files
    fault = "replaced by a later file of the same name in the archive"
    return [
        file if last[posixpath.normpath(file.name)] == number else replace(file, fault=fault)
        for number, file in enumerate(files)
    ]


def unpack(path: Path, target: Path) -> Path:
    """Unpacks a file of gzip, bzip2 or xz to `target`, unless an interrupted preparation has done so."""
    if target.exists():
        return target
    partial = target.with_name(target.name + ".partial")
    try:
        with path.open("rb") as file:
            kind = compression(file.read(8)) or "gzip"
        if kind not in _OPENERS:
            raise ValueError(f"{path} is compressed by {kind}; unpack it first")
        with _OPENERS[kind](path) as packed, partial.open("wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be unpacked to {partial}: {error}") from error
    partial.rename(target)
    return target


@lru_cache(maxsize=1)
def _open_zip(path: str) -> zipfile.ZipFile:
    # Kept open: reading its table of contents for every image would be most of the work.
    return zipfile.ZipFile(path)
