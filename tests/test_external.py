import errno
import fcntl
import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from data_sets import jpeg, picture
from PIL import Image

from pipelines import LoaderConfig, Sampler, evaluation_batches, open_dataset, open_loader
from pipelines.format import external
from pipelines.format.tar import Member
from pipelines.loaders.reader import Files
from pipelines.verify import verify


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **more) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def first_batch(root: Path, split: str = "train", backend: str = "torch") -> tuple[np.ndarray, list[int]]:
    """Pixels 0..255 (B, 32, 32, 3) and labels of the first sixteen samples."""
    config = LoaderConfig(
        backend=backend,  # type: ignore[arg-type]
        size=32,
        mean=(0, 0, 0),
        std=(1 / 255,) * 3,  # type: ignore[arg-type]
        batch_size=16,
        device=torch.device("cpu"),
    )
    loader = open_loader(open_dataset(root).splits[split], config)
    local_batch = next(evaluation_batches(min(16, len(open_dataset(root).splits[split])), 16, 0, 1))
    _, images, labels = next(loader.batches([local_batch]))
    loader.close()
    return images.permute(0, 2, 3, 1).numpy(), labels.tolist()


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_shards_of_the_webdataset_library(tmp_path: Path, backend: str) -> None:
    for number in range(3):
        (tmp_path / "data").mkdir(exist_ok=True)
        with webdataset.TarWriter(str(tmp_path / "data" / f"imagenet1k-train-{number:04d}.tar")) as writer:
            for key in range(4):
                label = 4 * number + key
                writer.write(
                    {"__key__": f"n{key:08d}_{label}", "jpg": jpeg(label), "cls": label, "json": {"label": 99}}
                )
    with webdataset.TarWriter(str(tmp_path / "data" / "imagenet1k-validation-00.tar")) as writer:
        writer.write({"__key__": "val/a", "png": png(50), "cls": 2})
    dataset = open_dataset(tmp_path / "data")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 12, "test": 1}
    assert len(dataset.classes) == 12
    images, labels = first_batch(tmp_path / "data", backend=backend)
    assert labels == list(range(12))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(jpeg(label)))) for label in labels])
    np.testing.assert_allclose(images, expected, atol=1.01)
    images, labels = first_batch(tmp_path / "data", "test", backend)
    assert labels == [2]
    np.testing.assert_allclose(images[0], picture(50), atol=0.01)


@pytest.mark.parametrize("kind", ["gnu", "pax", "ustar", "v7"])
def test_shards_of_tar_itself(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "files" / ("deep" if kind in ("ustar", "v7") else "d" * 120)
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"img-{number}.JPEG").write_bytes(jpeg(number))
        (folder / f"img-{number}.json").write_text(json.dumps({"caption": "ünï", "label": number % 3}))
        (folder / f"._img-{number}.JPEG").write_bytes(b"resource fork")
    (folder / "README").write_text("no sample")
    (tmp_path / "data" / "val").mkdir(parents=True)
    shard = tmp_path / "data" / "val" / "a.tar"
    command = ["tar", f"--format={kind}", "--sort=name", "-cf", shard, "-C", tmp_path / "files", "."]
    subprocess.run([*map(str, command)], check=True)
    split = open_dataset(tmp_path / "data").splits["test"]
    assert split.labels.tolist() == [0, 1, 2, 0, 1]
    assert [Files(split, 1).read(sample) for sample in range(5)] == [jpeg(number) for number in range(5)]


def test_the_index_is_built_once_and_again_when_a_shard_changes(tmp_path: Path, cache: Path) -> None:
    shard = tmp_path / "data" / "0.tar"
    write_tar(shard, [("a.jpg", jpeg(1)), ("a.cls", b"1")])
    fingerprint = open_dataset(tmp_path / "data").fingerprint
    built = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    assert open_dataset(tmp_path / "data").fingerprint == fingerprint
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")} == built
    write_tar(shard, [("a.jpg", jpeg(1)), ("a.cls", b"0"), ("b.jpg", jpeg(2)), ("b.cls", b"01\n")])
    dataset = open_dataset(tmp_path / "data")
    assert dataset.splits["train"].labels.tolist() == [0, 1]
    assert dataset.fingerprint != fingerprint


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", jpeg(1))], r"a has an image but no label; a member a\.cls or \.json is needed"),
        ([("a.jpg", jpeg(1)), ("a.cls", b"dog")], r"a\.cls holds no label \(b'dog'\)"),
        ([("a.jpg", jpeg(1)), ("a.cls", b"-1")], r"a\.cls holds no label \(b'-1'\)"),
        ([("a.jpg", jpeg(1)), ("a.json", b'{"caption": 3}')], r"a\.json holds no label"),
        ([("a.json", b"1"), ("a.txt", b"text")], r"holds no \.jpg, \.jpeg or \.png image"),
    ],
)
def test_bad_members(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    write_tar(tmp_path / "data" / "0.tar", members)
    with pytest.raises(ValueError, match=rf"0\.tar.*{message}"):
        open_dataset(tmp_path / "data")


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    shard = tmp_path / "data" / "0.tar"
    write_tar(shard, [("a.jpg", jpeg(1)), ("a.cls", b"1"), ("b.jpg", jpeg(2)), ("b.cls", b"1")])
    whole = shard.read_bytes()
    for cut in (0, 700, 1024, 512 * 5, 512 * 6, 512 * 7 + 100):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"0\.tar (is truncated|is not a readable tar)"):
            open_dataset(tmp_path / "data")
    shard.write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(ValueError, match=r"0\.tar is compressed by gzip; unpack it"):
        open_dataset(tmp_path / "data")


def test_a_member_without_content_is_a_fault_of_that_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "0.tar", [("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", jpeg(2)), ("b.cls", b"0")])
    with pytest.raises(ValueError, match=r"zero bytes: .*0\.tar, sample 0"):
        first_batch(tmp_path / "data")


def test_an_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "data" / "0.tar", [("a.jpg", jpeg(1)), ("a.cls", b"1")])
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    with pytest.raises(ValueError, match="XDG_CACHE_HOME must name a writable folder"):
        open_dataset(tmp_path / "data")


# Which members are a sample ------------------------------------------------------------------------------------------


def grouped_by_the_library(names: list[str]) -> list[tuple[str, set[str]]]:
    files = ({"fname": name, "data": b"", "__url__": "x"} for name in names)
    groups = webdataset.tariterators.group_by_keys(files)
    return [(group["__key__"], {name for name in group if not name.startswith("__")}) for group in groups]


def test_samples_are_those_of_the_webdataset_library() -> None:
    random = np.random.default_rng(0)
    folders, keys = ("", "./", "a.b/", "a/b/", "/"), ("0", "img-1", "ü ", "-", "_0")
    extensions = ("jpg", "JPG", "cls", "seg.png", "0.jpg", "", "json", "v2.jpg.cls")
    for _ in range(300):
        names = []
        for folder, key in zip(random.choice(folders, 6), random.choice(keys, 6), strict=True):
            names += [f"{folder}{key}.{extension}" for extension in random.permutation(extensions)[:3]]
        try:
            expected = grouped_by_the_library(names)
        except ValueError:  # an extension that comes twice; here the second begins a sample of its own
            continue
        if len({key for key, _ in expected}) == len(expected):
            found = external.samples([Member(name, 0, 0) for name in names])
            assert [(key, set(parts)) for key, parts in found] == expected


def test_members_of_a_sample_may_be_apart_and_keys_may_come_again(tmp_path: Path) -> None:
    images = [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2))]
    labels = [("2.cls", b"5"), ("1.cls", b"4")]
    write_tar(tmp_path / "one.tar", images + labels)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.tar").write_bytes(2 * (tmp_path / "one.tar").read_bytes())
    split = open_dataset(tmp_path / "data").splits["train"]
    assert split.labels.tolist() == [4, 5, 4, 5]
    assert [Files(split, 1).read(sample) for sample in range(4)] == [jpeg(1), jpeg(2), jpeg(1), jpeg(2)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"i.0.jpg": 1, "i.0.cls": b"0", "i.1.jpg": 2, "i.1.cls": b"1"},
            r"i has no image i\.jpg.*i\.0\.jpg, i\.1\.jpg;",
        ),
        ({"0.jpg": 1, "0.png": 2, "0.cls": b"0"}, r"0 has several images \(0\.jpg, 0\.png\)"),
        ({"0.jpg": 1, "0.cls": b"0", "1.webp": 2, "1.cls": b"0"}, r"1 has no image 1\.jpg.*but 1\.webp;"),
        ({"0.jpg": 1, "0.cls": b"0", "1.gif": 2, "1.json": b"0"}, r"1 has no image.*but 1\.gif;"),
        ({"0.jpg": 1, "0.cls": b"0", "1.cls": b"0"}, r"1 has no image.*but 1\.cls;"),
        ({"0.jpg": 1, "0.cls": b"0", "1.input.jpg": 2, "1.cls": b"0"}, r"1 has no image.*but 1\.input\.jpg;"),
        ({"0.jpg": (tarfile.SYMTYPE, "/data/0.jpg"), "0.cls": b"0"}, r"0\.jpg is a link to /data/0\.jpg, which is not"),
        ({"0.jpg": 1, "0.cls": (tarfile.LNKTYPE, "labels/0")}, r"0\.cls is a link to labels/0, which is not"),
        ({"0.jpg": (tarfile.FIFOTYPE, ""), "0.cls": b"0"}, r"0\.jpg is a device or pipe, no file"),
        ({"0.jpg": 1, "0.cls": b"2000000000"}, r"0\.cls holds the label 2000000000; number the classes from 0"),
        ({"0.jpg": 1, "0.json": b'{"label": 1e9, "cls": 9999999}'}, r"0\.json holds no label"),
        ({"0.jpg": 1, "0.json": b"99999999999999999999"}, r"0\.json holds the label 99999999999999999999;"),
        ({"0.jpg": 1, "0.cls": b"9" * 5000}, r"0\.cls holds no label"),
    ],
)
def test_what_is_no_sample_is_refused_by_name(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data" / "0.tar", "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                entry.type, entry.linkname, data = *data, b""
            data = jpeg(data) if isinstance(data, int) else data
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/data/0\.tar: .*{message}"):
        open_dataset(tmp_path / "data")


def test_other_members_are_not_read_and_keys_without_an_image_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = [("README.md", b"text"), ("1.jpg", jpeg(1)), ("1.mask.jpg", jpeg(9)), ("1.txt", b"cat"), ("1.cls", b"0")]
    write_tar(tmp_path / "data" / "0.tar", [*members, ("2.json", b"{}"), ("LICENSE", b"")])
    for expected in ([f"2 keys without an image are no samples, the first is {tmp_path}/data/0.tar: README"], []):
        caplog.clear()
        split = open_dataset(tmp_path / "data").splits["train"]
        assert [Files(split, 1).read(sample) for sample in range(len(split))] == [jpeg(1)]
        assert [record.getMessage() for record in caplog.records] == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("backend", ["dali", "torch", "webdataset"])
def test_backends_see_the_same_samples(tmp_path: Path, backend: str) -> None:
    """Of joined tars with links, other images beside, and members apart."""
    members = [(f"{k}.{kind}", data) for k in range(6) for kind, data in (("jpg", jpeg(k)), ("edge.png", png(k + 50)))]
    write_tar(tmp_path / "one.tar", members + [(f"{k}.cls", b"%d" % k) for k in range(6)])
    with tarfile.open(tmp_path / "two.tar", "w") as archive:
        for k in range(6, 10):
            for name, kind, target in (
                (f"{k}.jpg", tarfile.SYMTYPE, f"./{k - 6}.jpg"),
                (f"{k}.cls", tarfile.REGTYPE, ""),
            ):
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname, entry.size = kind, target, len(str(k)) if kind == tarfile.REGTYPE else 0
                archive.addfile(entry, io.BytesIO(str(k).encode()))
    (tmp_path / "data").mkdir()
    joined = (tmp_path / "one.tar").read_bytes() + (tmp_path / "two.tar").read_bytes()
    (tmp_path / "data" / "0.tar").write_bytes(joined)
    split = open_dataset(tmp_path / "data").splits["train"]
    config = LoaderConfig(
        backend=backend, size=32, mean=(0, 0, 0), std=(1 / 255,) * 3, batch_size=10, device=torch.device("cpu"),  # type: ignore[arg-type]
    )  # fmt: skip
    loader = open_loader(split, config)
    ((_, images, labels),) = loader.batches(Sampler(10, 10, seed=0).local_batches(0, 0, 1))
    loader.close()
    assert sorted(labels.tolist()) == list(range(10))
    for image, label in zip(images.permute(0, 2, 3, 1).numpy(), labels.tolist(), strict=True):
        np.testing.assert_allclose(image, np.asarray(Image.open(io.BytesIO(jpeg(label % 6)))), atol=1.01)


# Which shards are of which split -------------------------------------------------------------------------------------


def shards(root: Path, *names: str) -> Path:
    for name in names:
        write_tar(root / name, [("a.jpg", jpeg(1)), ("a.cls", b"0")])
    return root


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0.tar", "1.TAR"], {"train": 2}),
        (["imagenet-Train-0.tar", "imagenet_val_0.tar"], {"train": 1, "test": 1}),
        (["train/a/0.tar", "train/b/0.tar", "valid/0.tar"], {"train": 2, "test": 1}),
        (["shards-train/0.tar", "shards-validation/train-like/0.tar"], {"train": 1, "test": 1}),
        (["train-0.tar", "dev-0.tar"], {"train": 1, "test": 1}),
        (["training/0.tar", "Eval/0.tar", "@eaDir/x.tar", "#recycle/9.tar", ".old/1.tar"], {"train": 1, "test": 1}),
        (["a/restrain-0.tar", "b/latest-0.tar"], {"train": 2}),
    ],
)  # fmt: skip
def test_splits_by_name(tmp_path: Path, names: list[str], expected: dict[str, int]) -> None:
    found = external.find_shards(shards(tmp_path / "data", *names))
    assert {split: len(paths) for split, paths in found.items()} == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train-0.tar", "extra-0.tar"],
            r"extra-0\.tar is of no split: beside .*train-0\.tar, its name needs the word",
        ),
        (["0.tar", "val/0.tar"], r"data/0\.tar is of no split"),
        (["train-0.tar", "val-0.tar", "test-0.tar"], "are both for the test split, as"),
        (["train-0.tar", "dev-0.tar", "eval-0.tar"], "are both for the test split, as"),
        (["train-and-val-0.tar"], "names two splits, train and val"),
        (["train-0.tar", "train-1.tar.gz"], r"train-1\.tar\.gz is compressed; unpack it to a \.tar"),
        (["0.tar", "1.tgz"], r"1\.tgz is compressed"),
        (["0.tar", "1.tar.zst"], r"1\.tar\.zst is compressed"),
        (["train-00000-of-2.parquet"], r"parquet is a Parquet file; write its images into class folders or \.tar"),
        (["cifar/manifest.json", "cifar/train/0.tar"], r"holds the data set .*; give its own path, .*data/cifar$"),
        (["photos/0.jpg"], "neither manifest.json nor .tar shards"),
    ],
)
def test_shards_that_could_be_misunderstood_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_dataset(shards(tmp_path / "data", *names))


def test_a_table_beside_the_shards_is_metadata(tmp_path: Path) -> None:
    root = shards(tmp_path / "data", "00000.tar")
    for name in ("00000.parquet", "00000_stats.json", "sizes.json"):  # as img2dataset leaves them
        (root / name).write_bytes(b"PAR1")
    assert len(open_dataset(root).splits["train"]) == 1


def test_loops_of_folders_end(tmp_path: Path) -> None:
    root = shards(tmp_path / "data", "train/0.tar", "val/0.tar")
    for name in ("train/up", "val/up"):
        (root / name).symlink_to("..")
    assert {name: len(split) for name, split in open_dataset(root).splits.items()} == {"train": 1, "test": 1}


def test_labels_of_test_beyond_those_of_train_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "train.tar", [("a.jpg", jpeg(1)), ("a.cls", b"9")])
    write_tar(tmp_path / "data" / "val.tar", [("a.jpg", jpeg(1)), ("a.cls", b"10")])
    with pytest.raises(ValueError, match="labels of test go up to 10, those of train to 9; number the classes"):
        open_dataset(tmp_path / "data")


# The index -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "moved", "copied"])
def test_other_labels_with_the_same_size_and_time(tmp_path: Path, how: str) -> None:
    shard, other = tmp_path / "data" / "0.tar", tmp_path / "other.tar"
    write_tar(shard, [("a.jpg", jpeg(1)), ("a.cls", b"1"), ("b.jpg", jpeg(2)), ("b.cls", b"0")])
    assert open_dataset(tmp_path / "data").splits["train"].labels.tolist() == [1, 0]
    stat = shard.stat()
    write_tar(other, [("a.jpg", jpeg(1)), ("a.cls", b"0"), ("b.jpg", jpeg(2)), ("b.cls", b"1")])
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if how == "in place":
        shard.write_bytes(other.read_bytes())
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif how == "moved":
        other.rename(shard)
    else:
        subprocess.run(["cp", "-p", other, shard], check=True)
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert open_dataset(tmp_path / "data").splits["train"].labels.tolist() == [0, 1]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_cache_without_locks(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        root = shards(tmp_path / "data", "0.tar")
        assert len(open_dataset(root).splits["train"]) == 1
    assert list(cache.rglob("*.npy"))


def test_an_error_of_the_disk_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shards(tmp_path / "data", "0.tar")

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(external, "_index", broken)
    with pytest.raises(ValueError, match=r"data/0\.tar cannot be read \(Input/output error\)"):
        open_dataset(root)
    monkeypatch.undo()
    (root / "1.tar").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"shard .*1\.tar cannot be opened \(No such file"):
        open_dataset(root)


SCRIPT = """
import sys
from pipelines import open_dataset
from pipelines.format import external
external._PARALLEL_BYTES = 0
print(len(open_dataset(sys.argv[1]).splits["train"]))
"""


def test_a_script_without_a_main_guard(tmp_path: Path) -> None:
    root = shards(tmp_path / "data", "0.tar", "1.tar", "2.tar")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "script.py"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


def test_verify_compares_the_index_with_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    write_tar(root / "0.tar", [("a.jpg", jpeg(1)), ("a.cls", b"1"), ("b.jpg", jpeg(2)), ("b.cls", b"0")])
    dataset = open_dataset(root)
    assert list(verify(root, processes=1)) == []
    # As of a file system that keeps no time of change, where the index of the shard before is taken.
    index = np.array(dataset.splits["train"].index)
    index["label"] = index["label"][::-1]
    stale = replace(dataset, splits={"train": replace(dataset.splits["train"], index=index)})
    monkeypatch.setattr("pipelines.verify.open_dataset", lambda _: stale)
    (fault,) = verify(root, processes=1)
    assert fault.startswith(f"{root}/0.tar: its samples are not those of its index")
