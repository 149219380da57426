"""IDX files, as MNIST is published, and Fashion-MNIST from its Debian package."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from .archives import File, Item, Source, in_folder, unpack

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
# The names of MNIST, and of those that follow it: also with a dot in place of the dash.
_NAME = re.compile(r"(train|t10k|test)-(images[-.]idx3|labels[-.]idx1)-ubyte(\.gz)?")
_SPLITS = {"train": "train", "t10k": "test", "test": "test"}

_PUBLISHED = {
    (split, what): f"{prefix}-{what}-idx{dimensions}-ubyte"
    for split, prefix in (("train", "train"), ("test", "t10k"))
    for what, dimensions in (("images", 3), ("labels", 1))
}

Found = dict[tuple[str, str], File]


def idx_files(source: str, files: list[File]) -> Found:
    """The IDX files among the files by split and "images" or "labels", empty if there are none.

    ValueError for names that are nearly theirs, or for several data sets.
    """
    found: Found = {}
    folders = set()
    for file in sorted(files, key=lambda file: (file.name.count("/"), file.name.endswith(".gz"), file.name)):
        folder, _, name = file.name.rpartition("/")
        if match := _NAME.fullmatch(name):
            found.setdefault((_SPLITS[match[1]], match[2][:6]), file)
            folders.add(folder.removesuffix(name).rstrip("/"))  # some unpackers make a folder of the file's own name
        elif re.search(r"idx[13]-ubyte", name):
            raise ValueError(
                f"{source} has {file.name}, whose name is not of MNIST: rename it to train-images-idx3-ubyte, "
                "train-labels-idx1-ubyte, t10k-images-idx3-ubyte or t10k-labels-idx1-ubyte"
            )
    if len(folders) > 1:
        raise ValueError(f"{source} has IDX files in several folders, {', '.join(sorted(folders))}; give one of them")
    if any(file.offset for file in found.values()):
        raise ValueError(f"{source} holds IDX files in an archive; unpack it and give the folder")
    return found


def idx(source: str, found: Found, scratch: Path, names: list[str] | None) -> Source:
    """The images of IDX files; names: of the classes, numbers if None. ValueError for damaged files."""
    items: list[Item] = []
    for split in ("train", "test"):
        if split == "test" and not {(split, "images"), (split, "labels")} & found.keys():
            continue
        for what in ("images", "labels"):
            if (split, what) not in found:
                raise ValueError(f"{source} has no {_PUBLISHED[split, what]}[.gz]")
        images, labels = (_unpacked(found[split, what], scratch / f"{split}-{what}") for what in ("images", "labels"))
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
    if not items:
        raise ValueError(f"{source} has IDX files without an image")
    classes = names or [str(label) for label in range(max(item.label for item in items) + 1)]
    if max(item.label for item in items) >= len(classes):
        raise ValueError(f"{source} has a label out of range for the {len(classes)} classes of {FASHION_MNIST}")
    return Source(classes, items)


def _unpacked(file: File, target: Path) -> Path:
    return unpack(Path(file.file), target) if file.name.endswith(".gz") else Path(file.file)


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
    folder = str(_fetch_fashion_mnist(scratch))
    return idx(folder, idx_files(folder, in_folder(Path(folder))), scratch, FASHION_MNIST_CLASSES)


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
