"""A data set of tar shards: where each sample is, its label and its size in pixels.

A directory made by `pipelines.prepare` holds `manifest.json`, and for each split a folder of tar shards (`KEY.jpg`,
`KEY.cls`, `KEY.json`), one DALI-compatible `.idx` file a shard, and `index.npy`, the sample index that is read here.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .files import cache_folder, locked
from .remote import Location, Url, describe, download, read

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
INDEX_DTYPE = np.dtype(
    [("offset", "<i8"), ("size", "<i4"), ("shard", "<i4"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")]
)
_CHUNK = 1 << 16  # rows of the index that are looked at together: it is larger than memory for a billion samples
_MOST_MANIFEST_BYTES, _MOST_HEADER_BYTES = 1 << 28, 1 << 12
_LARGE_BYTES = 1 << 26  # an index from which on it is verified once a machine, not by every process


@dataclass(frozen=True)
class Shard:
    """A tar file.

    Attributes:
        path: where it is, on disk or at a URL.
        samples: number of them.
        bytes: its size, by which a replaced or truncated shard is detected.
        version: a tag that another content at this URL would not have; "" if there is none.
    """

    path: Location
    samples: int
    bytes: int
    version: str = ""


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of one split; a sample's id is its row in `index` (structured, INDEX_DTYPE), the map of a file."""

    name: str
    shards: tuple[Shard, ...]
    index: NDArray[Any]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> NDArray[np.int32]:
        """Class of every sample, int32 (len,): a view of the index, of which nothing is read yet."""
        labels: NDArray[np.int32] = self.index["label"]
        return labels

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Samples of each shard, in the order of the ids, (shards,); in a subset, of each run of a shard's samples."""
        sizes = np.array([shard.samples for shard in self.shards])
        if sizes.sum() == len(self):
            return sizes
        begins = np.flatnonzero(np.diff(self.index["shard"], prepend=-1))
        return np.diff(begins, append=len(self))

    @cached_property
    def sides(self) -> tuple[int, int] | None:
        """Height and width in pixels of every image; None if they are not all alike."""
        first = (int(self.index["height"][0]), int(self.index["width"][0]))
        for rows in chunks(self.index):
            if (rows["height"] != first[0]).any() or (rows["width"] != first[1]).any():
                return None
        return first

    def subset(self, ids: NDArray[np.int64]) -> "Split":
        """A split of the samples `ids`, in that order; its own ids start at 0 again."""
        ids = np.asarray(ids)
        if len(ids) and not (ids.min() >= 0 and ids.max() < len(self)):
            raise ValueError(f"ids of a subset must be in 0..{len(self) - 1}, got {ids.min()}..{ids.max()}")
        return replace(self, index=self.index[ids])

    def where(self, sample: int) -> str:
        """Shard and offset of a sample, for messages."""
        entry = self.index[sample]
        return f"{self.shards[entry['shard']].path}, sample {sample} at byte {entry['offset']}"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set on disk.

    Attributes:
        classes: names by label.
        mean: per RGB channel, of pixels in 0..1.
        std: the same.
        fingerprint: SHA-256 of what the shards hold.
        splits: by name, "train" and "test".
    """

    path: Location
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    splits: dict[str, Split]


def open_prepared(root: Location) -> Dataset:
    """The data set that `pipelines.prepare` made at `root`; of one at a URL, manifest and indexes are copied.

    Raises:
        FileNotFoundError: there is no manifest: it is not such a data set.
        ValueError: it is damaged, or its parts disagree; or it is at a URL and has no manifest.
    """
    try:
        manifest = json.loads(_read_manifest(root))
    except FileNotFoundError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{root / MANIFEST} cannot be read ({error}); prepare the data set again") from None
    if manifest.get("format") != FORMAT_VERSION:
        raise ValueError(
            f"{root / MANIFEST} has format {manifest.get('format')}, known is {FORMAT_VERSION}; prepare it again"
        )
    try:
        splits = {
            name: _open_split(root, name, entry, len(manifest["classes"])) for name, entry in manifest["splits"].items()
        }
        digests = [shard["sha256"] for entry in manifest["splits"].values() for shard in entry["shards"]]
        mean, std = (_triple(manifest[name]) for name in ("mean", "std"))
        dataset = Dataset(
            root, list(manifest["classes"]), mean, std, hashlib.sha256("".join(digests).encode()).hexdigest(), splits
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{root / MANIFEST} is damaged ({error!r}); prepare the data set again") from None
    if not splits or not all(len(split) for split in splits.values()):
        raise ValueError(f"{root} has an empty split; prepare the data set again from a source with images")
    return dataset


def _read_manifest(root: Location) -> str:
    file = root / MANIFEST
    if isinstance(file, Path):
        return file.read_text(encoding="utf-8")
    try:
        (described,) = describe([file])
        return read(file, 0, min(described.size, _MOST_MANIFEST_BYTES)).decode()
    except ValueError as error:
        raise ValueError(f"{error}; give a prepared data set, or its shards: {root}/train-{{0000..0099}}.tar") from None


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _open_split(root: Location, name: str, entry: dict[str, Any], classes: int) -> Split:
    for part in (name, *(shard["name"] for shard in entry["shards"])):
        if part != os.path.basename(part) or part in ("", ".."):
            raise ValueError(f"{root / MANIFEST} names {part!r}, outside of its folder; prepare the data set again")
    shards = tuple(
        Shard(root / name / shard["name"], shard["samples"], shard["bytes"], shard["sha256"])
        for shard in entry["shards"]
    )
    for shard in shards:
        if isinstance(shard.path, Path):  # one at a URL is checked when something of it is read
            check_shard(shard, shard.path)
    path = root / name / INDEX
    if isinstance(path, Url):
        path = _copied(path, entry["index_sha256"], entry["samples"])
    return Split(name, shards, open_index(path, shards, entry["index_sha256"], classes))


def _copied(url: Url, sha256: str, samples: int) -> Path:
    """The index at the URL as a file in the cache, by its digest."""
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(
            f"{url} has the digest {sha256[:80]!r} in {MANIFEST}, which is none; prepare the data set again"
        )
    file = cache_folder() / f"{sha256}.npy"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                (described,) = describe([url])
                if not 0 <= described.size - samples * INDEX_DTYPE.itemsize <= _MOST_HEADER_BYTES:
                    raise ValueError(f"{url} is not the index that {MANIFEST} describes; prepare the data set again")
                download(url, file, described.size)
    except OSError as error:
        raise ValueError(f"cannot copy {url} ({error}); XDG_CACHE_HOME must name a writable folder") from None
    return file


def open_index(path: Path, shards: tuple[Shard, ...], sha256: str, classes: int) -> NDArray[Any]:
    """The map of an index.

    Args:
        path: of the index.
        shards: what it points into.
        sha256: of its rows.
        classes: number of classes.

    Raises:
        ValueError: it cannot be read, has another digest, or does not fit shards and classes.
    """
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare the data set again") from None
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise ValueError(f"{path} is not the index that {MANIFEST} describes; prepare the data set again")
    sizes = [(shard.samples, shard.bytes) for shard in shards]
    stamp = _stamp(path, [sha256, sizes, classes])
    if index.nbytes < _LARGE_BYTES or not stamp.exists():
        _verify(path, shards, index.offset, sha256, classes)
        if index.nbytes >= _LARGE_BYTES:
            try:
                stamp.parent.mkdir(parents=True, exist_ok=True)
                stamp.touch()
            except OSError:  # a home that cannot be written to: the next process verifies it as well
                pass
    return np.asarray(index)


def _stamp(path: Path, facts: list[Any]) -> Path:
    """The file that says that an index was verified in its present state; its time of change cannot be set."""
    stat = path.stat()
    key = [os.fspath(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, *facts]
    return cache_folder() / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.verified"


def _verify(path: Path, shards: tuple[Shard, ...], offset: int, sha256: str, classes: int) -> None:
    """ValueError unless the index has the digest and fits the shards."""
    digest = hashlib.sha256()
    for rows in _stored_rows(path, offset):
        digest.update(rows.view(np.uint8).data)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{path} is not the index that {MANIFEST} describes; prepare the data set again")
    check_index(path, shards, _stored_rows(path, offset), classes)


def _stored_rows(path: Path, offset: int) -> Iterator[NDArray[Any]]:
    """The rows of an index, some at a time, without a map of the file, whose pages would count as this process's."""
    with path.open("rb") as file:
        file.seek(offset)
        while len(rows := np.fromfile(file, INDEX_DTYPE, _CHUNK)):
            yield rows


def chunks(index: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The rows of an index, some at a time."""
    for first in range(0, len(index), _CHUNK):
        yield index[first : first + _CHUNK]


def index_digest(index: NDArray[Any]) -> str:
    """SHA-256 of a sample index."""
    return hashlib.sha256(index.view(np.uint8).data).hexdigest()


def check_shard(shard: Shard, file: Path | int) -> None:
    """ValueError unless `file` (a path or an open descriptor) has the size the index was made for."""
    try:
        size = os.stat(file).st_size
    except OSError as error:
        raise ValueError(
            f"shard {shard.path} cannot be opened ({error.strerror}); restore it or prepare again"
        ) from None
    if size != shard.bytes:
        raise ValueError(
            f"shard {shard.path} has {size} bytes where its index says {shard.bytes}: truncated or replaced; "
            "restore it or prepare the data set again"
        )


def check_index(path: Path, shards: tuple[Shard, ...], index: Iterable[NDArray[Any]], classes: int) -> None:
    """ValueError if an entry points outside its shard, a label is out of range or the counts differ.

    Args:
        path: of the index, for messages.
        shards: what it points into.
        index: its rows, some at a time.
        classes: number of classes.
    """
    bytes_of_shards = np.array([shard.bytes for shard in shards])
    count, low, high = 0, classes, -1
    for rows in index:
        count += len(rows)
        if not (rows["shard"].min() >= 0 and rows["shard"].max() < len(shards)):
            raise ValueError(f"{path} names a shard that does not exist; prepare the data set again")
        low, high = min(low, int(rows["label"].min())), max(high, int(rows["label"].max()))
        ends = bytes_of_shards[rows["shard"]]
        outside = (rows["offset"] < 512) | (rows["size"] < 0) | (rows["offset"] + rows["size"] > ends)
        if outside.any():
            shard = shards[rows["shard"][outside.argmax()]].path
            raise ValueError(f"{path} points outside of {shard}; prepare the data set again")
    if count != sum(shard.samples for shard in shards):
        raise ValueError(f"{path} has {count} samples where the manifest counts another number; prepare again")
    if count and not (low >= 0 and high < classes):
        raise ValueError(f"{path} has labels {low}..{high}, out of range for {classes} classes (0..{classes - 1})")
