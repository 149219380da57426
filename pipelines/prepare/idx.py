"""IDX files, as MNIST is published, and Fashion-MNIST from its Debian package."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from .archives import Item, Source, gunzip

FASHION_MNIST = "fashion-mnist"
FASHION_MNIST_CLASSES = [
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
_IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
_LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}


def is_idx(folder: Path) -> bool:
    """Whether a folder holds the training images of an IDX data set."""
    return _find(folder, _IMAGES["train"]) is not None


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def idx(folder: Path, scratch: Path, names: list[str] | None) -> Source:
    """The images of a folder of IDX files; names: of the classes, numbers if None. ValueError for damaged files."""
    items: list[Item] = []
    for split in ("train", "test"):
        images, labels = _find(folder, _IMAGES[split]), _find(folder, _LABELS[split])
        if images is None and labels is None and split == "test":
            continue
        if images is None or labels is None:
            raise ValueError(f"{folder} has no {_LABELS[split] if images else _IMAGES[split]}[.gz]")
        images = gunzip(images, scratch / _IMAGES[split]) if images.suffix == ".gz" else images
        labels = gunzip(labels, scratch / _LABELS[split]) if labels.suffix == ".gz" else labels
        (count, height, width), start = _header(images, 3)
        (label_count,), label_start = _header(labels, 1)
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


def _header(path: Path, dimensions: int) -> tuple[tuple[int, ...], int]:
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


def fashion_mnist(scratch: Path) -> Source:
    """Fashion-MNIST of Debian's package (MIT-licensed), downloaded and unpacked without root."""
    return idx(_fetch_fashion_mnist(scratch), scratch, FASHION_MNIST_CLASSES)


def _fetch_fashion_mnist(scratch: Path) -> Path:
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
