"""Shards that were made elsewhere: any tar with .jpg, .jpeg or .png images and .cls or .json labels, read as they are.

They are indexed once, in parallel; the index is kept in the user's cache (XDG_CACHE_HOME, else ~/.cache), because the
folder of the shards is often not ours to write to.
"""

import hashlib
import io
import json
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .dataset import INDEX_DTYPE, Dataset, Shard, Split, check_index, index_digest
from .files import write_file
from .tar import members

# Their pixels are not known; these are the usual figures of ImageNet.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}
IMAGES = frozenset(("jpg", "jpeg", "png"))
_LABELS = frozenset(("cls", "json"))
_LABEL_FIELDS = ("label", "cls", "target")
_HEAD_BYTES = 65536  # nearly always enough of an image to know its size


def find_shards(root: Path) -> dict[str, list[Path]]:
    """The .tar files of each split, by folder or file name (train; test, val or validation); all train if neither."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*root.glob("*.tar"), *root.glob("*/*.tar")]):
        words = [path.parent.name.lower()] if path.parent != root else re.split(r"[^a-z]+", path.stem.lower())
        split = next((_SPLITS[word] for word in words if word in _SPLITS), "train")
        found.setdefault(split, []).append(path)
    return found


def open_external(root: Path, shards: dict[str, list[Path]]) -> Dataset:
    """The data set in the given shards; classes are named by their numbers. ValueError for what cannot be read."""
    splits = {name: _open_split(name, paths) for name, paths in sorted(shards.items())}
    classes = max(int(split.index["label"].max()) for split in splits.values()) + 1
    for split in splits.values():
        check_index(root, split.shards, split.index, classes)
    facts = [
        (name, [shard.path.name for shard in split.shards], index_digest(split.index)) for name, split in splits.items()
    ]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return Dataset(root, [str(label) for label in range(classes)], _MEAN, _STD, fingerprint, splits)


def _open_split(name: str, paths: list[Path]) -> Split:
    stats = [path.stat() for path in paths]
    key = [(os.fspath(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in zip(paths, stats, strict=True)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipelines"
    file = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npy"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Of several ranks on a machine one builds the index, the others wait for it.
        with FileLock(cache / f"{file.stem}.lock"):
            if not file.exists():
                buffer = io.BytesIO()
                np.save(buffer, _build(paths), allow_pickle=False)
                write_file(file, buffer.getvalue())
        index = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
    except OSError as error:
        raise ValueError(
            f"cannot index {paths[0].parent} ({error}); XDG_CACHE_HOME must name a writable folder"
        ) from None
    counts = np.bincount(index["shard"], minlength=len(paths)).tolist()
    shards = [Shard(path, count, stat.st_size) for path, count, stat in zip(paths, counts, stats, strict=True)]
    return Split(name, tuple(shards), index)


def _build(paths: list[Path]) -> NDArray[Any]:
    processes = min(len(os.sched_getaffinity(0)), len(paths))
    if processes == 1:
        rows = [_index_shard(path) for path in paths]
    else:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            rows = list(tqdm(pool.map(_index_shard, paths), "index", len(paths), unit="shard", disable=None))
    for number, row in enumerate(rows):
        row["shard"] = number
    return np.concatenate(rows)


def _index_shard(path: Path) -> NDArray[Any]:
    """The samples of one shard, in its order; an image of unknown size has sides of 0."""
    rows = []
    with path.open("rb") as file:
        for key, parts in _samples(path).items():
            images = IMAGES & parts.keys()
            if not images:
                continue
            offset, size = parts[min(images)]
            labels = {name: os.pread(file.fileno(), parts[name][1], parts[name][0]) for name in _LABELS & parts.keys()}
            label = label_of(f"{path}: {key}", labels)
            rows.append((offset, size, 0, label, *_sides(os.pread(file.fileno(), min(size, _HEAD_BYTES), offset))))
    if not rows:
        raise ValueError(f"{path} holds no .jpg, .jpeg or .png image; it is no shard of labelled images")
    return np.array(rows, INDEX_DTYPE)


def _samples(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> extension -> (offset, size). The extension is what follows the last dot, so that keys may have dots."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in members(path):
        key, dot, extension = member.name.rpartition(".")
        if dot and not os.path.basename(key).startswith("._"):  # macOS puts such twins beside files
            samples.setdefault(key, {})[extension.lower()] = (member.offset, member.size)
    return samples


def label_of(where: str, members: dict[str, bytes]) -> int:
    """The label of a sample.

    Args:
        where: shard and key of the sample, for messages.
        members: contents of the members of the sample by extension.

    Raises:
        ValueError: no .cls or .json has a label.
    """
    for extension in ("cls", "json"):
        if extension not in members:
            continue
        text = members[extension]
        try:
            value = int(text) if extension == "cls" else json.loads(text)
        except ValueError:
            value = None
        if isinstance(value, dict):
            value = next((value[field] for field in _LABEL_FIELDS if field in value), None)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise ValueError(
                f"{where}.{extension} holds no label ({text[:40]!r}); it must be a number of 0 or more, in .json "
                f"alone or as one of the fields {', '.join(_LABEL_FIELDS)}"
            )
        return value
    raise ValueError(f"{where} has an image but no label; a member {where.rpartition(' ')[2]}.cls or .json is needed")


def _sides(head: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(head)) as image:
            return image.height, image.width
    except Exception:  # a decoder of a damaged image may raise anything; it is reported when it is used
        return 0, 0
