"""Labelled images to prepare: a folder of class folders, an archive of the same, or IDX files, as one list of items.

Layouts: CLASS/image, or train/CLASS/image and test/CLASS/image (val/ and validation/ count as test/).
"""

import gzip
import os
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from .shards import MANIFEST, members, without_secrets

FASHION_MNIST = "fashion-mnist"
_MAX_BYTES = 1 << 30  # of one image file; a zip may promise more than there is memory
_FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
_SPLITS = {"train": "train", "test": "test", "val": "test", "validation": "test"}
_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}


@dataclass(frozen=True, slots=True)
class Item:
    """One image: name as in the source; `size` bytes at `offset` of file, or a zip's entry `name` (offset -1).

    pixels: (height, width) when the bytes are raw grey pixels instead of an encoded image.
    """

    split: str
    label: int
    name: str
    file: str
    offset: int
    size: int
    pixels: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The item's bytes; ValueError if it is gone, unreadable, damaged in its archive or too large for an image."""
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


@lru_cache(maxsize=1)
def _open_zip(path: str) -> zipfile.ZipFile:
    # Kept open: reading its table of contents for every image would be most of the work.
    return zipfile.ZipFile(path)


@dataclass(frozen=True)
class Source:
    """classes: names by label; items: in an order that depends on the names alone."""

    classes: list[str]
    items: list[Item]


def open_source(source: str, scratch: Path) -> Source:
    """The images of `source`; `scratch` is a folder for what has to be unpacked first (compressed archives, IDX)."""
    if source == FASHION_MNIST:
        return _idx(_fetch_fashion_mnist(scratch), scratch, _FASHION_MNIST_CLASSES)
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"no such source: {without_secrets(source)}; give a folder, a .tar, .tar.gz or .zip, or {FASHION_MNIST}"
        )
    if path.is_dir():
        if (path / MANIFEST).exists():
            raise ValueError(f"{source} is a data set already prepared; open it as it is")
        if _find(path, _IMAGES["train"]):
            return _idx(path, scratch, _FASHION_MNIST_CLASSES if FASHION_MNIST in str(path.resolve()) else None)
        return _labelled(source, _folder(path))
    if path.name.endswith(".zip"):
        return _labelled(source, _zip(path))
    if path.name.endswith((".tar.gz", ".tgz")):
        return _labelled(source, _tar(_gunzip(path, scratch / "source.tar")))
    if path.name.endswith(".tar"):
        return _labelled(source, _tar(path))
    raise ValueError(f"cannot tell what {source} is; give a folder, a .tar, .tar.gz, .tgz or .zip, or {FASHION_MNIST}")


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    file: str
    offset: int
    size: int


def _folder(path: Path) -> list[_File]:
    def fail(error: OSError) -> None:
        raise ValueError(f"cannot list {error.filename}: {error.strerror}; make it readable")

    files = []
    for folder, _, names in os.walk(path, onerror=fail, followlinks=True):
        for file in (os.path.join(folder, name) for name in names):
            # A link that leads nowhere is listed, to be left out with its reason; a pipe or socket is no image file.
            if os.path.isfile(file) or not os.path.exists(file):
                size = os.path.getsize(file) if os.path.exists(file) else 0
                files.append(_File(os.path.relpath(file, path), file, 0, size))
    return files


def _tar(path: Path) -> list[_File]:
    return [_File(member.name, str(path), member.offset, member.size) for member in members(path)]


def _zip(path: Path) -> list[_File]:
    try:
        _open_zip.cache_clear()
        with zipfile.ZipFile(path) as archive:
            return [
                _File(info.filename, str(path), -1, info.file_size) for info in archive.infolist() if not info.is_dir()
            ]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a readable zip: {error}") from error


def _gunzip(path: Path, target: Path) -> Path:
    # Written whole or not at all, so that a resumed preparation can use it.
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        try:
            with gzip.open(path) as packed, partial.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked: {error}") from error
        partial.rename(target)
    return target


def _labelled(source: str, files: list[_File]) -> Source:
    found: list[tuple[str, str, _File]] = []
    for file in files:
        parts = [part for part in PurePosixPath(file.name).parts if part not in (".", "/")]
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        found.append(("/".join(parts[:-1]), parts[-1], file))
    folders = {folder for folder, _, _ in found}
    leaves = folders - {parent.as_posix() for folder in folders for parent in PurePosixPath(folder).parents}
    root = _common_root(leaves - {"", "."})
    has_splits = any(_split_of(folder[len(root) :]) for folder in leaves)
    placed: list[tuple[str, str, _File]] = []
    for folder, _, file in found:
        below = folder[len(root) :]
        split = _split_of(below)
        if has_splits and split:
            placed.append((split, below.split("/")[1], file))
        elif below and not has_splits:
            placed.append(("train", below.split("/")[0], file))
    if not placed:
        raise ValueError(f"{source} holds no images in class folders; expected CLASS/image or train/CLASS/image")
    classes = sorted({name for _, name, _ in placed})
    labels = {name: label for label, name in enumerate(classes)}
    items = [Item(split, labels[name], file.name, file.file, file.offset, file.size) for split, name, file in placed]
    return Source(classes, sorted(items, key=lambda item: (item.split, item.label, item.name)))


def _split_of(folder: str) -> str | None:
    """train or test for a folder train/CLASS..., else None."""
    head, slash, _ = folder.partition("/")
    return _SPLITS.get(head) if slash else None


def _common_root(folders: set[str]) -> str:
    """The leading folder that an archive often has around everything ("cifar10/train/dog"), with its slash, or ""."""
    root = ""
    while True:
        heads = {folder[len(root) :].partition("/")[0] for folder in folders}
        deeper = all("/" in folder[len(root) :] for folder in folders)
        if len(heads) != 1 or not deeper or heads & set(_SPLITS):
            return root
        root += f"{heads.pop()}/"


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _idx(folder: Path, scratch: Path, names: list[str] | None) -> Source:
    items: list[Item] = []
    for split in ("train", "test"):
        images, labels = _find(folder, _IMAGES[split]), _find(folder, _LABELS[split])
        if images is None and labels is None and split == "test":
            continue
        if images is None or labels is None:
            raise ValueError(f"{folder} has no {_LABELS[split] if images else _IMAGES[split]}[.gz]")
        images = _gunzip(images, scratch / _IMAGES[split]) if images.suffix == ".gz" else images
        labels = _gunzip(labels, scratch / _LABELS[split]) if labels.suffix == ".gz" else labels
        (count, height, width), start = _idx_header(images, 3)
        (label_count,), label_start = _idx_header(labels, 1)
        if count != label_count:
            raise ValueError(f"{images.name} holds {count} images and {labels.name} {label_count} labels")
        values = np.fromfile(labels, np.uint8, offset=label_start)
        size = height * width
        items += [
            Item(split, int(label), f"{split}/{number}", str(images), start + number * size, size, (height, width))
            for number, label in enumerate(values)
        ]
    classes = names or [str(label) for label in range(max(item.label for item in items) + 1)]
    if max(item.label for item in items) >= len(classes):
        raise ValueError(f"{folder} has a label out of range for the {len(classes)} classes of {FASHION_MNIST}")
    return Source(classes, items)


def _idx_header(path: Path, dimensions: int) -> tuple[tuple[int, ...], int]:
    """Shape and offset of the data: magic 0, 0, 8 (unsigned byte), dimensions, then big-endian sizes."""
    start = 4 + 4 * dimensions
    with path.open("rb") as file:
        header = file.read(start)
    if len(header) < start or header[:4] != bytes([0, 0, 8, dimensions]):
        raise ValueError(f"{path} is not an IDX file of {dimensions} dimensions of unsigned bytes")
    shape = tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, start, 4))
    expected = start + int(np.prod(shape))
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size} bytes where its header says {expected}: it is truncated")
    return shape, start


def _fetch_fashion_mnist(scratch: Path) -> Path:
    """Debian's package of Fashion-MNIST (MIT-licensed), downloaded and unpacked without root."""
    found = list(scratch.glob("package/**/fashion-mnist"))
    if found:
        return found[0]
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ValueError(f"{FASHION_MNIST} needs apt-get and dpkg-deb; give a folder with its four IDX files instead")
    with tempfile.TemporaryDirectory(dir=scratch.resolve()) as folder:
        try:
            _command(["apt-get", "download", "dataset-fashion-mnist"], Path(folder))
        except ValueError:  # a new machine has no package lists: fetch them for this once, into the folder
            own = ["-o", f"Dir::State={folder}", "-o", f"Dir::Cache={folder}", "-o", "Debug::NoLocking=1"]
            _command(["apt-get", *own, "update"], Path(folder))
            _command(["apt-get", *own, "download", "dataset-fashion-mnist"], Path(folder))
        package = next(Path(folder).glob("*.deb"))
        _command(["dpkg-deb", "-x", str(package), "unpacked"], Path(folder))
        (Path(folder) / "unpacked").rename(scratch / "package")
    return next(scratch.glob("package/**/fashion-mnist"))


def _command(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(
            f"cannot fetch {FASHION_MNIST}, {command[0]} failed: {reason}; give a folder with its four IDX files"
        )
