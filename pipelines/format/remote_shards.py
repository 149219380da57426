"""Parts of shards at URLs, kept on local disk in a cache of bounded size for all processes of this user together.

fsspec's own caches grow without bound. Within a split nothing is removed: in the random order of an epoch the range
that was read last is no likelier to be read next than any other, so that a full cache stays as it is, and serves the
share of the data that it holds. Opening a split makes room for it among those that were not opened for an hour.
"""

import contextlib
import hashlib
import os
import shutil
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

from .dataset import Shard
from .files import cache_folder, locked
from .remote import Url, describe, read

_BLOCK = 4096  # what a file takes on disk is a multiple of it
_OTHERS = 0.5  # share of the cache that other splits keep when one is opened
_RECENT_SECONDS = 3600  # those of the same run are opened together, and stay


class RemoteShards:
    """The shards of a split that are at URLs; for use from several threads."""

    def __init__(self, shards: Sequence[Shard], cache_bytes: int) -> None:
        self._shards = shards
        self._found: set[int] = set()
        if not any(isinstance(shard.path, Url) for shard in shards):
            cache_bytes = 0
        self._names = [f"{os.fspath(shard.path)} {shard.bytes} {shard.version}" for shard in shards]
        self._cache = RangeCache("\n".join(self._names), cache_bytes)

    def read(self, number: int, start: int, stop: int) -> bytes:
        """The bytes start..stop-1 of a shard; ValueError if they cannot be had, or its size is not the expected one."""
        shard, name = self._shards[number], self._names[number]
        assert isinstance(shard.path, Url)
        # Without a version, a copy could be of another shard that was there before.
        kept = self._cache.get(name, start, stop) if shard.version else None
        if kept is not None:
            return kept
        if number not in self._found:
            (described,) = describe([shard.path])
            if described.size != shard.bytes:
                raise ValueError(
                    f"shard {shard.path} has {described.size} bytes where its index says {shard.bytes}: truncated or "
                    "replaced; restore it or prepare the data set again"
                )
            self._found.add(number)
        data = read(shard.path, start, stop)
        if shard.version:
            self._cache.put(name, start, data)
        return data


class RangeCache:
    """The ranges of one split; for use from several threads."""

    def __init__(self, split: str, limit_bytes: int) -> None:
        """The cache of the split that the text identifies; 0 bytes: nothing is kept."""
        self._root = cache_folder() / "ranges"
        self._folder = self._root / hashlib.sha256(split.encode()).hexdigest()[:32]
        self._limit, self._full = limit_bytes, limit_bytes == 0
        if not self._full:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with locked(self._root / "lock"):
                    self._make_room()
            except OSError:  # no place to write to: it works without
                self._full = True

    def get(self, name: str, start: int, stop: int) -> bytes | None:
        """The bytes start..stop-1 of a file, if they are here and whole."""
        try:
            data = self._path(name, start).read_bytes()
        except OSError:
            return None
        content, checksum = data[:-4], data[-4:]
        return content if len(content) == stop - start and zlib.crc32(content).to_bytes(4, "big") == checksum else None

    def put(self, name: str, start: int, content: bytes) -> None:
        """Keeps the bytes from `start` on, unless the cache is full or cannot be written to."""
        if self._full:
            return
        path = self._path(name, start)
        partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._root / "lock"):
                size = _on_disk(len(content) + 4)
                self._full = sum(map(_used, self._root.iterdir())) + size > self._limit
                if self._full:
                    return
                (self._folder / "used").write_text(str(_used(self._folder) + size))
            partial.write_bytes(content + zlib.crc32(content).to_bytes(4, "big"))
            partial.rename(path)
        except OSError:  # the disk is full, or another process just made room for its split
            self._full = True
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def _path(self, name: str, start: int) -> Path:
        return self._folder / hashlib.sha256(name.encode()).hexdigest()[:16] / str(start)

    def _make_room(self) -> None:
        os.utime(self._folder)
        others = [path for path in self._root.iterdir() if path.is_dir() and path != self._folder]
        opened = sorted((path.stat().st_mtime, path) for path in others)
        used, now = sum(map(_used, others)), self._folder.stat().st_mtime
        for since, path in opened:
            if used > _OTHERS * self._limit and now - since > _RECENT_SECONDS:
                used -= _used(path)
                shutil.rmtree(path)


def _used(folder: Path) -> int:
    """What a split takes, by its own account."""
    try:
        return int((folder / "used").read_text() or 0)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
