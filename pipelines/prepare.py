"""python -m pipelines.prepare SOURCE DEST [key=value ...]: labelled images become shards.

SOURCE is
- a folder of class folders (optionally below train/ and test/), or a .tar, .tar.gz or .zip of the same;
- CIFAR-10 or CIFAR-100 as published: cifar-10-binary.tar.gz, cifar-100-python.tar.gz ..., or the unpacked folder;
- the folder of ImageNet's archives: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz;
- a folder of IDX files, or fashion-mnist.

Images become JPEGs of 128 x 128. Raw pixels (CIFAR, IDX) keep their size and become PNGs: they lose nothing.
DEST appears when everything is done; until then the work stands in DEST.partial, and the same command continues there
after an interruption. Shards depend on source and options alone, byte for byte.
"""

import base64
import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import cli, images
from .items import Item, Source
from .order import permutation
from .shards import FORMAT_VERSION, INDEX, INDEX_DTYPE, MANIFEST, digest
from .source import open_source
from .writer import ShardWriter, Stored, sync, write_file

_JOURNAL = "journal.jsonl"
_CHUNK = 64  # items a process takes at a time
_SPLITS = ("train", "test")


@dataclass(frozen=True)
class Options:
    """What `pipelines.prepare` takes as key=value."""

    size: int | None = None
    """Side of the stored images in pixels; 0 keeps them as they are. Default: 128; of raw pixels (CIFAR, IDX): 0."""
    mode: Literal["squash", "crop"] = "squash"
    """How an image becomes a square: both sides resized, or the shorter side resized and the centre cut out."""
    filter: Literal["lanczos", "area"] = "lanczos"
    quality: int = 92
    """Of the JPEGs that are encoded, 1..100."""
    shard_size: int = 1000
    """Samples a shard."""
    shard_bytes: int = 0
    """A shard also ends before its file grows beyond this; 0: no limit."""
    test_fraction: float = 0.0
    """Share of every class held out as the test split, of a source that has none."""
    seed: int = 0
    strict: bool = False
    """End at the first file that cannot be decoded, instead of leaving it out."""
    processes: int = 0
    """0: one a core."""

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("size", self.size or 0, 0, 16384),
            ("quality", self.quality, 1, 100),
            ("shard_size", self.shard_size, 1, None),
            ("shard_bytes", self.shard_bytes, 0, None),
            ("test_fraction", self.test_fraction, 0, 0.99),
            ("seed", self.seed, 0, None),
            ("processes", self.processes, 0, None),
        ):
            if value < low or (high is not None and value > high):
                limit = f"in {low}..{high}" if high is not None else f"{low} or more"
                raise ValueError(f"{name} must be {limit}, got {value}")

    def that_matter(self) -> dict[str, Any]:
        """The options on which the result depends."""
        return {name: value for name, value in asdict(self).items() if name not in ("processes", "strict")}


def prepare(source: str, dest: Path, options: Options) -> str:
    """Makes the data set `dest` of `source`; returns a line on what there is. ValueError for a user's mistake."""
    done = _existing(source, dest, options)
    if done:
        return done
    work = dest.with_name(dest.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another preparation is writing {work}; wait for it, or choose another DEST") from None
        (work / "source").mkdir(exist_ok=True)
        try:
            opened = _hold_out(open_source(source, work / "source", _processes(options)), options)
            manifest = _write(source, opened, work, options)
        except (ValueError, OSError):
            if not (work / _JOURNAL).exists():
                shutil.rmtree(work)
            raise
        shutil.rmtree(work / "source")
        (work / "lock").unlink()
        sync(work)
        if dest.exists():
            dest.rmdir()
        work.rename(dest)
        sync(dest.parent)
        # Last, so that an interruption before this line costs nothing.
        (dest / _JOURNAL).unlink()
    return _summary(dest, manifest)


def _existing(source: str, dest: Path, options: Options) -> str | None:
    """The summary of `dest` if it is this very data set; ValueError if something else stands there."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return None
    if not (dest / MANIFEST).is_file():
        raise ValueError(f"{dest} exists and is not a data set; choose another DEST or remove it")
    manifest = json.loads((dest / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("source") != source or manifest.get("options") != options.that_matter():
        raise ValueError(f"{dest} holds another source or other options; remove it or choose another DEST")
    return f"already there: {_summary(dest, manifest)}"


def _summary(dest: Path, manifest: dict[str, Any]) -> str:
    splits = manifest["splits"].items()
    parts = [f"{name} {split['samples']} samples in {len(split['shards'])} shards" for name, split in splits]
    rejected = len(manifest["rejected"])
    left_out = f", {rejected} files left out (see {MANIFEST})" if rejected else ""
    return f"{dest}: {len(manifest['classes'])} classes, {', '.join(parts)}{left_out}"


def _hold_out(source: Source, options: Options) -> Source:
    if not options.test_fraction:
        return source
    if any(item.split == "test" for item in source.items):
        raise ValueError("test_fraction is for a source without a test split; this one has its own")
    held: set[int] = set()
    labels = np.array([item.label for item in source.items])
    for label in range(len(source.classes)):
        ids = np.flatnonzero(labels == label)
        count = round(options.test_fraction * len(ids))
        held.update(ids[permutation(len(ids), options.seed, len(_SPLITS) + label)[:count]].tolist())
    items = [replace(item, split="test") if number in held else item for number, item in enumerate(source.items)]
    return replace(source, items=items)


def _write(name: str, source: Source, work: Path, options: Options) -> dict[str, Any]:
    """All shards, indexes and the manifest, in `work`, continuing what its journal tells of."""
    resolved = replace(options, size=_size(source, options))
    plan = hashlib.sha256(json.dumps([resolved.that_matter(), source.classes], ensure_ascii=True).encode())
    for item in source.items:
        plan.update(repr((item.split, item.label, item.name, item.size)).encode("utf-8", "surrogateescape"))
    records = _resume(work, plan.hexdigest())
    splits: dict[str, Any] = {}
    with tqdm(total=len(source.items), unit="image", disable=None) as bar, (work / _JOURNAL).open("a") as journal:
        for number, split in enumerate(_SPLITS):
            items = [item for item in source.items if item.split == split]
            if not items:
                continue
            items = [items[position] for position in permutation(len(items), options.seed, number)]
            (work / split).mkdir(exist_ok=True)
            done = _of(split, records)
            _remove_unrecorded(work / split, done)
            start = done[-1]["next"] if done else 0
            bar.update(start)
            stored = _convert(items[start:], resolved, bar)
            for record in _shards(work / split, split, source.classes, items, start, len(done), stored, resolved):
                journal.write(json.dumps(record) + "\n")
                journal.flush()
                os.fsync(journal.fileno())
                records.append(record)
            splits[split] = _finish_split(work / split, _of(split, records), source.classes)
    rejected = [entry for record in records for entry in record["rejected"]]
    if not splits.get("train", {"samples": 0})["samples"]:
        reason = f", the first because: {rejected[0]['reason']}" if rejected else ""
        (work / _JOURNAL).unlink()
        raise ValueError(f"{name} has no training image; {len(rejected)} files were left out{reason}")
    mean, std = _statistics(_of("train", records))
    manifest = {
        "format": FORMAT_VERSION,
        "classes": source.classes,
        "mean": mean,
        "std": std,
        "splits": {split: entry for split, entry in splits.items() if entry["samples"]},
        "source": name,
        "options": options.that_matter(),
        "size": resolved.size,
        "rejected": rejected,
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
    """The records of shards finished before an interruption; a last line cut short does not count."""
    path = work / _JOURNAL
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        write_file(path, json.dumps({"plan": plan}).encode() + b"\n")
        return []
    head, *records = [json.loads(line) for line in whole]
    if head["plan"] != plan:
        raise ValueError(f"{work} was left by another source or other options; remove it to start anew")
    if len(whole) < len(lines):
        write_file(path, b"".join(whole))
    return list(records)


def _remove_unrecorded(folder: Path, done: list[dict[str, Any]]) -> None:
    known = {record["name"] for record in done} | {Path(record["name"]).stem + ".idx" for record in done}
    for path in folder.iterdir():
        if path.name not in known:
            path.unlink()


def _convert(items: list[Item], options: Options, bar: Any) -> Iterator[Stored | str]:
    """Each item stored, or the reason it cannot be, in order; spread over processes."""
    pieces = [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]
    processes = min(_processes(options), len(pieces))
    if processes <= 1:
        for piece in pieces:
            for result in _convert_piece(piece, options):
                bar.update()
                yield result
        return
    # Spawned, not forked: the caller may have threads.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    running: deque[Future[list[Stored | str]]] = deque()
    try:
        waiting = iter(pieces)
        while True:
            while len(running) < 2 * processes and (piece := next(waiting, [])):
                running.append(pool.submit(_convert_piece, piece, options))
            if not running:
                return
            for result in running.popleft().result():
                bar.update()
                yield result
    except BrokenProcessPool:
        raise ValueError(
            "a process died, perhaps for want of memory; give the same command with fewer processes"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _processes(options: Options) -> int:
    return options.processes or len(os.sched_getaffinity(0))


def _convert_piece(items: list[Item], options: Options) -> list[Stored | str]:
    results: list[Stored | str] = []
    for item in items:
        try:
            results.append(_store(item, options))
        except ValueError as error:
            results.append(str(error))
    return results


def _store(item: Item, options: Options) -> Stored:
    data = item.read()
    if item.pixels:
        # Nothing is lost: pixels that were published as such are few and small, and a PNG keeps them.
        planes = np.frombuffer(data, np.uint8).reshape(item.pixels)
        image = Image.fromarray(planes if planes.ndim == 2 else np.ascontiguousarray(planes.transpose(1, 2, 0)))
    else:
        image = images.open_image(data)
        if options.size == 0 and images.storable(image):
            return Stored(data, "jpg", image.height, image.width, images.moments(image))
        image = images.plain(image)
    if options.size:
        image = images.square(image, options.size, options.mode, options.filter)
    encoded, extension = (images.png(image), "png") if item.pixels else (images.jpeg(image, options.quality), "jpg")
    return Stored(encoded, extension, image.height, image.width, images.moments(image))


def _shards(
    folder: Path,
    split: str,
    classes: list[str],
    items: list[Item],
    start: int,
    number: int,
    stored: Iterator[Stored | str],
    options: Options,
) -> Iterator[dict[str, Any]]:
    """Writes shard after shard from items[start:]; yields the record of each when its file is safe."""
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
            shard.add(item, classes[item.label], result)
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
        "index_sha256": digest(index),
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


def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or "=" in arguments[0] or "=" in arguments[1]:
        raise ValueError("usage: python -m pipelines.prepare SOURCE DEST [key=value ...]")
    source, dest, *options = arguments
    print(prepare(source, Path(dest), cli.parse(Options, options)))


if __name__ == "__main__":
    cli.run("pipelines.prepare", main)
