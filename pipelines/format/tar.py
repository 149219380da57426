"""Tar files: the places of their members, and the headers that we write."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512
RECORD = tarfile.RECORDSIZE
# Plain ustar with fixed owner, mode and time: the same bytes on every machine.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)


@dataclass(frozen=True)
class Member:
    """One file in a tar: offset and size of its content in bytes."""

    name: str
    offset: int
    size: int


def members(path: Path, start: int = 0, end: int | None = None, name: str = "") -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order.

    Args:
        path: of the tar.
        start: first byte of a tar that is itself a member of `path`.
        end: the byte after its last.
        name: of that member, for messages.

    Raises:
        ValueError: it is no uncompressed tar, or is truncated.
    """
    where = f"{path}, {name}" if name else str(path)
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size if end is None else end
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for entry in archive:
                    if not entry.isreg():
                        continue
                    if entry.offset_data + entry.size > end:
                        raise ValueError(f"{where} is truncated: {entry.name} ends beyond it; copy or make it again")
                    yield Member(entry.name, entry.offset_data, entry.size)
                last = archive.offset
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{where} is not a readable tar ({error}); it must be uncompressed") from error
        file.seek(last)
        if last + 512 > end or file.read(512) != bytes(512):
            raise ValueError(f"{where} is truncated: it has no end-of-archive mark; copy or make it again")


def header(name: str, size: int) -> bytes:
    """What tarfile writes before a member, at a sixth of its time."""
    header = bytearray(_HEADER)
    header[: len(name)] = name.encode()
    header[124:136] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def padded(size: int) -> int:
    """Bytes that content of `size` bytes takes in a tar."""
    return -(-size // BLOCK) * BLOCK


def number(field: bytes) -> int:
    """A number of a tar header: octal text, or base 256 when its first bit is set; -1 if neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return -1
