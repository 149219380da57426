"""Shards at URLs: the order, the pixels and the resuming of local ones, through whatever a server does."""

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from data_sets import jpeg, make_data_set
from remote_server import Server, served
from test_external import write_tar

from benchmarks.chaos import free_ports
from pipelines import Dataset, LoaderConfig, Sampler, evaluation_batches, open_dataset, open_loader
from pipelines.format import remote
from pipelines.format.dataset import INDEX
from pipelines.format.remote_shards import RangeCache
from pipelines.loaders.reader import Files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_FIRST_PAUSE_SECONDS", 0.001)
    return tmp_path / "cache"


@pytest.fixture
def local(tmp_path: Path) -> Dataset:
    return make_data_set(tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with served(tmp_path) as server:
        yield server


def encoded(dataset: Dataset, cache_bytes: int = 0, split: str = "train") -> list[bytes]:
    files = Files(dataset.splits[split], 1, cache_bytes)
    return [files.read(sample) for sample in range(len(dataset.splits[split]))]


def same(found: Dataset, expected: Dataset) -> None:
    assert found.fingerprint == expected.fingerprint
    assert found.classes == expected.classes
    assert found.splits.keys() == expected.splits.keys()
    for name, split in expected.splits.items():
        assert (found.splits[name].index == split.index).all()
        assert [shard.path.name for shard in found.splits[name].shards] == [shard.path.name for shard in split.shards]
        assert encoded(found, split=name) == encoded(expected, split=name)


def external(tmp_path: Path) -> Dataset:
    """Shards that others made, train-000.tar to train-003.tar and val-0.tar, below `shards/test/`."""
    for number in range(4):
        members = [
            (f"{key}.{end}", data) for key in range(5) for end, data in (("jpg", jpeg(key)), ("cls", b"%d" % key))
        ]
        write_tar(tmp_path / "shards" / "test" / f"train-{number:03d}.tar", members)
    write_tar(tmp_path / "shards" / "test" / "val-0.tar", [("a.jpg", jpeg(9)), ("a.cls", b"2")])
    return open_dataset(tmp_path / "shards" / "test")


SHARDS = "shards/test/{train-{000..003},val-0}.tar"


def test_a_prepared_data_set(local: Dataset, server: Server) -> None:
    for url in (f"{server.url}/data", f"{server.url}/data/"):
        same(open_dataset(url), local)
    assert len([line for line in server.requests if line.startswith(f"GET /data/train/{INDEX}")]) == 1, "copied once"


def test_shards_that_others_made(tmp_path: Path, server: Server) -> None:
    expected = external(tmp_path)
    same(open_dataset(f"{server.url}/{SHARDS}"), expected)
    server.requests.clear()
    same(open_dataset(f"file://{tmp_path}/{SHARDS}"), expected)
    assert server.requests == []
    # The index is kept; where a shard has changed, also to one of the same size, it is built again.
    assert open_dataset(f"{server.url}/{SHARDS}").fingerprint == expected.fingerprint
    assert {line.split()[0] for line in server.requests} == {"HEAD"}
    path = tmp_path / "shards" / "test" / "val-0.tar"
    path.write_bytes(path.read_bytes().replace(b"2" + bytes(511), b"3" + bytes(511)))
    changed = open_dataset(f"{server.url}/{SHARDS}")
    assert changed.splits["test"].labels.tolist() == [3]
    assert changed.fingerprint != expected.fingerprint


def config_of(dataset: Dataset, backend: str, **more: int) -> LoaderConfig:
    return LoaderConfig(
        backend=backend,  # type: ignore[arg-type]
        augmentation="random_resized_crop",
        size=24,
        mean=dataset.mean,
        std=dataset.std,
        batch_size=8,
        device=torch.device("cpu"),
        **more,  # type: ignore[arg-type]
    )


def batches(
    dataset: Dataset, backend: str, start: int, cache_bytes: int = 0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    split = dataset.splits["train"]
    loader = open_loader(split, config_of(dataset, backend, cache_bytes=cache_bytes))
    local_batches = Sampler(len(split), 16, seed=3).local_batches(1, rank=1, world_size=2, start=start)
    found = [(images.clone(), labels.clone()) for _, images, labels in loader.batches(local_batches)]
    loader.close()
    return found


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_batches_are_those_of_local_shards_from_any_step_on(local: Dataset, server: Server, backend: str) -> None:
    expected = batches(local, backend, 0)
    dataset = open_dataset(f"{server.url}/data")
    for start in (0, 1):
        server.requests.clear()
        found = batches(dataset, backend, start, cache_bytes=10_000_000)
        assert len(found) == len(expected) - start == 2 - start
        for (images, labels), (local_images, local_labels) in zip(found, expected[start:], strict=True):
            assert torch.equal(images, local_images)
            assert torch.equal(labels, local_labels)
        assert bool(server.requests) == (start == 0), "what was read once is not asked for again"


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_samples_are_asked_for_side_by_side(local: Dataset, server: Server, backend: str) -> None:
    dataset = open_dataset(f"{server.url}/data")
    server.faulty, server.faults, server.meeting = "GET .*bytes", ["meet"] * 8, threading.Barrier(8)
    loader = open_loader(dataset.splits["train"], config_of(dataset, backend, threads=1))
    (batch,) = loader.batches(evaluation_batches(8, 8, 0, 1))
    assert len(batch[2]) == 8
    assert not server.meeting.broken
    loader.close()


FAULTS = ("503", "429", "500", "cut", "stall", "stall in the middle")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_for_a_moment_is_tried_again(
    tmp_path: Path, local: Dataset, server: Server, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_TRY_SECONDS", 0.3)
    expected = external(tmp_path)
    times = 1 if "stall" in fault else 3
    for faulty in ("HEAD", "GET"):
        server.faulty, server.faults = faulty, [fault] * times
        same(open_dataset(f"{server.url}/{SHARDS}"), expected)
        assert server.faults == []
        server.faults = [fault] * times
        same(open_dataset(f"{server.url}/data"), local)
        assert server.faults == []
        for file in (tmp_path / "cache" / "pipelines").iterdir():
            file.unlink()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", r"http.*/data/train/000001\.tar does not exist$"),
        ("403", r"http.*/data/train/000001\.tar may not be read \(403"),
        ("400", r"http.*/data/train/000001\.tar may not be read \(400"),
        ("503", r"http.*/data/train/000001\.tar cannot be read \(tries: \d+, the last: 503"),
        ("stall", r"http.*/data/train/000001\.tar cannot be read \(tries: \d+, the last: no answer in 0\.1 s\)"),
        ("cut", r"http.*/data/train/000001\.tar cannot be read \(tries: \d+, the last: "),
        ("whole", r"http.*/data/train/000001\.tar: the server sends no byte ranges; copy the shards"),
    ],
)
def test_what_lasts_is_one_line_that_names_the_shard(
    local: Dataset, server: Server, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(f"{server.url}/data")
    monkeypatch.setattr(remote, "_TRY_SECONDS", 0.1)
    monkeypatch.setattr(remote, "_PATIENCE_SECONDS", 0.05)
    # Asked for the size, by HEAD or else GET, and for a range.
    for faulty in (r"000001\.tar$", "000001.*bytes") if fault not in ("cut", "whole") else ("000001.*bytes",):
        files = Files(dataset.splits["train"], 1)
        server.faulty, server.faults = faulty, [fault] * 1000
        assert files.read(0) == encoded(local)[0]
        with pytest.raises(ValueError, match=message) as error:
            files.read(8)
        assert "\n" not in str(error.value)
        server.faults = []
        assert files.read(8) == encoded(local)[8], "the next try finds everything as before"


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PATIENCE_SECONDS", 0.05)
    place = f"127.0.0.1:{free_ports()}"
    for url in (f"http://user:secret@{place}/data", f"http://user:secret@{place}/0.tar?key=secret"):
        with pytest.raises(ValueError, match=rf"http://…@{place}/.* cannot be read \(tries: \d+, the last: ") as error:
            open_dataset(url)
        assert "secret" not in str(error.value)


def test_a_shard_of_another_size(local: Dataset, server: Server, tmp_path: Path) -> None:
    dataset = open_dataset(f"{server.url}/data")
    path = tmp_path / "data" / "train" / "000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"shard http.*000001\.tar has \d+ bytes where its index says \d+: truncated"):
        Files(dataset.splits["train"], 1).read(8)
    (tmp_path / "data" / "train" / INDEX).write_bytes(b"\x93NUMPY")
    for file in (tmp_path / "cache" / "pipelines").glob("*.npy"):
        file.unlink()
    with pytest.raises(ValueError, match=r"train/index\.npy is not the index that manifest\.json describes"):
        open_dataset(f"{server.url}/data")
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        open_dataset(f"{server.url}/data")
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"manifest\.json does not exist; give a prepared data set, or its shards: http"
    ):
        open_dataset(f"{server.url}/data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http://h/train-{0..3.tar", "http://h/train-{0..3.tar has braces that do not match"),
        ("http://h/train-{0,0}.tar", "names a file twice"),
        ("http://h/train-{0..100}.tar", "names more than 100 files"),
        ("ftp://h/0.tar", "ftp://h/0.tar must begin with http, https, s3, gs, file and ://"),
        ("simplecache::http://h/0.tar", "must begin with http"),
        ("http://h/zip://0.tar", "must begin with http"),
        ("http://h/{0.tar,1.tgz}", "1.tgz must end in .tar, as the other shards do"),
        ("http://h/{a,b}", "must name .tar shards, or one prepared data set"),
        ("{http://h/0,s3://h/0}.tar", "names shards of several protocols: http, s3"),
        ("http://h/{train-0,1}.tar", "http://h/1.tar is of no split"),
        ("file:///nowhere/{0..3}.tar", "shard /nowhere/0.tar cannot be opened"),
        ("file:///nowhere", "no data set at /nowhere"),
    ],
)
def test_urls_that_make_no_sense(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_MAX_FILES", 100)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_dataset(text)


def test_the_order_of_braces_is_not_that_of_the_shards(tmp_path: Path, server: Server) -> None:
    expected = external(tmp_path)
    same(open_dataset(f"{server.url}/shards/test/{{val-0,train-{{003..000}}}}.tar"), expected)


def test_a_url_where_a_path_is_needed() -> None:
    with pytest.raises(ValueError, match="https:/host/data is a URL, where a path is needed"):
        open_dataset(Path("https://host/data"))


@pytest.mark.parametrize(("protocol", "package"), [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, protocol: str, package: str) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    remote._filesystem.cache_clear()
    with pytest.raises(ValueError, match=rf"^{protocol}:// needs the package {package}: .*infomcr_dist\[remote\]"):
        open_dataset(f"{protocol}://bucket/train-{{0..3}}.tar")


def test_the_cache_stays_within_its_bounds(local: Dataset, server: Server, tmp_path: Path) -> None:
    def on_disk() -> int:
        return sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").rglob("*/ranges/*/*/*"))

    dataset, expected = open_dataset(f"{server.url}/data"), encoded(local)
    limit = 40_000
    for _ in range(2):
        assert encoded(dataset, limit) == expected
        assert 20_000 < on_disk() <= limit
    server.requests.clear()
    assert encoded(dataset, limit) == expected
    hits = 27 - len([line for line in server.requests if line.startswith("GET")])
    assert 5 <= hits <= 10, "what fits stays"
    # A damaged or truncated copy is no copy.
    for path in (tmp_path / "cache").rglob("*/ranges/*/*/*"):
        data = path.read_bytes()
        path.write_bytes(data[:100] if int(path.name) % 3 else data[:-100] + bytes(100))
    assert encoded(dataset, limit) == expected
    # Opening another split leaves half of the space to it, but not at the cost of one that the same run has opened.
    RangeCache("another", limit)
    assert on_disk() > 20_000
    for path in (tmp_path / "cache").rglob("*/ranges/*/"):
        os.utime(path, (1, 1))
    other = RangeCache("another", limit)
    assert on_disk() == 0
    assert other.get("x", 0, 3) is None
    other.put("x", 0, b"abc")
    assert other.get("x", 0, 3) == b"abc"
    assert other.get("x", 0, 2) is None
    assert encoded(dataset, limit) == expected


def test_without_a_version_or_a_place_nothing_is_kept(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encoded(external(tmp_path))
    server.tags = False
    dataset = open_dataset(f"{server.url}/{SHARDS}")
    assert encoded(dataset, 10_000_000) == encoded(dataset, 10_000_000) == expected
    assert list((tmp_path / "cache").rglob("*/ranges/*/*/*")) == []
    server.tags = True
    dataset = open_dataset(f"{server.url}/{SHARDS}")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert encoded(dataset, 10_000_000) == expected


def test_an_s3_server(local: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.server import ThreadedMotoServer

    expected = external(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        remote._filesystem.cache_clear()
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("bucket")
        for folder in ("data", "shards"):
            bucket.put(os.fspath(tmp_path / folder), f"bucket/{folder}", recursive=True)
        same(open_dataset("s3://bucket/data"), local)
        same(open_dataset(f"s3://bucket/{SHARDS}"), expected)
        for url in ("s3://bucket/data/x-{0..1}.tar", "s3://nobody/0.tar"):
            with pytest.raises(ValueError, match=r"^s3://.* does not exist$"):
                open_dataset(url)
    finally:
        remote._filesystem.cache_clear()
        server.stop()
