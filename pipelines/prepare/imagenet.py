"""ImageNet (ILSVRC2012) as it is published: a folder of its official archives, of folders of the same, or of both.

- ILSVRC2012_img_train.tar, a tar of one tar a class, n01440764.tar; or class folders n01440764/.
- ILSVRC2012_img_val.tar, flat, ILSVRC2012_val_00000001.JPEG; or a folder of these. Their classes are in
  ILSVRC2012_devkit_t12.tar.gz (or its folder) by numbers of its own, which data/meta.mat maps to WordNet ids, or in
  LOC_val_solution.csv, as Kaggle publishes them beside ILSVRC/Data/CLS-LOC.

Images are read inside the archives; only the devkit is unpacked. Classes are the sorted WordNet ids of the training
images; the validation images become the test split. The test images are published without labels, and are skipped.
"""

import csv
import io
import os
import re
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path, PurePosixPath

from loky import ProcessPoolExecutor
from tqdm import tqdm

from ..pools import begin_worker
from .archives import File, Source, in_nested_tar, in_tar, labelled, unpack
from .class_folders import Skipped

_TRAIN, _VALIDATION, _DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_CLASS = re.compile(r"n\d{8}")
_CLASS_TAR = re.compile(r"n\d{8}\.tar")
_VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_SOLUTION = "LOC_val_solution.csv"
_TEST_IMAGE = re.compile(r"ILSVRC2012_test_\d{8}\.JPEG")
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


def imagenet(source: str, files: list[File], scratch: Path, processes: int, in_folder: bool = True) -> Source:
    """The images among the files.

    Args:
        source: for messages.
        files: of the folder.
        scratch: folder for the unpacked devkit.
        processes: to list the archives with.
        in_folder: whether the source is a folder, so that archives in it can be opened.

    Raises:
        ValueError: something is missing, damaged or there twice.
    """
    solution = next((file for file in files if _parent_and_name(file)[1] == _SOLUTION), None)
    if not in_folder and not solution:
        raise ValueError(f"{source} is a part of ImageNet; give the folder with its archives")
    found: list[tuple[str, str, str, File]] = []  # split, WordNet id, name, file
    flat: list[tuple[int, str, File]] = []
    skipped = Skipped()
    for parts, file in skipped.split_off(_opened(files, processes) if in_folder else files):
        parent, name = _parent_and_name(file)
        validation = _VALIDATION_IMAGE.fullmatch(name)
        if validation and not _CLASS.fullmatch(parent):
            flat.append((int(validation[1]), name, file))
        elif validation:
            found.append(("test", parent, name, file))
        elif _CLASS.fullmatch(parent):
            found.append(("train", parent, f"{parent}/{name}", file))
        else:
            skipped.add(parts, "without a label" if _TEST_IMAGE.fullmatch(name) else "in no class folder")
    if flat:
        what = _SOLUTION if solution else _TRUTH
        truth = _solution(source, solution) if solution else _ground_truth(source, files, scratch)
        outside = [name for number, name, _ in flat if number not in truth]
        if outside:
            raise ValueError(f"{source} has {outside[0]}, but its {what} has {len(truth)} lines; get {what} again")
        found += [("test", truth[number], name, file) for number, name, file in flat]
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
    items = [labelled(file, split, labels[wnid], name) for split, wnid, name, file in found]
    return Source(classes, items, skipped.listed(PurePosixPath(file.name).parts for _, _, _, file in found))


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
        with ProcessPoolExecutor(min(processes, len(tars)), initializer=begin_worker, initargs=(os.getpid(),)) as pool:
            listed = list(tqdm(pool.map(_in_class_tar, tars), "list", len(tars), unit="tar", disable=None))
    else:
        listed = [_in_class_tar(tar) for tar in tars]
    return opened + [file for files in listed for file in files]


def _in_class_tar(tar: File) -> list[File]:
    return _within(tar, in_nested_tar(tar))


def _within(tar: File, inside: list[File]) -> list[File]:
    folder = tar.name.removesuffix(".tar")
    return [replace(file, name=f"{folder}/{PurePosixPath(file.name).name}") for file in inside]


def _solution(source: str, file: File) -> dict[int, str]:
    """The WordNet ids of the validation images by their numbers, of Kaggle's table."""
    try:
        rows = csv.DictReader(io.StringIO(file.read().decode()))
        return {int(row["ImageId"].rpartition("_")[2]): row["PredictionString"].split()[0] for row in rows}
    except (ValueError, KeyError, IndexError, AttributeError, csv.Error) as error:
        raise ValueError(f"{source}: {_SOLUTION} is damaged ({error!r}); get it again") from None


def _ground_truth(source: str, files: list[File], scratch: Path) -> dict[int, str]:
    """The same of the devkit."""
    packed = next((file for file in files if _parent_and_name(file)[1] == _DEVKIT), None)
    kit = in_tar(unpack(Path(packed.file), scratch / "devkit.tar")) if packed else files
    meta, truth = (next((f for f in kit if f"/{f.name}".endswith(f"/{name}")), None) for name in (_META, _TRUTH))
    if meta is None or truth is None:
        raise ValueError(
            f"{source} has validation images but no {_META if meta is None else _TRUTH}, with their classes; "
            f"put {_DEVKIT} or {_SOLUTION} there, or arrange the validation images in class folders"
        )
    wnids = _wnids(meta.read())
    try:
        return {number: wnids[int(kind)] for number, kind in enumerate(truth.read().split(), 1)}
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
