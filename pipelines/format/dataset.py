"""A data set of tar shards: where each sample is, its label and its size in pixels.

A directory made by `pipelines.prepare` holds `manifest.json`, and for each split a folder of tar shards (`KEY.jpg`,
`KEY.cls`, `KEY.json`), one DALI-compatible `.idx` file a shard, and `index.npy`, the sample index that is read here.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
INDEX_DTYPE = np.dtype(
    [("offset", "<i8"), ("size", "<i4"), ("shard", "<i4"), ("label", "<i4"), ("height", "<i4"), ("width", "<i4")]
)


@dataclass(frozen=True)
class Shard:
    """A tar file; bytes: its size, by which a replaced or truncated shard is detected."""

    path: Path
    samples: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of one split; a sample's id is its row in `index` (structured, INDEX_DTYPE)."""

    name: str
    shards: tuple[Shard, ...]
    index: NDArray[Any]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every sample, int64 (len,)."""
        return self.index["label"].astype(np.int64)

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

    path: Path
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    splits: dict[str, Split]


def open_prepared(root: Path) -> Dataset:
    """The data set that `pipelines.prepare` made at `root`.

    Raises:
        FileNotFoundError: there is no manifest: it is not such a data set.
        ValueError: it is damaged, or its parts disagree.
    """
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
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


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _open_split(root: Path, name: str, entry: dict[str, Any], classes: int) -> Split:
    for part in (name, *(shard["name"] for shard in entry["shards"])):
        if part != os.path.basename(part) or part in ("", ".."):
            raise ValueError(f"{root / MANIFEST} names {part!r}, outside of its folder; prepare the data set again")
    shards = tuple(Shard(root / name / shard["name"], shard["samples"], shard["bytes"]) for shard in entry["shards"])
    for shard in shards:
        check_shard(shard, shard.path)
    path = root / name / INDEX
    try:
        index = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare the data set again") from None
    if index.dtype != INDEX_DTYPE or index_digest(index) != entry["index_sha256"]:
        raise ValueError(f"{path} is not the index that {MANIFEST} describes; prepare the data set again")
    check_index(path, shards, index, classes)
    return Split(name, shards, index)


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


def check_index(path: Path, shards: tuple[Shard, ...], index: NDArray[Any], classes: int) -> None:
    """ValueError if an entry points outside its shard, a label is out of range or the counts differ."""
    if len(index) != sum(shard.samples for shard in shards):
        raise ValueError(f"{path} has {len(index)} samples where the manifest counts another number; prepare again")
    if len(index) == 0:
        return
    if not (index["shard"].min() >= 0 and index["shard"].max() < len(shards)):
        raise ValueError(f"{path} names a shard that does not exist; prepare the data set again")
    low, high = index["label"].min(), index["label"].max()
    if not (low >= 0 and high < classes):
        raise ValueError(f"{path} has labels {low}..{high}, out of range for {classes} classes (0..{classes - 1})")
    ends = np.array([shard.bytes for shard in shards])[index["shard"]]
    outside = (index["offset"] < 512) | (index["size"] < 0) | (index["offset"] + index["size"] > ends)
    if outside.any():
        shard = shards[index["shard"][outside.argmax()]].path
        raise ValueError(f"{path} points outside of {shard}; prepare the data set again")
