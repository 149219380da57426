"""ImageNet as it is published, made small: every way to have it gives the same shards."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_sets import jpeg, picture, shard_files, shared
from PIL import Image
from scipy.io import savemat

from pipelines import open_dataset
from pipelines.prepare import Options, imagenet, prepare

Images = dict[str, list[tuple[str, bytes]]]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def make_imagenet(root: Path, train: Images, validation: list[tuple[str, bytes]], packed: bool = True) -> Path:
    """What is published: `train` by WordNet id, `validation` in order; packed: as archives, else as folders."""
    root.mkdir(parents=True)
    wnids = sorted(train, reverse=True)  # the devkit's numbers follow no order of the names
    numbers = {wnid: number for number, wnid in enumerate(wnids, 1)}
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"),
              ("children", "O"), ("wordnet_height", "O"), ("num_train_images", "O")]  # fmt: skip
    rows = [(float(number), wnid, f"word {wnid}, other", "what it is", 0.0, np.zeros((1, 0)), 0.0, 1300.0)
            for wnid, number in numbers.items()]  # fmt: skip
    rows.append((float(len(rows) + 1), "n00001740", "entity", "all", 2.0, np.array([[1.0, 2.0]]), 9.0, 0.0))
    synsets = np.empty((len(rows), 1), fields)
    for number, row in enumerate(rows):
        synsets[number, 0] = row
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets}, do_compression=True)
    truth = "".join(f"{numbers[wnid]}\n" for wnid, _ in validation).encode()
    kit = {"data/meta.mat": meta.getvalue(), "data/ILSVRC2012_validation_ground_truth.txt": truth, "readme.txt": b"hi"}
    numbered = [(f"ILSVRC2012_val_{number:08d}.JPEG", data) for number, (_, data) in enumerate(validation, 1)]
    if packed:
        with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
            for wnid, images in train.items():
                buffer = io.BytesIO()
                with tarfile.open(fileobj=buffer, mode="w") as inner:
                    for name, data in images:
                        add(inner, name, data)
                add(outer, f"{wnid}.tar", buffer.getvalue())
        with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
            for name, data in reversed(numbered):
                add(archive, name, data)
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            for name, data in kit.items():
                add(archive, f"ILSVRC2012_devkit_t12/{name}", data)
        return root
    files = {f"train/{wnid}/{name}": data for wnid, images in train.items() for name, data in images}
    files |= {f"val/{name}": data for name, data in numbered}
    files |= {f"ILSVRC2012_devkit_t12/{name}": data for name, data in kit.items()}
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def small_imagenet() -> tuple[Images, list[tuple[str, bytes]]]:
    """Three classes of five images; among them what the original has: grey and CMYK JPEGs, a PNG by a JPEG's name."""
    wnids = ("n02105855", "n01440764", "n03062245")
    train = {
        wnid: [(f"{wnid}_{number}.JPEG", jpeg(100 * row + number, 40, 60)) for number in range(5)]
        for row, wnid in enumerate(wnids)
    }
    odd = Image.fromarray(picture(7, 40, 60))
    train["n02105855"][1] = ("n02105855_2933.JPEG", encoded(odd, "PNG"))
    train["n03062245"][2] = ("n03062245_4620.JPEG", encoded(odd.convert("CMYK"), "JPEG"))
    train["n01440764"][3] = ("n01440764_77.JPEG", encoded(odd.convert("L"), "JPEG"))
    validation = [(wnids[(number * 2) % 3], jpeg(500 + number, 50, 40)) for number in range(8)]
    return train, validation


OPTIONS = Options(size=16, shard_size=4, processes=1)


def originals(root: Path, split: str) -> dict[str, tuple[str, np.ndarray]]:
    """Original name -> (class, brightness of the pixels)."""
    found = {}
    for path in (root / split).glob("*.tar"):
        with tarfile.open(path) as archive:
            files = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
        for name in (name for name in files if name.endswith(".jpg")):
            facts = json.loads(files[name.replace(".jpg", ".json")])
            image = Image.open(io.BytesIO(files[name])).convert("L")
            found[facts["name"]] = (facts["class"], np.asarray(image, float))
    return found


def test_imagenet_archives_and_folders_give_the_same_shards(tmp_path: Path) -> None:
    train, validation = small_imagenet()
    archives = make_imagenet(tmp_path / "archives", train, validation)
    folders = make_imagenet(tmp_path / "folders", train, validation, packed=False)
    half = make_imagenet(tmp_path / "half", train, validation)
    with tarfile.open(half / "ILSVRC2012_img_train.tar") as outer:
        for entry in outer:
            (half / entry.name).write_bytes(outer.extractfile(entry).read())  # type: ignore[union-attr]
    (half / "ILSVRC2012_img_train.tar").unlink()
    for source in (archives, folders, half):
        prepare(os.fspath(source), tmp_path / f"{source.name}-data", OPTIONS)
        assert shard_files(tmp_path / f"{source.name}-data") == shard_files(tmp_path / "archives-data"), source
    dataset = open_dataset(tmp_path / "archives-data")
    assert dataset.classes == sorted(train)
    manifest = json.loads((dataset.path / "manifest.json").read_text())
    assert manifest["rejected"] == []
    assert manifest["splits"]["train"]["class_counts"] == [5, 5, 5]
    expected = {f"{wnid}/{name}": (wnid, data) for wnid, images in train.items() for name, data in images}
    expected |= {f"ILSVRC2012_val_{n:08d}.JPEG": pair for n, pair in enumerate(validation, 1)}
    stored = originals(dataset.path, "train") | originals(dataset.path, "test")
    assert stored.keys() == expected.keys()
    for name, (wnid, data) in expected.items():
        assert stored[name][0] == wnid
        image = Image.open(io.BytesIO(data)).convert("L").resize((16, 16), Image.Resampling.LANCZOS)
        assert np.abs(stored[name][1] - np.asarray(image, float)).mean() < 4, name


def test_imagenet_one_process_or_four_interrupted_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = small_imagenet()
    source = os.fspath(make_imagenet(tmp_path / "source", train, validation))
    prepare(source, tmp_path / "one", OPTIONS)
    monkeypatch.setattr(imagenet, "_PARALLEL_BYTES", 0)
    prepare(source, tmp_path / "four", Options(size=16, shard_size=4, processes=4))
    assert shard_files(tmp_path / "four") == shard_files(tmp_path / "one")
    monkeypatch.setattr("pipelines.prepare.build._statistics", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "data", OPTIONS)
    monkeypatch.undo()
    journal = tmp_path / "data.partial" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:-9])
    prepare(source, tmp_path / "data", OPTIONS)
    assert shard_files(tmp_path / "data") == shard_files(tmp_path / "one")


def damage_inner(root: Path, change: Callable[[bytearray, int, int], None]) -> None:
    path = root / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as outer:
        entry = outer.getmember("n01440764.tar")
    data = bytearray(path.read_bytes())
    change(data, entry.offset_data, entry.size)
    path.write_bytes(data)


def test_damaged_archives_are_reported(tmp_path: Path) -> None:
    train, validation = small_imagenet()

    def garble(data: bytearray, start: int, size: int) -> None:
        data[start : start + 512] = b"x" * 512

    def no_end(data: bytearray, start: int, size: int) -> None:
        last = start + len(data[start : start + size].rstrip(b"\0"))
        data[last : start + size] = b"y" * (start + size - last)

    def overlong(data: bytearray, start: int, size: int) -> None:
        header = tarfile.TarInfo("n01440764_0.JPEG")
        header.size = 1 << 30
        data[start : start + 512] = header.tobuf(tarfile.USTAR_FORMAT)

    for number, (change, message) in enumerate(
        ((garble, "n01440764.tar is truncated"), (no_end, "n01440764.tar is truncated"),
         (overlong, "n01440764.tar is truncated: n01440764_0.JPEG ends beyond it"))
    ):  # fmt: skip
        source = make_imagenet(tmp_path / str(number), train, validation)
        damage_inner(source, change)
        with pytest.raises(ValueError, match=f"ILSVRC2012_img_train.tar, {message}"):
            prepare(os.fspath(source), tmp_path / "data", OPTIONS)
    source = make_imagenet(tmp_path / "cut", train, validation)
    os.truncate(source / "ILSVRC2012_img_val.tar", 5000)
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_val\.tar is truncated"):
        prepare(os.fspath(source), tmp_path / "data", OPTIONS)
    assert not list(tmp_path.glob("data*"))


KIT = "ILSVRC2012_devkit_t12.tar.gz"


def change_kit(source: Path, name: str, content: bytes) -> None:
    with tarfile.open(source / KIT) as archive:
        files = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    with tarfile.open(source / KIT, "w:gz") as archive:
        for path, data in files.items():
            add(archive, path, content if path.endswith(name) else data)


def add_folder(source: Path) -> None:
    (source / "n01440764").mkdir()
    (source / "n01440764" / "n01440764_0.JPEG").write_bytes(b"")


def without_a_class(source: Path) -> None:
    with tarfile.open(source / "ILSVRC2012_img_train.tar") as outer:
        files = {entry.name: outer.extractfile(entry).read() for entry in outer}  # type: ignore[union-attr]
    with tarfile.open(source / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in files.keys() - {"n03062245.tar"}:
            add(outer, name, files[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: (s / KIT).unlink(),
            f"no data/meta.mat, with their classes; put {KIT} or LOC_val_solution.csv there",
        ),
        (lambda s: (s / "ILSVRC2012_img_train.tar").unlink(), "no training images; put ILSVRC2012_img_train.tar there"),
        (lambda s: os.truncate(s / KIT, 300), f"{KIT} cannot be unpacked"),
        (add_folder, "has n01440764/n01440764_0.JPEG twice, in .*; remove one"),
        (without_a_class, "images of 1 classes without training images, the first is n03062245"),
        (lambda s: change_kit(s, "truth.txt", b"1\n2\n3\n"), "but its data/.*truth.txt has 3 lines"),
        (lambda s: change_kit(s, "truth.txt", b"99\n" * 8), "truth.txt is damaged .99.; get"),
        (lambda s: change_kit(s, "truth.txt", b"one\n"), "truth.txt is damaged .*one"),
        (lambda s: change_kit(s, "meta.mat", b"MATLAB" * 99), "data/meta.mat cannot be read"),
    ],
)
def test_faults_of_imagenet_are_reported(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    source = make_imagenet(tmp_path / "source", *small_imagenet())
    change(source)
    with pytest.raises(ValueError, match=message):
        prepare(os.fspath(source), tmp_path / "data", OPTIONS)
    assert not list(tmp_path.glob("data*"))


def test_one_archive_of_imagenet_is_not_enough(tmp_path: Path) -> None:
    source = make_imagenet(tmp_path / "source", *small_imagenet())
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        with pytest.raises(ValueError, match="is a part of ImageNet; give the folder with its archives"):
            prepare(os.fspath(source / name), tmp_path / "data", OPTIONS)


def test_a_compressed_mat_file_cannot_fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet, "_MAX_META_BYTES", 1 << 20)
    packed = zlib.compress(bytes(2 << 20))
    bomb = bytes(124) + b"\x00\x01IM" + struct.pack("<II", 15, len(packed)) + packed
    with pytest.raises(ValueError, match=r"meta\.mat cannot be read .*bytes or more, unpacked"):
        imagenet._wnids(bomb)


def test_the_sample_of_imagenet_in_the_official_structure(tmp_path: Path) -> None:
    with tarfile.open(shared("imagenet-sample-250.tar")) as archive:
        images = {entry.name: archive.extractfile(entry).read() for entry in archive if entry.isreg()}  # type: ignore[union-attr]
    train: Images = {}
    for name, data in images.items():
        train.setdefault(Path(name).parts[-2], []).append((Path(name).name, data))
    validation = [(wnid, files[0][1]) for wnid, files in list(train.items())[:40]]
    source = make_imagenet(tmp_path / "ILSVRC2012", train, validation)
    prepare(os.fspath(source), tmp_path / "data", Options(shard_size=100, mode="crop"))
    dataset = open_dataset(tmp_path / "data")
    assert dataset.classes == sorted(train)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": len(images), "test": 40}
    assert set(dataset.splits["train"].index["height"]) == set(dataset.splits["train"].index["width"]) == {128}
    facts = originals(dataset.path, "test")
    assert [facts[f"ILSVRC2012_val_{n:08d}.JPEG"][0] for n in range(1, 41)] == [wnid for wnid, _ in validation]
    # Against the class folders of the original tar, which know nothing of the archives.
    prepare(shared("imagenet-sample-250.tar"), tmp_path / "plain", Options(shard_size=100, mode="crop"))
    whole, plain = originals(dataset.path, "train"), originals(tmp_path / "plain", "train")
    assert {Path(name).name: label for name, (label, _) in whole.items()} == {
        Path(name).name: label for name, (label, _) in plain.items()
    }
    by_name = {Path(name).name: pixels for name, (_, pixels) in plain.items()}
    assert all((pixels == by_name[Path(name).name]).all() for name, (_, pixels) in whole.items())


def make_kaggle(root: Path, train: Images, validation: list[tuple[str, bytes]]) -> dict[str, bytes]:
    """ImageNet as Kaggle has it, by name."""
    data = "ILSVRC/Data/CLS-LOC"
    files = {f"{data}/train/{wnid}/{name}": image for wnid, images in train.items() for name, image in images}
    numbered = [f"ILSVRC2012_val_{number:08d}" for number in range(1, len(validation) + 1)]
    files |= {f"{data}/val/{name}.JPEG": image for name, (_, image) in zip(numbered, validation, strict=True)}
    files |= {f"{data}/test/ILSVRC2012_test_{number:08d}.JPEG": jpeg(900 + number) for number in range(3)}
    rows = [f"{name},{wnid} 1 2 30 40 {wnid} 5 5 9 9 \n" for name, (wnid, _) in zip(numbered, validation, strict=True)]
    files["LOC_val_solution.csv"] = ("ImageId,PredictionString\n" + "".join(reversed(rows))).encode()
    files["LOC_train_solution.csv"] = b"ImageId,PredictionString\n"
    for wnid, images in train.items():
        for name, _ in images:
            annotation = Path(name).with_suffix(".xml")
            files[f"ILSVRC/Annotations/CLS-LOC/train/{wnid}/{annotation}"] = b"<annotation/>"
    files["ILSVRC/ImageSets/CLS-LOC/val.txt"] = b"ILSVRC2012_val_00000001 1\n"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return files


def test_imagenet_of_kaggle_gives_the_same_shards(tmp_path: Path) -> None:
    train, validation = small_imagenet()
    files = make_kaggle(tmp_path / "kaggle", train, validation)
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with tarfile.open(tmp_path / "kaggle.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "kaggle", arcname=".")
    published = make_imagenet(tmp_path / "published", train, validation)
    prepare(os.fspath(published), tmp_path / "expected", OPTIONS)
    for number, name in enumerate(("kaggle", "kaggle.zip", "kaggle.tar.gz")):
        prepare(os.fspath(tmp_path / name), tmp_path / f"{number}", OPTIONS)
        assert shard_files(tmp_path / f"{number}") == shard_files(tmp_path / "expected"), name
        manifest = json.loads((tmp_path / f"{number}" / "manifest.json").read_text())
        assert manifest["rejected"] == []
        skipped = {entry["name"]: (entry["files"], entry["reason"]) for entry in manifest["skipped"]}
        assert skipped["ILSVRC/Data/CLS-LOC/test/"] == (3, "without a label")
        assert skipped["ILSVRC/Annotations/CLS-LOC/train/n01440764/"][0] == 5


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n", "LOC_val_solution.csv has 1 lines"),
        (b"ImageId,PredictionString\nILSVRC2012_val_00000001,\n", "LOC_val_solution.csv is damaged"),
        (b"a,b\n1,2\n", "LOC_val_solution.csv is damaged"),
        (b"\xff\xfe\x00", "LOC_val_solution.csv is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_table_of_kaggle_is_reported(tmp_path: Path, table: bytes, message: str) -> None:
    make_kaggle(tmp_path / "source", *small_imagenet())
    (tmp_path / "source" / "LOC_val_solution.csv").write_bytes(table)
    with pytest.raises(ValueError, match=message):
        prepare(os.fspath(tmp_path / "source"), tmp_path / "data", OPTIONS)
