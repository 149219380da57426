"""Layouts of folders: understood, or refused in a line; what is not taken is listed."""

import json
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest
from data_sets import jpeg

from pipelines.prepare import Options, prepare
from pipelines.prepare.archives import File, Source
from pipelines.prepare.class_folders import class_folders
from pipelines.prepare.sources import open_source


def files(*names: str) -> list[File]:
    return [File(name, f"/{name}", 0, 1) for name in names]


def places(source: Source) -> dict[str, str]:
    return {item.name: f"{item.split}/{source.classes[item.label]}" for item in source.items}


def listed(source: Source) -> dict[str, tuple[int, str]]:
    return {entry["name"]: (entry["files"], entry["reason"]) for entry in source.skipped}


def both(under: str = "", count: int = 2) -> list[str]:
    return [f"{under}{name}/{k}.jpg" for name in ("cat", "dog") for k in range(count)]


def expected(train: Iterable[str], test: Iterable[str] = ()) -> dict[str, str]:
    def label(name: str) -> str:
        return "cat" if "/cat/" in f"/{name}" else "dog"

    return {name: f"train/{label(name)}" for name in train} | {name: f"test/{label(name)}" for name in test}


@pytest.mark.parametrize("test", ["test", "Test", "val", "VAL", "valid", "Validation", "testing", "dev", "eval"])
@pytest.mark.parametrize("train", ["train", "Train", "training"])
@pytest.mark.parametrize("root", ["", "./", "data/photos/"])
def test_names_of_splits(root: str, train: str, test: str) -> None:
    names = both(f"{root}{train}/"), both(f"{root}{test}/", 1)
    source = class_folders("x", files(*names[0], *names[1]))
    assert places(source) == expected(*names)
    assert source.skipped == []


@pytest.mark.parametrize("more", [[], ["README.md", "labels.csv"], ["a.jpg", "notes/plan.txt"]])
def test_without_splits(more: list[str]) -> None:
    for root in ("", "animals/", "a/b/c/"):
        source = class_folders("x", files(*both(root), *(root + name for name in more)))
        assert places(source) == expected(both(root))
        assert sum(count for count, _ in listed(source).values()) == len(more)


def test_classes_may_have_folders_inside_and_any_name() -> None:
    names = ["cat/a/0.jpg", "cat/b/c/1.jpg", "dog/d/2.jpg", "train/3.jpg", "bus, #1/4", "@home/5.JPG"]
    names[3:3] = ["owl/images/6.jpg"]
    with pytest.raises(ValueError, match=r"which folders are the classes, cat/ and @home/, or a/ and others in cat/"):
        class_folders("x", files(*names))
    flat = [name.replace("a/", "").replace("b/c/", "") for name in names]
    assert set(places(class_folders("x", files(*flat))).values()) == {
        f"train/{name}" for name in ("cat", "dog", "owl", "train", "bus, #1", "@home")
    }
    deep = ["cat/a/0.jpg", "cat/b/c/1.jpg", "dog/d/2.jpg", "dog/e/3.jpg", "owl/images/4.jpg"]
    assert set(places(class_folders("x", files(*deep))).values()) == {"train/cat", "train/dog", "train/owl"}


def tiny_imagenet(root: Path) -> dict[str, str]:
    """Files of Tiny-ImageNet by their places."""
    wnids = ("n01443537", "n01629819")
    truth = {f"train/{wnid}/images/{wnid}_{k}.JPEG": f"train/{wnid}" for wnid in wnids for k in range(2)}
    truth |= {f"val/images/val_{k}.JPEG": f"test/{wnids[k % 2]}" for k in range(3)}
    truth |= {"test/images/test_0.JPEG": "", "test/images/test_1.JPEG": "", "val/images/val_9.JPEG": ""}
    for name in truth:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(1))
    lines = [f"val_{k}.JPEG\t{wnids[k % 2]}\t0\t32\t44\t62\n" for k in range(4)]
    (root / "val/val_annotations.txt").write_text("".join(lines))
    for wnid in wnids:
        (root / f"train/{wnid}/{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
    (root / "wnids.txt").write_text("\n".join(wnids))
    return truth


@pytest.mark.parametrize("wrapper", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(tmp_path: Path, wrapper: str) -> None:
    truth = tiny_imagenet(tmp_path / wrapper)
    source = open_source(str(tmp_path), tmp_path, 1)
    prefix = f"{wrapper}/" if wrapper else ""
    assert places(source) == {prefix + name: place for name, place in truth.items() if place}
    skipped = listed(source)
    assert skipped[f"{prefix}test/images/"] == (2, "without a label")
    assert skipped[f"{prefix}val/images/val_9.JPEG"] == (1, "not in val_annotations.txt")
    assert skipped[f"{prefix}train/n01443537/"] == (1, "no image, by its name")
    (tmp_path / wrapper / "val/val_annotations.txt").write_text("val_0.JPEG\tn09999999\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val/ has 1 classes without training images, the first is n09999999"):
        open_source(str(tmp_path), tmp_path, 1)


def test_unlabelled_test_images_are_listed() -> None:
    for test in (["test/1.jpg", "test/2.jpg"], ["Test/images/1.jpg", "Test/images/2.jpg"]):
        source = class_folders("x", files(*both("train/"), *test))
        assert places(source) == expected(both("train/"))
        assert [count for count, _ in listed(source).values()] == [2]
        labelled = class_folders("x", files(*both("train/"), *test, *both("val/")))
        assert places(labelled) == expected(both("train/"), both("val/"))
        assert [count for count, _ in listed(labelled).values()] == [2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([*both("train/"), "val/1.jpg", "val/2.jpg"], "val/ holds 2 images without labels: neither class folders as"),
        ([*both("train/"), "valid/images/1.jpg"], "valid/ holds 1 images without labels"),
        ([*both("train/"), "val/owl/1.jpg"], "val/ holds 1 images without labels"),
        ([*both("train/"), *both("test/"), "test/owl/1.jpg"], "test/ has 1 classes without training images.* owl"),
        ([*both("train/"), *both("val/"), *both("test/")], "test/ and val/ are both for the test split"),
        ([*both("Train/"), *both("train/")], "Train/ and train/ are both for the train split"),
        ([*both("train/"), *both("extra/")], "extra/cat/ has the name of a class, but is not in train/ or another"),
        (both("test/"), r"test/ without class folders in train/: expected train/CLASS/image"),
        ([*both(), *both("val/")], r"val/ without class folders in train/"),
        (["train/1.jpg", "test/2.jpg"], "test/ and train/ hold images but no class folders: expected train/CLASS"),
        (["train/1.jpg"], "train/ hold images but no class folders"),
        (["train/images/1.jpg", "train/labels/1.txt"], "train/ holds images/ but no class folders"),
        (["data/images/1.jpg", "data/images/2.jpg"], "images/ holds images but no class folders: expected CLASS/image"),
        ([*both(), "docs/logo.png"], "docs/ is beside class folders: rename it if it is a class, else move it away"),
        (["cat/train/1.jpg", "dog/train/2.jpg"], "cat/ has a folder train/: expected train/cat/image"),
        (["a/train/cat/1.jpg", "b/train/cat/1.jpg"], "has folders of splits in a/ and in b/; give one of these"),
        (["COVID/images/1.png", "COVID/masks/1.png", "Normal/images/2.png", "Normal/masks/2.png"], "which folders are"),
        ([*both("data/"), "figures/1.png"], "which folders are the classes, data/ and figures/, or cat/ and others in"),
        (["1.jpg", "2.jpg"], "no images in class folders; .*of 2 other files the first is 1.jpg: in no class folder"),
    ],
)  # fmt: skip
def test_what_could_be_misunderstood_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^x\b.*{message}") as caught:
        class_folders("x", files(*names))
    assert "\n" not in str(caught.value)


def test_other_files_are_counted_and_listed() -> None:
    more = ["docs/a/1.png", "docs/a/2.png", "docs/3.png", "train/loose.jpg", "train/cat/list.TXT", "more.tar.gz",
            "train/.cache/1.jpg", ".git/a/b", ".git/c", "../4.jpg"]  # fmt: skip
    system = ["train/cat/@eaDir/0.jpg/T.jpg", "@eaDir/x.jpg", "#recycle/old.jpg", "__MACOSX/train/cat/._0.jpg",
              "train/cat/._0.jpg", "train/Thumbs.db", "$RECYCLE.BIN/cat/1.jpg"]  # fmt: skip
    source = class_folders("x", files(*both("train/"), *both("val/"), *more, *system))
    assert places(source) == expected(both("train/"), both("val/"))
    hidden = "hidden, or outside of the source"
    assert listed(source) == {
        "docs/a/": (2, "in no split"), "docs/": (1, "in no split"), "train/": (1, "in no class folder"),
        "train/cat/list.TXT": (1, "no image, by its name"), "train/.cache/": (1, hidden), ".git/": (2, hidden),
        "more.tar.gz": (1, "an archive in the source; unpack it there, or give it by itself"), "../": (1, hidden),
    }  # fmt: skip


def test_a_name_composed_in_two_ways_is_one_class() -> None:
    one, other = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert one != other
    names = [f"train/{one}/1.jpg", f"train/{other}/2.jpg", "train/dog/3.jpg", f"val/{other}/4.jpg"]
    source = class_folders("x", files(*names))
    assert source.classes == [one, "dog"]
    assert places(source) == {
        names[0]: f"train/{one}", names[1]: f"train/{one}", names[2]: "train/dog", names[3]: f"test/{one}"
    }  # fmt: skip


def make(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(number))
    return root


@pytest.mark.parametrize("dest", ["prepared", "a/b/prepared", "../in/prepared", "../link/prepared"])
def test_a_destination_inside_of_the_source_is_refused(tmp_path: Path, dest: str) -> None:
    source = make(tmp_path / "in", *both())
    (tmp_path / "link").symlink_to("in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"DEST .*prepared is inside of the source .*; choose another DEST"):
        prepare(str(source), source / dest, Options(processes=1))
    assert sorted(tmp_path.rglob("*")) == before
    prepare(os.path.relpath(source), tmp_path / "in2", Options(processes=1))


def test_loops_and_devices_in_a_folder_are_listed(tmp_path: Path) -> None:
    source = make(tmp_path / "in", *both())
    for name in ("cat", "dog"):
        (source / name / "up").symlink_to("..")
    (source / "cat" / "gone.jpg").symlink_to("nowhere")
    (source / "cat" / "knot.jpg").symlink_to("knot.jpg")
    os.mkfifo(source / "cat" / "pipe")
    line = prepare(str(source), tmp_path / "data", Options(size=0, processes=1))
    assert "train 4 samples in 1 shards, 5 files skipped (see manifest.json)" in line
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert {entry["name"]: entry["reason"] for entry in manifest["rejected"]} == {
        "cat/up": "a link to a folder that is read already",
        "dog/up": "a link to a folder that is read already",
        "cat/gone.jpg": "No such file or directory",
        "cat/knot.jpg": "Too many levels of symbolic links",
        "cat/pipe": "a device, pipe or socket, no file",
    }
