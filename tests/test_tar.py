"""The places of a tar's members, against what tarfile and GNU tar make of it."""

import errno
import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.format.tar import Member, members


def make(files: dict[str, Any], **more: Any) -> bytes:
    """A tar; a file is bytes, or the type of an entry and where it leads."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **more) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                entry.type, entry.linkname, data = *data, b""
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def contents(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[str, bytes | str]]:
    """Name, and content or fault, of every member."""
    found = members(io.BytesIO(data), "x.tar", start, end)
    return [(m.name, m.fault or data[m.offset : m.offset + m.size]) for m in found]


FIRST, SECOND = {"a/1": b"one", "a/2": b""}, {"b/" + "long" * 60: b"x" * 5000, "ü": b"two"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("zeros", [0, 512, 10240, 3 << 20])
def test_joined_tars(format: int, zeros: int) -> None:
    second = {name.replace("long" * 60, "long"): data for name, data in SECOND.items()} if format == 0 else SECOND
    data = make(FIRST, format=format) + bytes(zeros) + make(second, format=format) + make({"c": b"3"})
    assert dict(contents(data)) == {**FIRST, **second, "c": b"3"}
    inside = make({"n.tar": data})
    (tar,) = members(io.BytesIO(inside), "outer")
    assert dict(contents(inside, tar.offset, tar.offset + tar.size)) == {**FIRST, **second, "c": b"3"}


def test_joined_as_gnu_tar_joins(tmp_path: Path) -> None:
    for name, files in (("a", FIRST), ("b", SECOND)):
        (tmp_path / name).write_bytes(make(files))
    subprocess.run(["tar", "-Af", tmp_path / "a", tmp_path / "b"], check=True)
    assert dict(contents((tmp_path / "a").read_bytes())) == {**FIRST, **SECOND}


@pytest.mark.parametrize("data", [b"junk", b"\1" * 512, b"x" * 20000, make(SECOND)[1:]])
def test_bytes_behind_the_end_are_refused(data: bytes) -> None:
    whole = make(FIRST)
    with pytest.raises(
        ValueError, match=f"x.tar (has bytes behind its end, at {len(whole)}, that are no tar|is not a)"
    ):
        contents(whole + data)


def test_a_joined_tar_is_whole() -> None:
    with pytest.raises(ValueError, match=r"x\.tar is truncated"):
        contents(make(FIRST) + make(SECOND)[:3000])


SYMBOLIC, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
LINKS = {
    "a/real": b"content",
    "a/near": (SYMBOLIC, "real"),
    "b/hard": (HARD, "a/real"),
    "b/up": (SYMBOLIC, "../a/./real"),
    "b/later": (SYMBOLIC, "../c/late"),
    "b/chain": (SYMBOLIC, "up"),
    "b/hard_of_link": (HARD, "b/up"),
    "c/late": b"late",
}
NOWHERE = {
    "out": (SYMBOLIC, "../../etc/passwd"),
    "absolute": (SYMBOLIC, "/etc/passwd"),
    "hard": (HARD, "nothing"),
    "loop": (SYMBOLIC, "pool"),
    "pool": (SYMBOLIC, "loop"),
    "folder": (SYMBOLIC, "a"),
    "self": (HARD, "self"),
}


@pytest.mark.parametrize("prefix", ["", "./"])
def test_links_have_the_content_they_have_when_unpacked(tmp_path: Path, prefix: str) -> None:
    data = make({prefix + name: (v[0], prefix + v[1]) if v[:1] == (HARD,) else v for name, v in LINKS.items()})
    (tmp_path / "x.tar").write_bytes(data)
    subprocess.run(["tar", "-xf", "x.tar"], cwd=tmp_path, check=True)
    assert contents(data) == [(prefix + name, (tmp_path / name).read_bytes()) for name in LINKS]


def test_links_that_lead_out_of_the_archive_have_a_fault() -> None:
    found = dict(contents(make({"a/real": b"content", **NOWHERE})))
    assert found.pop("a/real") == b"content"
    assert found == {name: f"a link to {target}, which is not in the archive" for name, (_, target) in NOWHERE.items()}


def test_the_last_of_a_name_is_what_a_link_leads_to() -> None:
    data = make({"x": b"old", "early": (HARD, "x")}) + make({"x": b"new", "late": (HARD, "x"), "soft": (SYMBOLIC, "x")})
    assert contents(data) == [("x", b"old"), ("early", b"old"), ("x", b"new"), ("late", b"new"), ("soft", b"new")]


def test_sparse_files_and_devices_have_a_fault(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "plain").write_bytes(b"plain")
    os.mkfifo(tmp_path / "pipe")
    for format in ("gnu", "pax"):
        command = ["tar", "--sparse", f"--format={format}", "-cf", "x.tar", "holes", "plain", "pipe"]
        subprocess.run(command, cwd=tmp_path, check=True)
        found = dict(contents((tmp_path / "x.tar").read_bytes()))
        assert found["plain"] == b"plain"
        assert "sparse" in str(found["holes"])
        assert "no file" in str(found["pipe"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1f\x8b" + bytes(600), "compressed by gzip; unpack it"),
        (b"BZh9" + bytes(600), "compressed by bzip2"),
        (b"\xfd7zXZ\0" + bytes(600), "compressed by xz"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "compressed by zstd"),
        (b"PK\3\4" + bytes(600), "not a readable tar"),
        (b"", "not a readable tar"),
    ],
)
def test_what_is_no_tar(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^x\.tar is {message}"):
        contents(data)


def test_an_error_of_the_disk_names_the_tar() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 1024:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    with pytest.raises(ValueError, match=r"x\.tar cannot be read \(Input/output error\)"):
        members(Broken(make(FIRST)), "x.tar")


def test_an_empty_tar_has_no_members() -> None:
    assert members(io.BytesIO(make({})), "x.tar") == []
    assert members(io.BytesIO(make({"a": b"1"})), "x.tar") == [Member("a", 512, 1)]
