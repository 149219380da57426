"""The files of a folder or archive as byte ranges, and the labelled images among them."""

import gzip
import os
import shutil
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..format.tar import members

_MAX_BYTES = 1 << 30  # of one image file; a zip may promise more than there is memory


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source: `size` bytes at `offset` of `file`, or with offset -1 the entry `name` of the zip `file`."""

    name: str
    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes; ValueError if it is gone, unreadable, damaged in its archive or too large for an image."""
        if self.size > _MAX_BYTES:
            raise ValueError(f"{self.size} bytes, more than {_MAX_BYTES}")
        try:
            if self.offset < 0:
                return _open_zip(self.file).read(self.name)
            with open(self.file, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(str(error.strerror)) from error
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
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
    """classes: names by label; items: in an order that depends on the names alone."""

    classes: list[str]
    items: list[Item]


def in_folder(path: Path) -> list[File]:
    """The files below a folder, named by their paths from there."""

    def fail(error: OSError) -> None:
        raise ValueError(f"cannot list {error.filename}: {error.strerror}; make it readable")

    files = []
    for folder, _, names in os.walk(path, onerror=fail, followlinks=True):
        for file in (os.path.join(folder, name) for name in names):
            # A link that leads nowhere is listed, to be skipped with its reason; a pipe or socket is no image file.
            if os.path.isfile(file) or not os.path.exists(file):
                size = os.path.getsize(file) if os.path.exists(file) else 0
                files.append(File(os.path.relpath(file, path), file, 0, size))
    return files


def in_tar(path: Path) -> list[File]:
    """The regular files of an uncompressed tar."""
    return [File(member.name, str(path), member.offset, member.size) for member in members(path)]


def in_nested_tar(tar: File) -> list[File]:
    """The regular files of an uncompressed tar, which may itself be in a tar."""
    name = tar.name.rpartition("/")[2] if tar.offset else ""
    inside = members(Path(tar.file), tar.offset, tar.offset + tar.size, name)
    return [File(member.name, tar.file, member.offset, member.size) for member in inside]


def in_zip(path: Path) -> list[File]:
    """The files of a zip."""
    try:
        _open_zip.cache_clear()
        with zipfile.ZipFile(path) as archive:
            return [
                File(info.filename, str(path), -1, info.file_size) for info in archive.infolist() if not info.is_dir()
            ]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a readable zip: {error}") from error


def gunzip(path: Path, target: Path) -> Path:
    """Unpacks a .gz to `target`, unless an interrupted preparation has done so."""
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        try:
            with gzip.open(path) as packed, partial.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from error
        partial.rename(target)
    return target


@lru_cache(maxsize=1)
def _open_zip(path: str) -> zipfile.ZipFile:
    # Kept open: reading its table of contents for every image would be most of the work.
    return zipfile.ZipFile(path)
