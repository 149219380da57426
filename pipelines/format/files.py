"""Files on disk: whole or not at all, durable, and without secrets in messages."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file whole: a reader finds the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def cache_folder() -> Path:
    """Where this user's indexes are kept: XDG_CACHE_HOME, else ~/.cache; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipelines"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock, where the file system has locks: without, processes do the same work beside each other."""
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
    try:
        yield
    finally:
        lock.release()


def sync(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def without_secrets(text: str) -> str:
    """The text, and "…" in place of what a URL in it may hold of secrets: user and password, and the query."""
    return re.sub(
        r"(\w:/{1,2})([^/@\s'\"]+@)?([^\s?'\",]*)(\?[^\s'\",]*)?",
        lambda m: f"{m[1]}{'…@' if m[2] else ''}{m[3]}{'?…' if m[4] else ''}",
        text,
    )
