"""Labelled images of any source become a data set of shards."""

import errno
import json
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, SoftFileLock, Timeout

from ..format.dataset import MANIFEST
from ..format.files import sync
from ..random_streams import Stream, permutation
from .archives import Source
from .build import JOURNAL, write_dataset
from .options import Options
from .sources import open_source

__all__ = ["Options", "prepare"]

_LOCKS = "lock", "lock.held"  # of the file system, and where it has none


def prepare(source: str, dest: Path, options: Options) -> str:
    """Prepares a data set.

    Args:
        source: see the head of this file.
        dest: folder that will hold the data set; it appears when everything is done.
        options: of the preparation.

    Returns:
        A line on what the data set holds.

    Raises:
        ValueError: a user's mistake, or a damaged source.
    """
    done = _existing(source, dest, options)
    if done:
        return done
    if dest.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"DEST {dest} is inside of the source {source}; choose another DEST")
    work = dest.with_name(dest.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    with _lock(work):
        (work / "source").mkdir(exist_ok=True)
        try:
            opened = _hold_out(open_source(source, work / "source", options.workers), options)
            manifest = write_dataset(source, opened, work, options)
        except (ValueError, OSError):
            if not (work / JOURNAL).exists():
                shutil.rmtree(work)
            raise
        shutil.rmtree(work / "source")
        for name in _LOCKS:
            (work / name).unlink(missing_ok=True)
        sync(work)
        if dest.exists():
            dest.rmdir()
        work.rename(dest)
        sync(dest.parent)
        # Last, so that an interruption before this line costs nothing.
        (dest / JOURNAL).unlink()
    return _summary(dest, manifest)


def _lock(work: Path) -> AbstractContextManager[Any]:
    """Keeps other preparations from the folder; ValueError if one is writing there."""
    native, marker = (work / name for name in _LOCKS)
    try:
        return FileLock(native, timeout=0, fallback_to_soft=False).acquire()
    except Timeout:
        raise ValueError(f"another preparation is writing {work}; wait for it, or choose another DEST") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    # The file system has no locks: a file with the process and the host, which ends with the process on the same host.
    try:
        return SoftFileLock(marker, timeout=0).acquire()
    except Timeout:
        raise ValueError(
            f"another preparation is writing {work}; wait for it, or remove {marker} if it ended on another machine"
        ) from None


def _existing(source: str, dest: Path, options: Options) -> str | None:
    """The summary of `dest` if it is this data set already; ValueError if it is something else."""
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return None
    if not (dest / MANIFEST).is_file():
        raise ValueError(f"{dest} exists and is not a data set; choose another DEST or remove it")
    manifest = json.loads((dest / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("source") != source or manifest.get("options") != options.relevant():
        raise ValueError(f"{dest} holds another source or other options; remove it or choose another DEST")
    return f"already there: {_summary(dest, manifest)}"


def _summary(dest: Path, manifest: dict[str, Any]) -> str:
    splits = manifest["splits"].items()
    parts = [f"{name} {split['samples']} samples in {len(split['shards'])} shards" for name, split in splits]
    count = len(manifest["rejected"]) + sum(entry["files"] for entry in manifest.get("skipped", []))
    skipped = f", {count} files skipped (see {MANIFEST})" if count else ""
    return f"{dest}: {len(manifest['classes'])} classes, {', '.join(parts)}{skipped}"


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
        held.update(ids[permutation(Stream.HOLDOUT, len(ids), options.seed, label)[:count]].tolist())
    items = [replace(item, split="test") if number in held else item for number, item in enumerate(source.items)]
    return replace(source, items=items)
