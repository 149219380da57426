"""Files at URLs: their bytes by range requests through fsspec, repeated with growing pauses when they fail.

What fails for the moment (no connection, a stall, a cut, 5xx, 429) is tried again for 40 seconds; what is final
(missing, forbidden, no byte ranges) is reported at once. Credentials, endpoints and proxies are those of fsspec's
backends: the environment, ~/.aws, or fsspec's own settings (FSSPEC_S3_ENDPOINT_URL, FSSPEC_S3_ANON, …).
"""

import asyncio
import io
import os
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from .files import without_secrets

T = TypeVar("T")

PROTOCOLS = ("http", "https", "s3", "gs", "file")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_MAX_FILES = 1_000_000
_TRY_SECONDS = 15.0
_PATIENCE_SECONDS = 40.0  # less than the minute after which a loader takes a read for stalled
_FIRST_PAUSE_SECONDS = 0.25
_READ_AHEAD = 1 << 22  # bytes that are read at once to find the members of a tar
CONNECTIONS = 16
"""Files that are read at once to index them."""


@dataclass(frozen=True)
class Url:
    """A file or folder at a URL: what the format needs of a `Path`. In messages it has no secrets."""

    text: str

    def __str__(self) -> str:
        return without_secrets(self.text)

    def __fspath__(self) -> str:
        """The whole URL, of which `locate` makes a Url again."""
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(urlsplit(self.text).path).name

    def open(self, _mode: Literal["rb"]) -> io.BufferedReader:
        """The content, for reading in order: some megabytes are read at once."""
        return io.BufferedReader(_Raw(self, describe([self])[0].size), _READ_AHEAD)


Location = Path | Url


@dataclass(frozen=True)
class Described:
    """Size in bytes, and a tag that another content of that size would not have; "" if the server gives none."""

    size: int
    version: str


def locate(text: str) -> Location:
    """The URL or the path that the text is."""
    return Url(text) if "://" in text else Path(text)


def expand(text: str) -> list[Location]:
    """The files that a URL with braces names, {000..063} and {a,b}, in that order; those of file:// as paths.

    Raises:
        ValueError: the braces do not match, name a file twice or too many, or the protocol is none of `PROTOCOLS`.
    """
    import braceexpand  # here and below, because they take a while to import

    try:
        found = [url for _, url in zip(range(_MAX_FILES + 1), braceexpand.braceexpand(text), strict=False)]
    except ValueError:
        raise ValueError(f"{without_secrets(text)} has braces that do not match") from None
    if len(found) > _MAX_FILES:
        raise ValueError(f"{without_secrets(text)} names more than {_MAX_FILES} files")
    if len(set(found)) < len(found):
        raise ValueError(f"{without_secrets(text)} names a file twice")
    for url in found:
        protocol, rest = url.split("://", 1) if "://" in url else ("", url)
        if protocol not in PROTOCOLS or "://" in rest or "::" in rest:
            raise ValueError(f"{without_secrets(url)} must begin with {', '.join(PROTOCOLS)} and ://")
    return [Path(urlsplit(url).path) if url.startswith("file://") else Url(url) for url in found]


def describe(files: Sequence[Location]) -> list[Described]:
    """Size and version of each file; ValueError for one that is not there."""
    if all(isinstance(file, Path) for file in files):
        return [_describe(file) for file in files]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return list(pool.map(_describe, files))


def _describe(file: Location) -> Described:
    if isinstance(file, Path):
        try:
            stat = file.stat()
        except OSError as error:
            raise ValueError(f"shard {file} cannot be opened ({error.strerror})") from None
        # The time of change cannot be set: a shard rewritten in place, or replaced by `cp -p` or `mv`, has a new one.
        # The inode would add nothing to it, and is another at every mount of some file systems.
        return Described(stat.st_size, f"{stat.st_mtime_ns} {stat.st_ctime_ns}")
    url, info = file, _patiently(file, lambda fs, path: fs._info(path))
    if info.get("size") is None:
        raise ValueError(f"{url}: the server does not give its size")
    fields = ("ETag", "etag", "Content-MD5", "md5Hash", "Digest", "LastModified", "Last-Modified", "updated")
    return Described(int(info["size"]), " ".join(str(info[name]) for name in fields if info.get(name)))


def read(url: Url, start: int, stop: int) -> bytes:
    """The bytes start..stop-1.

    Raises:
        ValueError: they cannot be had, also not after several tries.
    """

    async def get(fs: Any, path: str) -> bytes:
        data: bytes = await fs._cat_file(path, start=start, end=stop)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came in place of {stop - start}")
        return data

    return _patiently(url, get) if stop > start else b""


def download(url: Url, path: Path, size: int) -> None:
    """Makes `path` a copy of the whole file, some megabytes at a time; ValueError as for `read`."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            for start in range(0, size, _READ_AHEAD):
                file.write(read(url, start, min(start + _READ_AHEAD, size)))
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


class NoRanges(Exception):
    """The server sends the whole file when it is asked for a part."""


async def _refuse_whole_files(response: Any) -> None:
    if response.status == 200 and "Range" in response.request_info.headers:
        raise NoRanges


@cache
def _filesystem(protocol: str, _process: int) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if protocol.startswith("http"):
        options = {
            "client_kwargs": {"raise_for_status": _refuse_whole_files},
            "headers": {"Accept-Encoding": "identity"},
        }
    try:
        return fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except ImportError:
        raise ValueError(
            f"{protocol}:// needs the package {_PACKAGES.get(protocol, 'aiohttp')}: install infomcr_dist[remote]"
        ) from None


def _patiently(url: Url, request: Callable[[Any, str], Awaitable[T]]) -> T:
    """What the request gives, which is repeated while it fails for a reason that may pass."""
    from fsspec.asyn import sync

    fs = _filesystem(url.text.split("://", 1)[0], os.getpid())
    path = fs._strip_protocol(url.text)

    async def once() -> T:
        return await asyncio.wait_for(request(fs, path), _TRY_SECONDS)

    deadline, pause, tries = time.monotonic() + _PATIENCE_SECONDS, _FIRST_PAUSE_SECONDS, 0
    while True:
        tries += 1
        try:
            result: T = sync(fs.loop, once)
            return result
        except NoRanges:
            raise ValueError(f"{url}: the server sends no byte ranges; copy the shards to one that does") from None
        except Exception as error:  # each backend has its own
            reason = without_secrets(_reason(error))
            if _missing(error):
                raise ValueError(f"{url} does not exist") from None
            if _refused(error):
                raise ValueError(f"{url} may not be read ({reason})") from None
            if time.monotonic() + pause > deadline:
                raise ValueError(f"{url} cannot be read (tries: {tries}, the last: {reason})") from None
        # Ranks that failed together do not come back together: half of the pause is anybody's.
        time.sleep(pause * (0.5 + zlib.crc32(f"{os.getpid()} {url.text} {tries}".encode()) / 2**33))
        pause *= 2


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer in {_TRY_SECONDS:g} s"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    return " ".join(str(cause).split())[:200] or type(cause).__name__


# fsspec's HTTP backend makes a FileNotFoundError of every failure to get a file's size; its cause is the real one.


def _status(error: BaseException) -> int:
    """The status that an HTTP server answered; 0 if there is none."""
    found = (getattr(e, "status", None) for e in (error, error.__cause__))
    return next((status for status in found if isinstance(status, int)), 0)


def _missing(error: BaseException) -> bool:
    if status := _status(error):
        return status in (404, 410)
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or hasattr(cause, "response"))  # S3 has answered


def _refused(error: BaseException) -> bool:
    if isinstance(error, PermissionError) or type(error).__name__.endswith("CredentialsError"):
        return True
    return 400 <= _status(error) < 500 and _status(error) not in (408, 425, 429)


class _Raw(io.RawIOBase):
    """The content as a seekable file."""

    def __init__(self, url: Url, size: int) -> None:
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = read(self._url, self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
