"""The labelled images of a SOURCE, as one list: class folders, an archive of the same, IDX files, CIFAR or ImageNet.

See `pipelines.prepare.class_folders`, `pipelines.prepare.cifar` and `pipelines.prepare.imagenet` for their layouts.
"""

from pathlib import Path

from ..format.dataset import MANIFEST
from ..format.files import without_secrets
from .archives import Source, in_archive, in_folder
from .cifar import cifar
from .class_folders import class_folders
from .idx import FASHION_MNIST, FASHION_MNIST_CLASSES, fashion_mnist, idx, idx_files
from .imagenet import imagenet, is_imagenet


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
        braces = "one folder or archive (braces and * are not expanded)" if set("{*?[") & set(source) else "a folder"
        raise ValueError(
            f"no such source: {without_secrets(source)}; give {braces}, a .tar, .tar.gz or .zip, or {FASHION_MNIST}"
        )
    if path.is_dir() and (path / MANIFEST).exists():
        raise ValueError(f"{source} is a data set already prepared; open it as it is")
    files = in_folder(path) if path.is_dir() else in_archive(path, scratch)
    if found := idx_files(source, files):
        named = FASHION_MNIST in str(path.resolve())
        return idx(source, found, scratch, FASHION_MNIST_CLASSES if named else None)
    if is_imagenet(files):
        return imagenet(source, files, scratch, processes, in_folder=path.is_dir())
    return cifar(source, files) or class_folders(source, files)
