"""Writes one shard: tar, DALI-compatible index and the facts about it, identical bytes for identical samples."""

import base64
import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .items import Item
from .shards import INDEX_DTYPE

_BLOCK = 512
# Plain ustar with fixed owner, mode and time: the same bytes on every machine.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


@dataclass(frozen=True)
class Stored:
    """An image as it is stored: jpg or png bytes, sides in pixels, sum and sum of squares of its channels."""

    image: bytes
    extension: str
    height: int
    width: int
    moments: list[list[int]]


class ShardWriter:
    """A tar of KEY.jpg or KEY.png, KEY.cls and KEY.json, under a temporary name until `finish`."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._stem = folder, f"{number:06d}"
        self._file = (folder / f"{self._stem}.tar.partial").open("w+b")
        self._length = 0
        self._rows: list[tuple[int, ...]] = []
        self._lines: list[str] = []
        self._moments = [[0, 0] for _ in range(3)]
        self._pixels = 0

    @property
    def samples(self) -> int:
        return len(self._rows)

    def outgrows(self, image: bytes, limit: int) -> bool:
        """Whether one more sample takes the file beyond `limit` bytes (0: never)."""
        metadata = 3 * _BLOCK
        size = self._length + 3 * _BLOCK + _padded(len(image)) + metadata
        return limit > 0 and -(-(size + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE > limit

    def add(self, item: Item, name: str, stored: Stored) -> None:
        """Appends a sample of class `name`."""
        key = f"{self._stem}-{self.samples:06d}"
        metadata = json.dumps({"name": item.name, "class": name}).encode()
        fields: list[str] = []
        offset = 0
        for extension, data in (
            (stored.extension, stored.image),
            ("cls", str(item.label).encode()),
            ("json", metadata),
        ):
            member = f"{key}.{extension}"
            start = self._length + _BLOCK
            offset = offset or start
            self._write(_header(member, len(data)) + data)
            self._write(bytes(-len(data) % _BLOCK))
            fields.append(f"{extension} {start} {len(data)} {member}")
        self._rows.append((offset, len(stored.image), int(self._stem), item.label, stored.height, stored.width))
        self._lines.append(" ".join(fields))
        self._pixels += stored.height * stored.width
        for channel, (total, squares) in zip(self._moments, stored.moments, strict=True):
            channel[0] += total
            channel[1] += squares

    def abandon(self) -> None:
        """Closes the file as it is, to be removed by whoever continues."""
        self._file.close()

    def finish(self) -> dict[str, Any]:
        """Makes the shard and its index durable under their names; returns name, counts, digest and index rows."""
        with self._file as file:
            end = self._length + 2 * _BLOCK
            self._write(bytes(2 * _BLOCK + -end % tarfile.RECORDSIZE))
            file.flush()
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            length = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
        name = f"{self._stem}.tar"
        lines = [f"v1.2 {len(self._lines)}", *self._lines]
        write_file(self._folder / f"{self._stem}.idx", ("\n".join(lines) + "\n").encode())
        (self._folder / f"{name}.partial").rename(self._folder / name)
        sync(self._folder)
        return {
            "name": name,
            "samples": self.samples,
            "bytes": length,
            "sha256": digest,
            "index": base64.b64encode(np.array(self._rows, INDEX_DTYPE).tobytes()).decode(),
            "pixels": self._pixels,
            "moments": self._moments,
        }

    def _write(self, data: bytes) -> None:
        self._length += self._file.write(data)


def _header(name: str, size: int) -> bytes:
    """What tarfile writes before a member, at a sixth of its time."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def write_file(path: Path, data: bytes) -> None:
    """Replaces the file whole: a reader finds the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def sync(folder: Path) -> None:
    """Makes renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
