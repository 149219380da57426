"""Writes one shard: tar, DALI-compatible index and the facts about it, identical bytes for identical samples."""

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import INDEX_DTYPE
from .files import sync, write_file
from .tar import BLOCK, RECORD, header, padded


@dataclass(frozen=True)
class StoredImage:
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
        metadata = 3 * BLOCK
        size = self._length + 3 * BLOCK + padded(len(image)) + metadata
        return limit > 0 and -(-(size + 2 * BLOCK) // RECORD) * RECORD > limit

    def add(self, stored: StoredImage, label: int, class_name: str, source_name: str) -> None:
        """Appends a sample; source_name: of the image where it comes from."""
        key = f"{self._stem}-{self.samples:06d}"
        metadata = json.dumps({"name": source_name, "class": class_name}).encode()
        fields: list[str] = []
        offset = 0
        for extension, data in (
            (stored.extension, stored.image),
            ("cls", str(label).encode()),
            ("json", metadata),
        ):
            member = f"{key}.{extension}"
            start = self._length + BLOCK
            offset = offset or start
            self._write(header(member, len(data)) + data)
            self._write(bytes(-len(data) % BLOCK))
            fields.append(f"{extension} {start} {len(data)} {member}")
        self._rows.append((offset, len(stored.image), int(self._stem), label, stored.height, stored.width))
        self._lines.append(" ".join(fields))
        self._pixels += stored.height * stored.width
        for channel, (total, squares) in zip(self._moments, stored.moments, strict=True):
            channel[0] += total
            channel[1] += squares

    def abandon(self) -> None:
        """Closes the file as it is, to be removed when the preparation is resumed."""
        self._file.close()

    def finish(self) -> dict[str, Any]:
        """Makes the shard and its index durable under their names; returns name, counts, digest and index rows."""
        with self._file as file:
            end = self._length + 2 * BLOCK
            self._write(bytes(2 * BLOCK + -end % RECORD))
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
