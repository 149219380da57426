"""The labelled images of a SOURCE, as one list: class folders, an archive of the same, IDX files, CIFAR or ImageNet.

Class folders: CLASS/image, or train/CLASS/image and test/CLASS/image (val/ and validation/ count as test/). See
`pipelines.prepare.cifar` and `pipelines.prepare.imagenet` for how these are published.
"""

from pathlib import Path, PurePosixPath

from ..format.dataset import MANIFEST
from ..format.files import without_secrets
from .archives import File, Item, Source, gunzip, in_folder, in_tar, in_zip
from .cifar import cifar
from .idx import FASHION_MNIST, FASHION_MNIST_CLASSES, fashion_mnist, idx, is_idx
from .imagenet import imagenet, is_imagenet

_SPLITS = {"train": "train", "test": "test", "val": "test", "validation": "test"}


def open_source(source: str, scratch: Path, processes: int) -> Source:
    """The images of `source`.

    Args:
        source: a path, or "fashion-mnist".
        scratch: folder for what has to be unpacked first (compressed archives, IDX).
        processes: to list archives with.

    Raises:
        ValueError: a user's mistake, or a damaged source.
    """
    if source == FASHION_MNIST:
        return fashion_mnist(scratch)
    path = Path(source)
    if not path.exists():
        raise ValueError(
            f"no such source: {without_secrets(source)}; give a folder, a .tar, .tar.gz or .zip, or {FASHION_MNIST}"
        )
    if path.is_dir():
        if (path / MANIFEST).exists():
            raise ValueError(f"{source} is a data set already prepared; open it as it is")
        if is_idx(path):
            return idx(path, scratch, FASHION_MNIST_CLASSES if FASHION_MNIST in str(path.resolve()) else None)
        files = in_folder(path)
        if is_imagenet(files):
            return imagenet(source, files, scratch, processes)
        return cifar(source, files) or _labelled(source, files)
    if path.name.endswith(".zip"):
        return _labelled(source, in_zip(path))
    if not path.name.endswith((".tar", ".tar.gz", ".tgz")):
        raise ValueError(
            f"{source} is of no known kind; give a folder, a .tar, .tar.gz, .tgz or .zip, or {FASHION_MNIST}"
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
    """The folder that an archive often has around everything ("cifar10/train/dog"), with its slash, or ""."""
    root = ""
    while True:
        heads = {folder[len(root) :].partition("/")[0] for folder in folders}
        deeper = all("/" in folder[len(root) :] for folder in folders)
        if len(heads) != 1 or not deeper or heads & set(_SPLITS):
            return root
        root += f"{heads.pop()}/"
