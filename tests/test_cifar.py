"""CIFAR as it is published, made small: every way to have it gives the same shards."""

import io
import json
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from data_sets import picture, shard_files
from PIL import Image

from pipelines import LoaderConfig, Sampler, open_dataset, open_loader
from pipelines.prepare import Options, cifar, prepare


def pack(folder: Path, archive: Path, mode: str = "w") -> Path:
    with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
        tar.add(folder, arcname=folder.name)
    return archive


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
    """Writes what Python 2's cPickle did: every text and all bytes as byte strings, numpy by its name of then."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_text(self, value: str | bytes) -> None:
        data = value.encode() if isinstance(value, str) else value
        head = b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))
        self.write(head + data)
        self.memoize(value)

    def save_name(self, value: Any, name: str | None = None) -> None:
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(f"c{module}\n{name or value.__qualname__}\n".encode())
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text
    dispatch[type] = dispatch[type(len)] = dispatch[type(prepare)] = save_name


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


NAMES = {10: [f"thing{label}" for label in range(10)], 100: [f"fine_{label:02d}" for label in range(100)]}


def make_cifar(root: Path, classes: int, kind: str, per_file: int = 30) -> tuple[Path, dict[str, Any]]:
    """The published folder, in small, of seeded pictures; and {split: (pixels (N, 32, 32, 3), labels)}."""
    counts = {"train": per_file * (5 if classes == 10 else 1), "test": per_file}
    truth = {}
    for first, (split, count) in zip((0, 1000), counts.items(), strict=True):
        labels = (np.arange(count) * 7 + first) % classes
        truth[split] = np.stack([picture(first + number) for number in range(count)]), labels
    folder = (
        root
        / {
            (10, "bin"): "cifar-10-batches-bin",
            (10, "py"): "cifar-10-batches-py",
            (100, "bin"): "cifar-100-binary",
            (100, "py"): "cifar-100-python",
        }[classes, kind]
    )
    folder.mkdir(parents=True)
    for split, (pixels, labels) in truth.items():
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        names = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}[split]
        names = names if classes == 10 else [split]
        for name, some, their in zip(names, np.split(rows, len(names)), np.split(labels, len(names)), strict=True):
            if kind == "bin":
                columns = [their] if classes == 10 else [their // 5, their]
                records = np.concatenate([np.stack(columns, 1).astype(np.uint8), some], axis=1)
                (folder / f"{name}.bin").write_bytes(records.tobytes())
            else:
                key = "labels" if classes == 10 else "fine_labels"
                content = {
                    "batch_label": f"{name} of {len(names)}",
                    key: their.tolist(),
                    "coarse_labels": (their // 5).tolist(),
                    "data": some,
                    "filenames": [f"{label}_s_{number:06d}.png" for number, label in enumerate(their)],
                }
                (folder / name).write_bytes(pickled(content))
    listed = "\n".join(NAMES[classes]) + "\n\n"
    if kind == "bin":
        (folder / ("batches.meta.txt" if classes == 10 else "fine_label_names.txt")).write_text(listed)
        (folder / "readme.html").write_text("<html>")
    elif classes == 10:  # published as text, protocol 0
        lines = ["(dp1", "S'num_cases_per_batch'", "p2", "I10000", "sS'label_names'", "p3", "(lp4"]
        for number, name in enumerate(NAMES[10]):
            lines += [f"{'a' if number else ''}S'{name}'", f"p{5 + number}"]
        (folder / "batches.meta").write_text("\n".join([*lines, "asS'num_vis'", "p15", "I3072", "s."]))
    else:
        (folder / "meta").write_bytes(pickled({"fine_label_names": NAMES[100], "coarse_label_names": ["a"]}))
    return folder, truth


def test_the_pickles_made_here_are_what_python_loads(tmp_path: Path) -> None:
    folder, truth = make_cifar(tmp_path, 10, "py")
    for name, encoding in (("test_batch", "bytes"), ("batches.meta", "latin1")):
        assert b"numpy._core" not in (folder / name).read_bytes()
        content = pickle.loads((folder / name).read_bytes(), encoding=encoding)
        if name == "test_batch":
            pixels, labels = truth["test"]
            assert content[b"labels"] == labels.tolist()
            assert (content[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) == pixels).all()
        else:
            assert content["label_names"] == NAMES[10]


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_keeps_every_pixel_whichever_version_it_comes_from(tmp_path: Path, classes: int) -> None:
    (binary, truth), (python, _) = (make_cifar(tmp_path, classes, kind) for kind in ("bin", "py"))
    sources = [
        binary,
        python,
        pack(binary, tmp_path / "cifar-binary.tar.gz", "w:gz"),
        pack(python, tmp_path / "cifar-python.tar.gz", "w:gz"),
        pack(python, tmp_path / "cifar.tar"),
    ]
    for number, source in enumerate(sources):
        prepare(os.fspath(source), tmp_path / str(number), Options(shard_size=40, processes=1))
        assert shard_files(tmp_path / str(number)) == shard_files(tmp_path / "0"), source
    dataset = open_dataset(tmp_path / "0")
    assert dataset.classes == NAMES[classes]
    for split, (pixels, labels) in truth.items():
        seen = set()
        for path in sorted((tmp_path / "0" / split).glob("*.tar")):
            with tarfile.open(path) as archive:
                files = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
            for name in (name for name in files if name.endswith(".png")):
                key = name.removesuffix(".png")
                number = int(json.loads(files[f"{key}.json"])["name"].split("/")[1])
                assert (np.asarray(Image.open(io.BytesIO(files[name]))) == pixels[number]).all()
                assert int(files[f"{key}.cls"]) == labels[number]
                seen.add(number)
        assert seen == set(range(len(labels)))


def test_loaders_give_the_published_pixels(tmp_path: Path) -> None:
    folder, truth = make_cifar(tmp_path, 10, "py")
    prepare(os.fspath(folder), tmp_path / "data", Options(processes=1))
    split = open_dataset(tmp_path / "data").splits["test"]
    (local_batch,) = Sampler(len(split), len(split), seed=0).local_batches(0, 0, 1)
    expected = {pixels.tobytes(): label for pixels, label in zip(*truth["test"], strict=True)}
    for backend in ("torch", "dali"):
        config = LoaderConfig(
            backend=backend, size=32, mean=(0, 0, 0), std=(1, 1, 1), batch_size=len(split),  # type: ignore[arg-type]
            device=torch.device("cpu"), threads=1,
        )  # fmt: skip
        loader = open_loader(split, config)
        ((_, images, labels),) = loader.batches([local_batch])
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        assert {image.tobytes(): label for image, label in zip(pixels, labels.tolist(), strict=True)} == expected
        loader.close()


@pytest.mark.parametrize("number", range(8))
def test_hostile_and_damaged_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    folder, _ = make_cifar(tmp_path, 10, "py")
    mark = tmp_path / "mark"
    whole = (folder / "test_batch").read_bytes()
    command = f"touch {mark}"
    deep = b"\x80\x02})" + b"\x85" * 90_000  # a key whose hash would overflow the C stack
    hostile, message = (
        (b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.", "it has no"),
        (b"\x80\x02}U\x04dataU\x06labels]s" + b"cposix\nsystem\n" + b"U" + bytes([len(command)]) + command.encode()
         + b"\x85Rs.", "make no sense|no array"),
        (whole[:-1] + b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR0.", "POP is not used"),
        (b"(S'" + command.encode() + b"'\nios\nsystem\n.", "INST is not used"),
        (pickle.dumps({"labels": [1], "data": np.zeros((1, 3072), np.uint8)}, protocol=5), "FRAME is not used"),
        (deep + b"Ns.", "a key is no text"),
        (whole[:-900], "expected"),
        (b"\x80\x02" + b"]" * 200_000, "more than 100000 opcodes"),
    )[number]  # fmt: skip
    (folder / "test_batch").write_bytes(hostile)
    monkeypatch.setattr(cifar, "_MAX_OPCODES", 100_000)
    with pytest.raises(ValueError, match=f"test_batch is damaged .*({message})"):
        prepare(os.fspath(folder), tmp_path / "data", Options(processes=1))
    assert not mark.exists()
    assert not list(tmp_path.glob("data*"))


def test_a_hostile_pickle_of_names_runs_nothing(tmp_path: Path) -> None:
    folder, _ = make_cifar(tmp_path, 100, "py")
    mark = tmp_path / "mark"
    (folder / "meta").write_bytes(f"(S'fine_label_names'\ncos\nsystem\n(S'touch {mark}'\ntRd.".encode())
    with pytest.raises(ValueError, match=r"meta is damaged .*fine_label_names is no list of names"):
        prepare(os.fspath(folder), tmp_path / "data", Options(processes=1))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_4.bin", None, "has no data_batch_4.bin; unpack the published archive again, or give it"),
        ("batches.meta.txt", None, "has no batches.meta.txt"),
        ("data_batch_2.bin", bytes(5000), "data_batch_2.bin is damaged .5000 bytes, not a multiple of 3073"),
        ("test_batch.bin", b"", "test_batch.bin is damaged .no images"),
        ("batches.meta.txt", b"a b c", "data_batch_1.bin is damaged .labels 0..9 for 3 classes"),
    ],
)
def test_incomplete_cifar_is_reported(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    folder, _ = make_cifar(tmp_path, 10, "bin")
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(os.fspath(folder), tmp_path / "data", Options(processes=1))
