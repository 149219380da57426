"""Writes the shards, indexes and manifest of a data set, with a journal from which it can be resumed."""

import base64
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..format.dataset import FORMAT_VERSION, INDEX, INDEX_DTYPE, MANIFEST, index_digest
from ..format.files import write_file
from ..format.writer import ShardWriter, StoredImage
from ..random_streams import Stream, permutation
from .archives import Item, Source
from .convert import convert
from .options import Options

JOURNAL = "journal.jsonl"
_SPLITS = ("train", "test")
_ORDER_VERSION = 3  # of the order in which images are stored; a journal of another one cannot be resumed


def write_dataset(name: str, source: Source, work: Path, options: Options) -> dict[str, Any]:
    """Writes all shards, indexes and the manifest.

    Args:
        name: of the source, for the manifest.
        source: the images.
        work: folder to write to; what its journal has is kept.
        options: of the preparation.

    Returns:
        The manifest.

    Raises:
        ValueError: the journal is of another preparation, or no training image can be stored.
    """
    resolved = replace(options, size=_size(source, options))
    plan = hashlib.sha256(json.dumps([_ORDER_VERSION, resolved.relevant(), source.classes], ensure_ascii=True).encode())
    for item in source.items:
        plan.update(repr((item.split, item.label, item.name, item.size)).encode("utf-8", "surrogateescape"))
    records = _resume(work, plan.hexdigest())
    splits: dict[str, Any] = {}
    with tqdm(total=len(source.items), unit="image", disable=None) as bar, (work / JOURNAL).open("a") as journal:
        for number, split in enumerate(_SPLITS):
            items = [item for item in source.items if item.split == split]
            if not items:
                continue
            items = [items[position] for position in permutation(Stream.PREPARE, len(items), options.seed, number)[:]]
            (work / split).mkdir(exist_ok=True)
            done = _of(split, records)
            _remove_unrecorded(work / split, done)
            start = done[-1]["next"] if done else 0
            bar.update(start)
            stored = convert(items[start:], resolved, bar)
            for record in _shards(work / split, split, source.classes, items, start, len(done), stored, resolved):
                journal.write(json.dumps(record) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
                records.append(record)
            splits[split] = _finish_split(work / split, _of(split, records), source.classes)
    rejected = [entry for record in records for entry in record["rejected"]]
    if not splits.get("train", {"samples": 0})["samples"]:
        reason = f", the first because: {rejected[0]['reason']}" if rejected else ""
        (work / JOURNAL).unlink()
        raise ValueError(f"{name} has no training image; {len(rejected)} files were skipped{reason}")
    mean, std = _statistics(_of("train", records))
    manifest = {
        "format": FORMAT_VERSION,
        "classes": source.classes,
        "mean": mean,
        "std": std,
        "splits": {split: entry for split, entry in splits.items() if entry["samples"]},
        "source": name,
        "options": options.relevant(),
        "size": resolved.size,
        "rejected": rejected,
        "skipped": source.skipped,
    }
    write_file(work / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _of(split: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["split"] == split]


def _size(source: Source, options: Options) -> int:
    if options.size is not None:
        return options.size
    return 0 if source.items[0].pixels else 128


def _resume(work: Path, plan: str) -> list[dict[str, Any]]:
    """The records of the shards that were finished before an interruption; a truncated last line is dropped."""
    path = work / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        write_file(path, json.dumps({"plan": plan}).encode() + b"\n")
        return []
    head, *records = [json.loads(line) for line in whole]
    if head["plan"] != plan:
        raise ValueError(f"{work} is of another source, version or options; remove it to start anew")
    if len(whole) < len(lines):
        write_file(path, b"".join(whole))
    return list(records)


def _remove_unrecorded(folder: Path, done: list[dict[str, Any]]) -> None:
    known = {record["name"] for record in done} | {Path(record["name"]).stem + ".idx" for record in done}
    for path in folder.iterdir():
        if path.name not in known:
            path.unlink()


def _shards(
    folder: Path,
    split: str,
    classes: list[str],
    items: list[Item],
    start: int,
    number: int,
    stored: Iterator[StoredImage | str],
    options: Options,
) -> Iterator[dict[str, Any]]:
    """Writes shard after shard from items[start:]; yields the record of each when its file is durable."""
    shard: ShardWriter | None = None
    rejected: list[dict[str, str]] = []
    try:
        for position, (item, result) in enumerate(zip(items[start:], stored, strict=True), start):
            if isinstance(result, str):
                if options.strict:
                    raise ValueError(f"{_printable(item.name)}: {result}")
                rejected.append({"name": _printable(item.name), "split": split, "reason": result})
                continue
            if shard and (shard.samples == options.shard_size or shard.outgrows(result.image, options.shard_bytes)):
                yield {"split": split, "next": position, "rejected": rejected, **shard.finish()}
                shard, rejected, number = None, [], number + 1
            shard = shard or ShardWriter(folder, number)
            shard.add(result, item.label, classes[item.label], item.name)
        if shard:
            yield {"split": split, "next": len(items), "rejected": rejected, **shard.finish()}
        elif rejected:
            yield {"split": split, "next": len(items), "rejected": rejected, "name": "", "samples": 0}
    finally:
        if shard:
            shard.abandon()


def _finish_split(folder: Path, records: list[dict[str, Any]], classes: list[str]) -> dict[str, Any]:
    """Writes the sample index of a split; returns its entry in the manifest."""
    shards = [record for record in records if record["samples"]]
    index = np.frombuffer(b"".join(base64.b64decode(record["index"]) for record in shards), INDEX_DTYPE)
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    write_file(folder / INDEX, buffer.getvalue())
    counts = np.bincount(index["label"], minlength=len(classes)).tolist()
    return {
        "samples": len(index),
        "class_counts": counts,
        "index_sha256": index_digest(index),
        "shards": [{name: record[name] for name in ("name", "samples", "bytes", "sha256")} for record in shards],
    }


def _statistics(records: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, of values in 0..1."""
    shards = [record for record in records if record["samples"]]
    pixels = sum(record["pixels"] for record in shards)
    mean, std = [], []
    for channel in range(3):
        total, squares = (sum(record["moments"][channel][power] for record in shards) for power in range(2))
        mean.append(total / pixels / 255)
        # Exact integers: no cancellation. A constant channel would make the normalization divide by zero.
        variance = (pixels * squares - total**2) / pixels**2
        std.append(max(variance**0.5, 1.0) / 255)
    return mean, std


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
