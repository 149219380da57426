"""What others hand us as data runs no code, leaves no folder and fills no memory."""

import gc
import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import Touch, jpeg, make_data_set, make_folder
from PIL import Image

from pipelines import LoaderConfig, Sampler, open_dataset, open_loader
from pipelines.format.files import without_secrets
from pipelines.format.image_header import MAX_PIXELS
from pipelines.inspect import contact_sheet
from pipelines.loaders.reader import SampleError, refuse_bomb
from pipelines.prepare import Options, images, prepare
from pipelines.prepare.archives import File
from pipelines.verify import verify


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Collects what a test left open in that test, where its warnings are ignored."""
    yield
    gc.collect()


# Code ---------------------------------------------------------------------------------------------------------------


def test_an_index_runs_nothing(tmp_path: Path) -> None:
    data = make_data_set(tmp_path).path
    mark = tmp_path / "mark"
    np.save(data / "train" / "index.npy", np.array([Touch(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"index\.npy cannot be read"):
        open_dataset(data)
    assert not mark.exists()


# What the webdataset library leaves open when a stream ends early is closed by the garbage collector.
streams = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
LOADER = {"size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "device": torch.device("cpu"), "threads": 1}


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@streams
def test_a_stream_decodes_images_and_labels_alone(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        for number in range(4):
            add(archive, f"{number}.jpg", jpeg(number))
            add(archive, f"{number}.cls", b"1")
            for extension in ("pyd", "pickle", "pkl", "pth", "npy", "tenbin"):
                add(archive, f"{number}.{extension}", pickle.dumps(Touch(mark)))
    split = open_dataset(tmp_path).splits["train"]
    assert split.labels.tolist() == [1] * 4
    loader = open_loader(split, LoaderConfig(backend="webdataset", batch_size=4, **LOADER))
    ((_, _, labels),) = loader.batches(Sampler(4, 4, seed=0).local_batches(0, 0, 1))
    assert labels.tolist() == [1] * 4
    loader.close()
    assert not mark.exists()


@streams
def test_a_shard_is_a_file_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tmp_path / "pipe:touch mark {a,b}.tar"
    with tarfile.open(shard, "w") as archive:
        for number in range(4):
            add(archive, f"{number}.jpg", jpeg(number))
            add(archive, f"{number}.cls", b"1")
    monkeypatch.chdir(tmp_path)
    split = open_dataset(".").splits["train"]
    assert str(split.shards[0].path) == shard.name
    loader = open_loader(split, LoaderConfig(backend="webdataset", batch_size=4, **LOADER))
    ((_, _, labels),) = loader.batches(Sampler(4, 4, seed=0).local_batches(0, 0, 1))
    assert labels.tolist() == [1] * 4
    loader.close()
    assert not (tmp_path / "mark").exists()


# Folders ------------------------------------------------------------------------------------------------------------

OUTSIDE = ("../escaped.jpg", "../../escaped.jpg", "cat/../../escaped.jpg", "cat/../../../escaped/1.jpg")


def everything(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def prepare_in_jail(root: Path, source: Path) -> set[str]:
    """The names in ``root`` that preparing into root/a/b/data adds outside of it; checks that two cats are in it."""
    dest = root / "a" / "b" / "data"
    dest.parent.mkdir(parents=True)
    before = everything(root)
    prepare(os.fspath(source), dest, Options(size=16, processes=1))
    dataset = open_dataset(dest)
    assert "cat" in dataset.classes
    for path in dest.rglob("*"):
        assert not path.is_symlink()
    return {name for name in everything(root) - before if not name.startswith("a/b/data")}


@pytest.mark.parametrize("packed", [False, True], ids=["tar", "tar.gz"])
def test_members_of_a_tar_stay_in_their_folder(tmp_path: Path, packed: bool) -> None:
    root = tmp_path / "root"
    root.mkdir()
    target = tmp_path / "target.jpg"
    target.write_bytes(b"untouched")
    source = tmp_path / ("evil.tar.gz" if packed else "evil.tar")
    with tarfile.open(source, "w:gz" if packed else "w") as archive:
        for number in range(2):
            add(archive, f"cat/{number}.jpg", jpeg(number))
        for name in (*OUTSIDE, os.fspath(root / "absolute" / "1.jpg"), os.fspath(target)):
            add(archive, name, jpeg(9))
        for kind, name in ((tarfile.SYMTYPE, "cat/link.jpg"), (tarfile.LNKTYPE, "cat/hard.jpg"),
                           (tarfile.SYMTYPE, "link")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, os.fspath(target if name != "link" else root)
            archive.addfile(member)
        add(archive, "link/through.jpg", jpeg(9))
        for device in (tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"cat/device{int(device)}.jpg")
            member.type = device
            archive.addfile(member)
    assert prepare_in_jail(root, source) == set()
    assert target.read_bytes() == b"untouched"
    assert everything(tmp_path) == {"root", "target.jpg", source.name} | {f"root/{n}" for n in everything(root)}


def test_members_of_a_zip_stay_in_their_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    target = tmp_path / "target.jpg"
    target.write_bytes(b"untouched")
    source = tmp_path / "evil.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for number in range(2):
            archive.writestr(f"cat/{number}.jpg", jpeg(number))
        for name in (*OUTSIDE, os.fspath(root / "absolute" / "1.jpg"), os.fspath(target), "..\\escaped.jpg"):
            archive.writestr(name, jpeg(9))
        link = zipfile.ZipInfo("cat/link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, os.fspath(target))
    assert prepare_in_jail(root, source) == set()
    assert target.read_bytes() == b"untouched"


def test_a_manifest_names_files_of_its_folder_alone(tmp_path: Path) -> None:
    data = make_data_set(tmp_path).path
    manifest = json.loads((data / "manifest.json").read_text())
    for name in ("../000000.tar", os.fspath(data / "train" / "000000.tar"), "..", ""):
        changed = json.loads(json.dumps(manifest))
        changed["splits"]["train"]["shards"][0]["name"] = name
        (data / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="outside of its folder"):
            open_dataset(data)
    manifest["splits"]["../train"] = manifest["splits"].pop("train")
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="outside of its folder"):
        open_dataset(data)


# Memory -------------------------------------------------------------------------------------------------------------


def png_bomb(side: int = 50_000) -> bytes:
    """A whole PNG of so many black pixels square; its 0.3 MB would be 2.5 GB of grey ones."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = bytes(side // 8 + 1)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG whose header says 50 000 × 50 000, behind a comment, padding and garbage, which decoders skip."""
    whole = jpeg(0)
    at = whole.index(b"\xff\xc0") + 5
    whole = whole[:at] + struct.pack(">HH", 50_000, 50_000) + whole[at + 4 :]
    return whole[:2] + b"\xff\xfe\x00\x08\xff\xc0\x00\x01\x02\x03" + b"\x12\x34\xff\xff" + whole[2:]


def bmp_bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "BMP")
    whole = buffer.getvalue()
    return whole[:18] + struct.pack("<ii", 50_000, 50_000) + whole[26:]


BOMBS = {"png": png_bomb(), "jpeg": jpeg_bomb(), "bmp": bmp_bomb()}


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails if the process's peak of resident memory grows by 200 MB."""
    peak = Path("/proc/self/clear_refs")
    peak.write_text("5")
    before = _peak_bytes()
    yield
    assert _peak_bytes() - before < 200e6


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_headers(name: str) -> None:
    with little_memory():
        with pytest.raises(SampleError, match=r"50000 x 50000 pixels|more than"):
            refuse_bomb(BOMBS[name])
        with pytest.raises(ValueError, match="pixels"):
            images.open_image(BOMBS[name])


def test_what_is_no_bomb_passes() -> None:
    refuse_bomb(jpeg(1, 300, 200))
    for format in ("PNG", "BMP", "WEBP", "JPEG"):
        buffer = io.BytesIO()
        Image.new("RGB", (300, 200)).save(buffer, format, **({"progressive": True} if format == "JPEG" else {}))
        refuse_bomb(buffer.getvalue())
    garbage = (b"\xff\xd8\xff", b"\xff\xd8" + b"\xff" * 50, b"\xff\xd8\xff\xe0\x00\x00" * 9)
    for rubbish in (b"", b"no", b"\xff\xd8", *garbage):
        refuse_bomb(rubbish)
    assert MAX_PIXELS < 50_000**2


def test_prepare_skips_bombs(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", per_class=2)
    for name, bomb in BOMBS.items():
        (source / "cat" / f"bomb.{name}").write_bytes(bomb)
    (source / "cat" / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with little_memory():
        prepare(os.fspath(source), tmp_path / "data", Options(size=16, processes=1))
    rejected = json.loads((tmp_path / "data" / "manifest.json").read_text())["rejected"]
    reasons = {entry["name"]: entry["reason"] for entry in rejected}
    assert reasons.keys() == {"cat/bomb.png", "cat/bomb.jpeg", "cat/bomb.bmp", "cat/program.eps"}
    assert all("pixels" in reason for name, reason in reasons.items() if "bomb" in name)
    assert "EPS is a program" in reasons["cat/program.eps"]


def test_a_member_too_large_for_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(2 << 30)
    with little_memory(), pytest.raises(ValueError, match="bytes, more than"):
        File("file", str(path), 0, 2 << 30).read()


@pytest.fixture(scope="module", params=BOMBS)
def data_with_bomb(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of others, 12 samples, one of them a bomb under an image's name."""
    folder = tmp_path_factory.mktemp("bomb")
    with tarfile.open(folder / "train.tar", "w") as archive:
        for number in range(12):
            add(archive, f"{number}.jpg", BOMBS[request.param] if number == 5 else jpeg(number))
            add(archive, f"{number}.cls", str(number % 2).encode())
    return folder


@streams
@pytest.mark.parametrize("backend", ["dali", "torch", "webdataset"])
def test_loaders_refuse_bombs_before_decoding(data_with_bomb: Path, backend: str) -> None:
    split = open_dataset(data_with_bomb).splits["train"]
    loader = open_loader(split, LoaderConfig(backend=backend, batch_size=12, **LOADER))  # type: ignore[arg-type]
    with little_memory_beside_dali(), pytest.raises(ValueError, match="pixels, more than") as caught:
        list(loader.batches(Sampler(12, 12, seed=0).local_batches(0, 0, 1)))
    assert str(data_with_bomb / "train.tar") in str(caught.value)
    loader.close()


@contextmanager
def little_memory_beside_dali() -> Iterator[None]:
    """As `little_memory`; DALI takes some hundred megabytes for itself."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    yield
    assert _peak_bytes() - before < 1e9


def test_verify_and_inspect_refuse_bombs(data_with_bomb: Path) -> None:
    with little_memory():
        (fault,) = verify(data_with_bomb, processes=1)
        sheet = contact_sheet(open_dataset(data_with_bomb).splits["train"], images=12, side=8)
    assert "pixels, more than" in fault
    assert "sample 5 " in fault
    assert (np.asarray(sheet) == (255, 0, 0)).all(-1).sum() == 64, "one red tile"


# Secrets ------------------------------------------------------------------------------------------------------------

SECRET = "hunter2-5f1c"


def test_secrets_in_urls_are_not_shown() -> None:
    for url, shown in (
        (f"https://user:{SECRET}@host/x.tar", "https://…@host/x.tar"),
        (f"s3://host/x.tar?X-Amz-Signature={SECRET}&b=1", "s3://host/x.tar?…"),
        (f"https:/user:{SECRET}@host/a/b?sig={SECRET}", "https:/…@host/a/b?…"),
        ("https://host/x.tar", "https://host/x.tar"),
        ("/data/shards of mine", "/data/shards of mine"),
    ):
        assert without_secrets(f"no data set at {url}, 'is' it?") == f"no data set at {shown}, 'is' it?"
