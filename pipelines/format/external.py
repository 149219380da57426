"""Shards that were made elsewhere: any tar with .jpg, .jpeg or .png images and .cls or .json labels, read as they are.

A sample is what the webdataset library takes for one: members that have their name up to its first dot in common, as
a/7.jpg and a/7.cls. What follows that dot marks the image (jpg, jpeg or png) and the label (cls or json); another
member, as a/7.mask.jpg, is not read.

They are indexed once, in parallel; the index is kept in the user's cache (XDG_CACHE_HOME, else ~/.cache), because the
folder of the shards is often not ours to write to.
"""

import hashlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from loky import ProcessPoolExecutor
from numpy.typing import NDArray
from tqdm import tqdm

from ..cores import available_cores
from ..pools import begin_worker
from .dataset import INDEX_DTYPE, MANIFEST, Dataset, Shard, Split, index_digest, open_index
from .files import cache_folder, locked, write_file
from .folders import SPLITS, is_system, walk
from .image_header import sides
from .remote import CONNECTIONS, Described, Location, Url, describe
from .tar import Member, members

# Their pixels are not known; these are the usual figures of ImageNet.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGES = frozenset(("jpg", "jpeg", "png"))
_OTHER_IMAGES = frozenset(("webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "jfif", "avif", "heic"))
_LABELS = ("cls", "json")
_LABEL_FIELDS = ("label", "cls", "target")
_HEAD_BYTES, _MOST_HEAD_BYTES = 1 << 16, 1 << 24  # of an image that are read to know its size
_MAX_CLASSES = 1 << 20  # their names are a list; the largest sets of faces have two million persons
_PARALLEL_BYTES = 1 << 28  # of shards; with less, starting processes takes longer than the work
_INDEX_VERSION = 2  # of the rules above; an index of another version is built anew
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

_log = logging.getLogger(__name__)


def find_shards(root: Path) -> dict[str, list[Path]]:
    """The .tar files below a folder by split.

    The split is the one that the name of a folder or else of the shard has as a word (`SPLITS`); without any such word
    all are train.

    Raises:
        ValueError: what is there can be understood in more than one way, or is in a form that cannot be read.
    """
    names = [name for name in walk(root)[0] if not any(map(_is_hidden, PurePosixPath(name).parts))]
    for name in names:
        if name.lower().endswith(_PACKED):
            raise ValueError(f"{root / name} is compressed; unpack it to a .tar, or move it away")
        if PurePosixPath(name).name == MANIFEST and "/" in name:
            raise ValueError(f"{root} holds the data set {root / name}; give its own path, {(root / name).parent}")
    shards = [name for name in names if name.lower().endswith(".tar")]
    if not shards and (parquet := [name for name in names if name.lower().endswith(".parquet")]):
        raise ValueError(f"{root / parquet[0]} is a Parquet file; write its images into class folders or .tar shards")
    found = split_names(root, shards)
    return {split: [root / name for name in names] for split, names in found.items()}


def split_names(root: Location, shards: list[str]) -> dict[str, list[str]]:
    """The names of shards below `root` by the split that they belong to; ValueError if that is not clear."""
    words = {name: _split_word(root, name) for name in shards}
    named = {word: name for name, word in words.items() if word}
    for name, word in words.items():
        if named and not word:
            other = root / next(iter(named.values()))
            raise ValueError(
                f"{root / name} is of no split: beside {other}, its name needs the word train, test or val"
            )
        twin = next((twin for twin in named if word and twin != word and SPLITS[twin] == SPLITS[word]), None)
        if twin:
            raise ValueError(
                f"{root / name} and {root / named[twin]} are both for the {SPLITS[twin]} split, as {word} and {twin}; "
                "leave one of the two there"
            )
    found: dict[str, list[str]] = {}
    for name, word in words.items():
        found.setdefault(SPLITS[word] if word else "train", []).append(name)
    return found


def _is_hidden(part: str) -> bool:
    return is_system(part) or part.startswith(".")


def _split_word(root: Location, name: str) -> str | None:
    """The word for a split in the outermost part of a path that has one."""
    for part in PurePosixPath(name).with_suffix("").parts:
        words = [word for word in re.split(r"[^a-z]+", part.lower()) if word in SPLITS]
        if len({SPLITS[word] for word in words}) > 1:
            raise ValueError(f"{root / name} names two splits, {' and '.join(words)}; rename it to have one of them")
        if words:
            return words[0]
    return None


def open_external(root: Location, shards: Mapping[str, Sequence[Location]]) -> Dataset:
    """The data set in the given shards; classes are named by their numbers. ValueError for what cannot be read."""
    described = {name: describe(paths) for name, paths in sorted(shards.items())}
    indexed = {name: _indexed(root, shards[name], facts) for name, facts in described.items()}
    highest = {name: found.highest_label for name, found in indexed.items()}
    if highest.get("test", 0) > highest.get("train", highest.get("test", 0)):
        raise ValueError(
            f"{root}: labels of test go up to {highest['test']}, those of train to {highest['train']}; "
            "number the classes of both alike"
        )
    classes = max(highest.values()) + 1
    splits = {}
    for name, found in indexed.items():
        rows = zip(shards[name], found.counts, described[name], strict=True)
        parts = tuple(Shard(path, count, facts.size, facts.version) for path, count, facts in rows)
        try:
            splits[name] = Split(name, parts, open_index(found.file, parts, found.sha256, classes))
        except ValueError:
            raise ValueError(f"{found.file} is damaged; remove it, and the shards are indexed again") from None
    facts = [
        (name, [shard.path.name for shard in split.shards], indexed[name].sha256) for name, split in splits.items()
    ]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Dataset(root, [str(label) for label in range(classes)], _MEAN, _STD, fingerprint, splits)


@dataclass(frozen=True)
class _Indexed:
    """An index in the cache: its SHA-256, the samples of each shard and the highest label."""

    file: Path
    sha256: str
    counts: list[int]
    highest_label: int


def _indexed(root: Location, paths: Sequence[Location], described: list[Described]) -> _Indexed:
    """The index of a split, which is built if it is not there."""
    places = [os.fspath(path.resolve() if isinstance(path, Path) else path) for path in paths]
    key = [(place, *astuple(facts)) for place, facts in zip(places, described, strict=True)]
    file = cache_folder() / f"{hashlib.sha256(json.dumps([_INDEX_VERSION, *key]).encode()).hexdigest()[:32]}.npy"
    about = file.with_suffix(".json")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Of several ranks on a machine one builds the index, the others wait for it.
        with locked(file.with_suffix(".lock")):
            if not (file.exists() and about.exists()):
                index = _build(paths, sum(facts.size for facts in described))
                counts = np.bincount(index["shard"], minlength=len(paths)).tolist()
                buffer = io.BytesIO()
                np.save(buffer, index, allow_pickle=False)
                facts = {"sha256": index_digest(index), "counts": counts, "highest_label": int(index["label"].max())}
                for place, data in ((about, json.dumps(facts).encode()), (file, buffer.getvalue())):
                    partial = place.with_name(f"{place.name}-{uuid4().hex}")
                    write_file(partial, data)
                    partial.rename(place)
        return _Indexed(file, **json.loads(about.read_text()))
    except OSError as error:
        raise ValueError(f"cannot index {root} ({error}); XDG_CACHE_HOME must name a writable folder") from None


def _build(paths: Sequence[Location], size: int) -> NDArray[Any]:
    processes = min(available_cores(), len(paths))
    if any(isinstance(path, Url) for path in paths):
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            shards = list(tqdm(threads.map(index_shard, paths), "index", len(paths), unit="shard", disable=None))
    elif processes == 1 or size < _PARALLEL_BYTES:
        shards = [index_shard(path) for path in paths]
    else:
        # Of loky, whose processes do not import the caller's script: it may have no main guard.
        with ProcessPoolExecutor(processes, initializer=begin_worker, initargs=(os.getpid(),)) as pool:
            shards = list(tqdm(pool.map(index_shard, paths), "index", len(paths), unit="shard", disable=None))
    if skipped := [name for _, names in shards for name in names]:
        _log.warning("%d keys without an image are no samples, the first is %s", len(skipped), skipped[0])
    for number, (rows, _) in enumerate(shards):
        rows["shard"] = number
    return np.concatenate([rows for rows, _ in shards])


def index_shard(path: Location) -> tuple[NDArray[Any], list[str]]:
    """The samples of one shard, INDEX_DTYPE, in its order, and the keys that have no image.

    Raises:
        ValueError: it is no shard of labelled images.
    """
    try:
        with path.open("rb") as file:
            return _index(file, str(path), members(file, str(path)))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None


def _index(file: BinaryIO, where: str, found: list[Member]) -> tuple[NDArray[Any], list[str]]:
    def read(member: Member, most: int | None = None) -> bytes:
        file.seek(member.offset)
        return file.read(member.size if most is None else min(member.size, most))

    rows: list[tuple[int, ...]] = []
    skipped: list[str] = []
    for key, parts in samples(found):
        image = _image(where, key, parts)
        if image is None:
            skipped.append(f"{where}: {key}")
            continue
        label = _label(f"{where}: {key}", parts, read)
        rows.append((image.offset, image.size, 0, label, *_sides(image, read)))
    if not rows:
        raise ValueError(f"{where} holds no .jpg, .jpeg or .png image; it is no shard of labelled images")
    return np.array(rows, INDEX_DTYPE), skipped


def samples(found: list[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, members by extension in small letters) of every sample, by its first member.

    Of a key that comes again, as in tars that were joined, each set of members is a sample.
    """
    groups: list[tuple[str, dict[str, Member]]] = []
    latest: dict[str, dict[str, Member]] = {}
    for member in found:
        match = re.fullmatch(r"((?:.*/|)[^./][^./]*)\.([^/]*)", member.name, re.DOTALL)
        if match is None:  # a name without a dot, or a hidden file
            continue
        key, extension = match[1], match[2].lower()
        if extension in latest.get(key, {extension}):
            latest[key] = {}
            groups.append((key, latest[key]))
        latest[key][extension] = member
    return iter(groups)


def _image(where: str, key: str, parts: dict[str, Member]) -> Member | None:
    """The image of a sample; None if it has none, and no label either."""
    images = sorted(_IMAGES & parts.keys())
    if len(images) > 1:
        names = ", ".join(parts[extension].name for extension in images)
        raise ValueError(f"{where}: {key} has several images ({names}); leave one of them")
    if images:
        return _readable(where, parts[images[0]])
    others = sorted(extension for extension in parts if extension.rpartition(".")[2] in _IMAGES | _OTHER_IMAGES)
    if others or "cls" in parts:
        names = ", ".join(parts[extension].name for extension in others[:3] or sorted(parts)[:3])
        raise ValueError(
            f"{where}: {key} has no image {key}.jpg, .jpeg or .png, but {names}; "
            "a key ends at the first dot: write the shard again with such names"
        )
    return None


def _label(where: str, parts: dict[str, Member], read: Callable[[Member], bytes]) -> int:
    for extension in _LABELS:
        if extension in parts:
            return label_of(f"{where}.{extension}", read(_readable(where, parts[extension])), extension)
    raise ValueError(f"{where} has an image but no label; a member {where.rpartition(' ')[2]}.cls or .json is needed")


def _readable(where: str, member: Member) -> Member:
    if member.fault:
        raise ValueError(f"{where.partition(': ')[0]}: {member.name} is {member.fault}; make the shard again")
    return member


def label_of(where: str, text: bytes, extension: str) -> int:
    """The label in the content of a member.

    Args:
        where: shard and member, for messages.
        text: the content.
        extension: cls or json.

    Raises:
        ValueError: it has none.
    """
    try:
        value = int(text) if extension == "cls" else json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        value = next((value[field] for field in _LABEL_FIELDS if field in value), None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"{where} holds no label ({text[:40]!r}); it must be a number of 0 or more, in .json "
            f"alone or as one of the fields {', '.join(_LABEL_FIELDS)}"
        )
    if value >= _MAX_CLASSES:
        raise ValueError(f"{where} holds the label {value}; number the classes from 0, at most {_MAX_CLASSES}")
    return value


def _sides(image: Member, read: Callable[[Member, int], bytes]) -> tuple[int, int]:
    """Height and width by the header, read until it is there: a colour profile may come first.

    An image without one is damaged, and reported when it is used: here it gets 1 x 1.
    """
    length = 0
    while length < min(image.size, _MOST_HEAD_BYTES):
        length = min(image.size, 16 * length or _HEAD_BYTES)
        found = sides(read(image, length))
        if 0 not in found:
            return found
    return 1, 1
