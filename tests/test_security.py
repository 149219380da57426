"""What others hand us (data, archives, checkpoints, recipes) runs no code, leaves no folder, fills no memory; nothing
that is secret is written, and the endpoint serves metrics alone."""

import ast
import http.client
import io
import json
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from data_sets import jpeg, make_data_set, make_folder
from PIL import Image

from infomcr_dist import checkpoint, measure
from infomcr_dist.config import Config
from infomcr_dist.options import from_dict, load_config, to_dict
from pipelines import Order, images, open_dataset, open_loader, open_stream
from pipelines.inspect import contact_sheet
from pipelines.items import File
from pipelines.prepare import Options, prepare
from pipelines.reader import MAX_PIXELS, SampleError, refuse_bomb
from pipelines.shards import without_secrets
from pipelines.verify import verify

SOURCES = sorted(p for folder in ("infomcr_dist", "pipelines", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
SECRET = "hunter2-5f1c"


class Touch:
    """Pickled: whoever loads it makes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self._path}",)


# Code ---------------------------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "tempfile.mktemp", "shutil.unpack_archive",
}  # fmt: skip
FORBIDDEN_METHODS = {"extract", "extractall", "decode_pickle"}


def faults(source: str) -> list[str]:
    """What in a source text may run, or let loose, what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        bad = name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS
        bad |= name == "torch.load" and keywords.get("weights_only") != "True"
        bad |= name in ("np.load", "numpy.load", "np.save") and keywords.get("allow_pickle") != "False"
        bad |= keywords.get("shell", "False") != "False"
        found += [ast.unparse(node)] if bad else []
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_in_the_sources_runs_what_a_file_holds(path: Path) -> None:
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "bad",
    ["import pickle", "from shelve import open", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)",
     "np.load(f, allow_pickle=True)", "yaml.load(f, Loader=yaml.Loader)", "eval(x)", "os.system(x)",
     "subprocess.run(x, shell=True)", "tarfile.open(f).extractall(d)"],
)  # fmt: skip
def test_it_would_be_seen(bad: str) -> None:
    assert faults(bad)


def test_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name, content in (("plain.pt", pickle.dumps(Touch(mark))), ("torch.pt", None)):
        path = tmp_path / name
        if content is None:
            torch.save({"format": checkpoint.FORMAT, "step": Touch(mark)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="checkpoint"):
            checkpoint.load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Touch(mark)))
    assert mark.exists(), "what was refused would have worked"


def test_a_checkpoint_chooses_no_code_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "brought_along.py").write_text("open('mark', 'w').close()")
    config = to_dict(replace(Config(), model="brought_along:build"))
    state = {"step": 1, "config": config, "classes": ["a", "b"], "image_size": 16, "model": {}}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint.save(tmp_path / "run" / "checkpoints", 1, state, keep=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert measure.main(["run"]) == 2
    assert "give model=brought_along:build if that code is yours" in capsys.readouterr().err
    assert not (tmp_path / "mark").exists()
    assert measure.main(["run", "model=brought_along:build"]) == 2
    assert "has no attribute 'build'" in capsys.readouterr().err
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "line",
    ["model: !!python/object/apply:os.system ['touch MARK']", "model: !!python/object/new:os.system ['touch MARK']",
     "model: !!python/name:os.system", "!!python/object/apply:os.system ['touch MARK']"],
)  # fmt: skip
def test_a_recipe_runs_nothing(tmp_path: Path, line: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(line.replace("MARK", str(tmp_path / "mark")))
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(Config, recipe, [])
    with pytest.raises(ValueError, match="valid YAML"):
        load_config(Config, None, [line.replace(": ", "=").replace("MARK", str(tmp_path / "mark"))]
                    if line.startswith("model") else [f"model={line}"])  # fmt: skip
    assert not (tmp_path / "mark").exists()


def test_a_recipe_takes_nothing_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("run_dir: runs/${oc.env:TOKEN}\n")
    for attempt in (
        lambda: load_config(Config, recipe, []),
        lambda: load_config(Config, None, ["run_dir=${oc.env:TOKEN}"]),
        lambda: load_config(Config, None, ["schedule.milestones=[1,'${oc.env:TOKEN}']"]),
        lambda: from_dict(Config, {"data": {"batch_size": 4, "path": "${oc.env:TOKEN}"}}),
    ):
        with pytest.raises(ValueError, match="must be written out") as caught:
            attempt()
        assert SECRET not in str(caught.value)


def test_an_index_runs_nothing(tmp_path: Path) -> None:
    data = make_data_set(tmp_path).path
    mark = tmp_path / "mark"
    np.save(data / "train" / "index.npy", np.array([Touch(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"index\.npy cannot be read"):
        open_dataset(data)
    assert not mark.exists()


# What the library leaves open when a stream ends midway is closed by the garbage collector.
streams = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
STREAM = {"size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "device": torch.device("cpu"), "threads": 1}


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
    loader = open_stream(str(tmp_path / "train.tar"), rank=0, world_size=1, batch_size=4, **STREAM)
    (batch,) = loader.batches(Order(4, 4, seed=0).parts(0, 0, 1))
    assert batch[1].tolist() == [1] * 4
    loader.close()
    for sample in open_dataset(tmp_path).splits["train"].labels:
        assert sample == 1
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
    loader = open_loader(split, backend="webdataset", rank=0, world_size=1, batch_size=4, **STREAM)
    (batch,) = loader.batches(Order(4, 4, seed=0).parts(0, 0, 1))
    assert batch[1].tolist() == [1] * 4
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


def test_prepare_leaves_bombs_out(tmp_path: Path) -> None:
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
    loader = open_loader(split, backend=backend, rank=0, world_size=1, batch_size=12, **STREAM)  # type: ignore[arg-type]
    with little_memory_beside_dali(), pytest.raises(ValueError, match="pixels, more than") as caught:
        list(loader.batches(Order(12, 12, seed=0).parts(0, 0, 1)))
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


def test_secrets_in_urls_are_not_told() -> None:
    for url, shown in (
        (f"https://user:{SECRET}@host/x.tar", "https://…@host/x.tar"),
        (f"s3://host/x.tar?X-Amz-Signature={SECRET}&b=1", "s3://host/x.tar?…"),
        (f"https:/user:{SECRET}@host/a/b?sig={SECRET}", "https:/…@host/a/b?…"),
        ("https://host/x.tar", "https://host/x.tar"),
        ("/data/shards of mine", "/data/shards of mine"),
    ):
        assert without_secrets(f"no data set at {url}, 'is' it?") == f"no data set at {shown}, 'is' it?"


@streams
@pytest.mark.parametrize(
    "url",
    [f"http://user:{SECRET}@127.0.0.1:9/train.tar", f"http://127.0.0.1:9/train.tar?token={SECRET}",
     f"pipe:cat /nowhere/{SECRET}", f"pipe:curl -s -H 'Authorization: {SECRET}' http://127.0.0.1:9/x.tar"],
)  # fmt: skip
def test_a_stream_that_fails_tells_no_secret(url: str) -> None:
    loader = open_stream([url], rank=0, world_size=1, batch_size=4, **STREAM)
    with pytest.raises(ValueError, match=r"cannot stream|hold no") as caught:
        list(loader.batches(Order(4, 4, seed=0).parts(0, 0, 1)))
    assert SECRET not in str(caught.value)
    loader.close()


@pytest.mark.parametrize("url", [f"https://user:{SECRET}@host/data", f"s3://host/data?{SECRET}"])
def test_a_wrong_path_tells_no_secret(url: str, tmp_path: Path) -> None:
    for command in (
        ["infomcr_dist.train", f"data.path={url}"],
        ["pipelines.inspect", url],
        ["pipelines.verify", url],
        ["pipelines.prepare", url, "data"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert "host/data" in done.stderr
        assert SECRET not in done.stdout + done.stderr


# A run --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A run that was asked on its port, stopped, and what it wrote."""

    answers: dict[tuple[str, str], tuple[int, str]]
    other_address: str
    metrics: str
    output: str
    folder: Path


@pytest.fixture(scope="module")
def watched(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = [f"data.path={small_data}", "data.backend=torch", "data.batch_size=32", "model=cnn", "epochs=100000",
                "schedule.kind=constant", "metric.trials=0", f"telemetry.port={port}", "run_dir=run",
                "regularizer.when=never", "evaluation.every_epochs=0"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "AWS_SECRET_ACCESS_KEY": SECRET, "MY_TOKEN": SECRET}
    process = subprocess.Popen(
        [sys.executable, "-m", "infomcr_dist.train", *settings],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        records = folder / "run" / "records.jsonl"
        checkpoints = folder / "run" / "checkpoints"
        deadline = time.monotonic() + 120
        while not (records.exists() and records.stat().st_size and any(checkpoints.glob("step-*"))):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "no checkpoint in two minutes"
            time.sleep(0.1)
        asked = [("GET", "/metrics"), ("GET", "/"), ("GET", "/etc/passwd"), ("GET", "/../../../../etc/passwd"),
                 ("GET", "/run/"), ("GET", "/config.yaml"), ("PUT", "/metrics"), ("POST", "/metrics"),
                 ("DELETE", "/metrics"), ("HEAD", "/metrics")]  # fmt: skip
        answers = {(method, path): ask(port, method, path) for method, path in asked}
        try:
            socket.create_connection(("127.0.0.2", port), timeout=5).close()
            other = "answered"
        except ConnectionRefusedError:
            other = "refused"
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    return Watched(answers, other, answers["GET", "/metrics"][1], output, folder)


def ask(port: int, method: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body=b"x" if method in ("PUT", "POST") else None)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_the_endpoint_serves_metrics_alone(watched: Watched) -> None:
    assert watched.answers["GET", "/metrics"][0] == 200
    assert "infomcr_steps_total" in watched.metrics
    for (method, path), (status, body) in watched.answers.items():
        if method != "GET":
            assert status == 405, f"{method} {path}"
        elif status == 200:  # the library gives the metrics for any path
            lines = body.splitlines()
            assert all(re.match(r"# (HELP|TYPE) infomcr_|infomcr_\w+(\{.*\})? \S+$", line) for line in lines), path


def test_the_endpoint_is_this_machines_alone(watched: Watched) -> None:
    assert watched.other_address == "refused", "127.0.0.2 is another address of this machine than the one bound to"


def test_a_run_writes_no_secret_of_its_environment(watched: Watched) -> None:
    assert SECRET not in watched.output
    assert SECRET not in watched.metrics
    files = [path for path in watched.folder.rglob("*") if path.is_file()]
    assert {"records.jsonl", "config.yaml"} <= {path.name for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
