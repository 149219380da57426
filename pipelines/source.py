"""Labelled images to prepare, as one list: class folders, an archive of the same, IDX files, CIFAR or ImageNet.

Class folders: CLASS/image, or train/CLASS/image and test/CLASS/image (val/ and validation/ count as test/). See
`pipelines.cifar` and `pipelines.imagenet` for what these are published as.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path, PurePosixPath

import numpy as np

from .cifar import cifar
from .imagenet import imagenet, is_imagenet
from .items import File, Item, Source, gunzip, in_folder, in_tar, in_zip
from .shards import MANIFEST, without_secrets

FASHION_MNIST = "fashion-mnist"
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


def open_source(source: str, scratch: Path, processes: int) -> Source:
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
        files = in_folder(path)
        if is_imagenet(files):
            return imagenet(source, files, scratch, processes)
        return cifar(source, files) or _labelled(source, files)
    if path.name.endswith(".zip"):
        return _labelled(source, in_zip(path))
    if not path.name.endswith((".tar", ".tar.gz", ".tgz")):
        raise ValueError(
            f"cannot tell what {source} is; give a folder, a .tar, .tar.gz, .tgz or .zip, or {FASHION_MNIST}"
        )
    files = in_tar(path if path.name.endswith(".tar") else gunzip(path, scratch / "source.tar"))
    if is_imagenet(files):
        raise ValueError(f"{source} is a part of ImageNet; give the folder with its archives")
    return cifar(source, files) or _labelled(source, files)


def _labelled(source: str, files: list[File]) -> Source:
    found: list[tuple[str, str, File]] = []
    for file in files:
        parts = [part for part in PurePosixPath(file.name).parts if part not in (".", "/")]
        if any(part.startswith(".") or part == "__MACOSX" for part in parts):
            continue
        found.append(("/".join(parts[:-1]), parts[-1], file))
    folders = {folder for folder, _, _ in found}
    leaves = folders - {parent.as_posix() for folder in folders for parent in PurePosixPath(folder).parents}
    root = _common_root(leaves - {"", "."})
    has_splits = any(_split_of(folder[len(root) :]) for folder in leaves)
    placed: list[tuple[str, str, File]] = []
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
    items = [Item(file.name, file.file, file.offset, file.size, split, labels[name]) for split, name, file in placed]
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
        images = gunzip(images, scratch / _IMAGES[split]) if images.suffix == ".gz" else images
        labels = gunzip(labels, scratch / _LABELS[split]) if labels.suffix == ".gz" else labels
        (count, height, width), start = _idx_header(images, 3)
        (label_count,), label_start = _idx_header(labels, 1)
        if count != label_count:
            raise ValueError(f"{images.name} holds {count} images and {labels.name} {label_count} labels")
        values = np.fromfile(labels, np.uint8, offset=label_start)
        size = height * width
        items += [
            Item(f"{split}/{number}", str(images), start + number * size, size, split, int(label), (height, width))
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
