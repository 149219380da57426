"""Tar files: the places of their members, and the headers that we write."""

import os
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

BLOCK = 512
RECORD = tarfile.RECORDSIZE
# Plain ustar with fixed owner, mode and time: the same bytes on every machine.
_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_LINKS = 40  # from one to the next; as in Linux


@dataclass(frozen=True)
class Member:
    """One file in a tar: offset and size of its content in bytes.

    Attributes:
        fault: why its content cannot be read there, or "".
    """

    name: str
    offset: int
    size: int
    fault: str = ""


def compression(head: bytes) -> str | None:
    """gzip, bzip2, xz or zstd by the first bytes of a file; None for another one."""
    return next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)


def members(file: BinaryIO, where: str, start: int = 0, end: int | None = None) -> list[Member]:
    """The files of an uncompressed tar, in order, and of all tars that were joined to it.

    A link is the member that it leads to, under its own name.

    Args:
        file: seekable; of its bytes only the headers are read.
        where: its name, for messages.
        start: first byte of a tar that is itself a member of `file`.
        end: the byte after its last.

    Raises:
        ValueError: it is no uncompressed tar, is truncated, or cannot be read.
    """
    try:
        return _resolved(_entries(file, where, start, file.seek(0, os.SEEK_END) if end is None else end))
    except (tarfile.TarError, EOFError) as error:
        file.seek(start)
        if kind := compression(file.read(8)):
            raise ValueError(f"{where} is compressed by {kind}; unpack it: shards are uncompressed") from None
        raise ValueError(f"{where} is not a readable tar ({error})") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read ({error.strerror or error})") from error


def _entries(file: BinaryIO, where: str, start: int, end: int) -> Iterator[tarfile.TarInfo]:
    at = start
    while at == start or at < end:
        file.seek(at)
        first = at
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for entry in archive:
                if entry.isreg() and not entry.issparse() and entry.offset_data + entry.size > end:
                    raise ValueError(f"{where} is truncated: {entry.name} ends beyond it; copy or make it again")
                yield entry
            at = archive.offset
        file.seek(at)
        if at + BLOCK > end or file.read(BLOCK) != bytes(BLOCK):
            if start < at == first:
                raise ValueError(f"{where} has bytes behind its end, at {at}, that are no tar; copy or make it again")
            raise ValueError(f"{where} is truncated: it has no end-of-archive mark; copy or make it again")
        at = _after_zeros(file, at, end)


def _after_zeros(file: BinaryIO, at: int, end: int) -> int:
    """Where the zeros at `at`, which fill the last record of a tar, end: another tar may be joined to it there."""
    file.seek(at)
    while at < end and (data := file.read(min(100 * RECORD, end - at))):
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros < len(data):
            return at + zeros // BLOCK * BLOCK
        at += zeros
    return end


def _resolved(entries: Iterator[tarfile.TarInfo]) -> list[Member]:
    """The entries without folders; a link has the content it would lead to after the tar was unpacked."""
    found: list[Member] = []
    places: dict[str, Member] = {}
    links: dict[str, str] = {}
    waiting: list[tuple[int, str]] = []  # a symbolic link may lead to a later member
    for entry in entries:
        if entry.isdir():
            continue
        name = posixpath.normpath(entry.name)
        if entry.issym() or entry.islnk():
            folder = posixpath.dirname(name) if entry.issym() else ""
            target = posixpath.normpath(posixpath.join(folder, entry.linkname))
        else:
            target = ""
        links.pop(name, None)
        if not target:
            member = Member(entry.name, entry.offset_data, entry.size, _fault(entry))
        elif entry.islnk() and target in places and target not in links:
            member = replace(places[target], name=entry.name)
        else:
            member = Member(entry.name, 0, 0, f"a link to {entry.linkname}, which is not in the archive")
            links[name] = target
            waiting.append((len(found), target))
        places[name] = member
        found.append(member)
    for position, target in waiting:
        for _ in range(_MAX_LINKS):
            target = links.get(target, target)
        if target in places and target not in links:
            found[position] = replace(places[target], name=found[position].name)
    return found


def _fault(entry: tarfile.TarInfo) -> str:
    if entry.issparse():
        return "stored with holes (a sparse file); make the tar again without --sparse"
    return "" if entry.isreg() else "a device or pipe, no file"


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
