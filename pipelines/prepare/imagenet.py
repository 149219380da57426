"""ImageNet (ILSVRC2012) as it is published: a folder of its official archives, of folders of the same, or of both.

- ILSVRC2012_img_train.tar, a tar of one tar a class, n01440764.tar; or class folders n01440764/.
- ILSVRC2012_img_val.tar, flat, ILSVRC2012_val_00000001.JPEG; or a folder of these. Their classes are in
  ILSVRC2012_devkit_t12.tar.gz (or its folder) by numbers of its own, which data/meta.mat maps to WordNet ids.

Images are read inside the archives; only the devkit is unpacked. Classes are the sorted WordNet ids of the training
images; the validation images become the test split.
"""

import io
import re
import zlib
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from .archives import File, Item, Source, gunzip, in_nested_tar, in_tar

_TRAIN, _VALIDATION, _DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_CLASS = re.compile(r"n\d{8}")
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_PARALLEL_BYTES = 8 << 30  # of archives; with less, starting processes takes longer than reading all headers in one
_MAX_META_BYTES = 64 << 20  # of meta.mat, unpacked; the published one has a few million


def is_imagenet(files: list[File]) -> bool:
    """Whether a folder holds archives of ImageNet, or validation images outside of class folders."""
    for file in files:
        parent, name = _parent_and_name(file)
        if name in (_TRAIN, _VALIDATION) or _CLASS_TAR.fullmatch(name):
            return True
        if _VALIDATION_IMAGE.fullmatch(name) and not _CLASS.fullmatch(parent):
            return True
    return False


def imagenet(source: str, files: list[File], scratch: Path, processes: int) -> Source:
    """The images among the files.

    Args:
        source: for messages.
        files: of the folder.
        scratch: folder for the unpacked devkit.
        processes: to list the archives with.

    Raises:
        ValueError: something is missing, damaged or there twice.
    """
    found: list[tuple[str, str, str, File]] = []  # split, WordNet id, name, file
    flat: list[tuple[int, str, File]] = []
    for file in _opened(files, processes):
        parent, name = _parent_and_name(file)
        validation = _VALIDATION_IMAGE.fullmatch(name)
        if validation and not _CLASS.fullmatch(parent):
            flat.append((int(validation[1]), name, file))
        elif validation:
            found.append(("test", parent, name, file))
        elif _CLASS.fullmatch(parent) and not name.startswith("."):
            found.append(("train", parent, f"{parent}/{name}", file))
    if flat:
        truth = _ground_truth(source, files, scratch)
        outside = [name for number, name, _ in flat if not 0 < number <= len(truth)]
        if outside:
            raise ValueError(f"{source} has {outside[0]}, but its {_TRUTH} has {len(truth)} lines; complete {_DEVKIT}")
        found += [("test", truth[number - 1], name, file) for number, name, file in flat]
    classes = sorted({wnid for split, wnid, _, _ in found if split == "train"})
    if not classes:
        raise ValueError(f"{source} has no training images; put {_TRAIN} there, or its class folders")
    labels = {wnid: label for label, wnid in enumerate(classes)}
    unknown = sorted({wnid for _, wnid, _, _ in found} - labels.keys())
    if unknown:
        raise ValueError(
            f"{source} has validation images of {len(unknown)} classes without training images, the first is "
            f"{unknown[0]}; put all of {_TRAIN} there"
        )
    found.sort(key=lambda entry: entry[:3])
    for one, other in pairwise(found):
        if one[:3] == other[:3]:
            raise ValueError(f"{source} has {one[2]} twice, in {one[3].file} and {other[3].file}; remove one of them")
    return Source(
        classes,
        [Item(name, file.file, file.offset, file.size, split, labels[wnid]) for split, wnid, name, file in found],
    )


def _parent_and_name(file: File) -> tuple[str, str]:
    folder, _, name = file.name.rpartition("/")
    return folder.rpartition("/")[2], name


def _opened(files: list[File], processes: int) -> list[File]:
    """The files, and those in the archives among them as if these were folders."""
    opened: list[File] = []
    tars: list[File] = []
    for file in files:
        _, name = _parent_and_name(file)
        inside = _within(file, in_tar(Path(file.file))) if name in (_TRAIN, _VALIDATION) else [file]
        for inner in inside:
            (tars if _CLASS_TAR.fullmatch(_parent_and_name(inner)[1]) else opened).append(inner)
    if processes > 1 and sum(tar.size for tar in tars) > _PARALLEL_BYTES:
        with ProcessPoolExecutor(min(processes, len(tars)), mp_context=get_context("spawn")) as pool:
            listed = list(tqdm(pool.map(_in_class_tar, tars), "list", len(tars), unit="tar", disable=None))
    else:
        listed = [_in_class_tar(tar) for tar in tars]
    return opened + [file for files in listed for file in files]


def _in_class_tar(tar: File) -> list[File]:
    return _within(tar, in_nested_tar(tar))


def _within(tar: File, inside: list[File]) -> list[File]:
    folder = tar.name.removesuffix(".tar")
    return [File(f"{folder}/{PurePosixPath(file.name).name}", file.file, file.offset, file.size) for file in inside]


def _ground_truth(source: str, files: list[File], scratch: Path) -> list[str]:
    """The WordNet id of every validation image, by its number less one."""
    packed = next((file for file in files if _parent_and_name(file)[1] == _DEVKIT), None)
    kit = in_tar(gunzip(Path(packed.file), scratch / "devkit.tar")) if packed else files
    meta, truth = (next((f for f in kit if f"/{f.name}".endswith(f"/{name}")), None) for name in (_META, _TRUTH))
    if meta is None or truth is None:
        raise ValueError(
            f"{source} has validation images but no {_META if meta is None else _TRUTH}, with their classes; "
            f"put {_DEVKIT} there, or arrange the validation images in class folders"
        )
    wnids = _wnids(meta.read())
    try:
        return [wnids[int(number)] for number in truth.read().split()]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{source}: {_TRUTH} is damaged ({error}); get {_DEVKIT} again") from None


def _wnids(meta: bytes) -> dict[int, str]:
    """WordNet ids by the numbers of the devkit, from the struct array `synsets` of its MATLAB file."""
    from scipy.io import loadmat  # not at the top: the processes that convert images do without it

    try:
        _refuse_mat_bomb(meta)
        synsets = loadmat(io.BytesIO(meta), variable_names=["synsets"], squeeze_me=True)["synsets"]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # a reader of a damaged file may raise anything
        raise ValueError(f"{_META} cannot be read ({error}); get {_DEVKIT} again") from None


def _refuse_mat_bomb(meta: bytes) -> None:
    """ValueError if a MATLAB 5 file, which is elements of type, size and content, would fill memory when unpacked."""
    if meta[126:128] != b"IM":
        raise ValueError("not a little-endian file of MATLAB 5")
    at, total = 128, len(meta)
    while at + 8 <= len(meta):
        kind, size = (int.from_bytes(meta[start : start + 4], "little") for start in (at, at + 4))
        at += 8
        if kind == 15:
            total += len(zlib.decompressobj().decompress(meta[at : at + size], _MAX_META_BYTES))
        if total >= _MAX_META_BYTES:
            raise ValueError(f"{total} bytes or more, unpacked")
        at += size
