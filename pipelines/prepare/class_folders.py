"""Which folders are splits and which are classes: CLASS/image, or train/CLASS/image beside test/CLASS/image.

Files that are no images, or that have no label, are skipped and listed. What could be meant in more than one way is
refused: a wrong guess would be trained on.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, NoReturn

from ..format.folders import SPLITS, is_system
from .archives import File, Source, labelled

_NO_IMAGES = re.compile(
    r"txt|csv|tsv|jsonl?|xml|ya?ml|md|rst|html?|css|js|py|ipynb|sh|log|pdf|docx?|xlsx?|mat|np[yz]|pkl|pickle|pth|h5"
    r"|hdf5|parquet|arrow|tfrecord|idx|db|ini|mp[34]|avi|mov|wav"
)
_ARCHIVES = re.compile(r"zip|tar|t?gz|bz2|xz|zst|7z|rar")
_NO_CLASSES = frozenset(("image", "images", "img", "imgs", "jpegimages"))
_DOCUMENTS = frozenset(("doc", "docs", "documentation"))
_ANNOTATIONS = "val_annotations.txt"  # of Tiny-ImageNet: the name of an image, a tab, its class, a tab, a box

Parts = tuple[str, ...]


class Skipped:
    """Files that are not taken, and why."""

    def __init__(self) -> None:
        self._files: list[tuple[Parts, str]] = []
        self._hidden: dict[str, int] = defaultdict(int)

    def add(self, parts: Parts, reason: str) -> None:
        self._files.append((parts, reason))

    def split_off(self, files: Iterable[File]) -> list[tuple[Parts, File]]:
        """The files that may be images, by the parts of their names; the others are skipped.

        What an operating system or a NAS device puts beside files is not even listed.
        """
        images = []
        for file in files:
            parts = tuple(part for part in PurePosixPath(file.name).parts if part not in (".", "/"))
            if any(map(is_system, parts)):
                continue
            hidden = next((number for number, part in enumerate(parts, 1) if part.startswith(".")), 0)
            suffix = PurePosixPath(parts[-1]).suffix[1:].lower()
            if hidden:
                self._hidden["/".join(parts[:hidden]) + "/" * (hidden < len(parts))] += 1
            elif _NO_IMAGES.fullmatch(suffix):
                self.add(parts, "no image, by its name")
            elif _ARCHIVES.fullmatch(suffix):
                self.add(parts, "an archive in the source; unpack it there, or give it by itself")
            else:
                images.append((parts, file))
        return images

    def listed(self, taken: Iterable[Parts]) -> list[dict[str, Any]]:
        """For the manifest: a folder as a whole if nothing is taken of it, other files one by one."""
        folders = {parts[:-1] for parts in taken} | {()}
        counts: dict[tuple[str, str], int] = defaultdict(int)
        for parts, reason in self._files:
            name = "/".join(parts) if parts[:-1] in folders else "/".join(parts[:-1]) + "/"
            counts[name, reason] += 1
        for name, count in self._hidden.items():
            counts[name, "hidden, or outside of the source"] += count
        return [
            {"name": _printable(name), "files": count, "reason": reason}
            for (name, reason), count in sorted(counts.items())
        ]


def class_folders(source: str, files: list[File]) -> Source:
    """The images in class folders; ValueError in a line that says what was not understood."""
    skipped = Skipped()
    images = skipped.split_off(files)
    root = _root_of_splits(source, images)
    if root is None:
        placed = _without_splits(source, images, skipped)
    else:
        texts = {tuple(PurePosixPath(file.name).parts): file for file in files if file.name.endswith(_ANNOTATIONS)}
        placed = _Splits(source, root, images, texts, skipped).placed()
    if not placed:
        others = skipped.listed(())
        count = sum(other["files"] for other in others)
        first = f"; of {count} other files the first is {others[0]['name']}: {others[0]['reason']}" if others else ""
        raise ValueError(f"{source} holds no images in class folders; expected CLASS/image or train/CLASS/image{first}")
    classes = sorted({name for _, name, _, _ in placed})
    labels = {name: label for label, name in enumerate(classes)}
    items = [labelled(file, split, labels[name]) for split, name, _, file in placed]
    order = sorted(items, key=lambda item: (item.split, item.label, item.name))
    return Source(classes, order, skipped.listed(parts for _, _, parts, _ in placed))


Placed = list[tuple[str, str, Parts, File]]  # split, class, parts of the name, file


def _root_of_splits(source: str, images: list[tuple[Parts, File]]) -> Parts | None:
    """The folder that has train/CLASS/ and the like, None if there is none."""
    roots = set()
    for parts, _ in images:
        depth = next((depth for depth, part in enumerate(parts[:-2]) if part.lower() in SPLITS), None)
        if depth is not None:
            roots.add(parts[:depth])
    if len(roots) > 1:
        one, other, *_ = sorted("/".join((*root, "")) or "the source itself" for root in roots)
        raise ValueError(f"{source} has folders of splits in {one} and in {other}; give one of these as the source")
    return roots.pop() if roots else None


def _without_splits(source: str, images: list[tuple[Parts, File]], skipped: Skipped) -> Placed:
    folders = {parts[:-1] for parts, _ in images} - {()}
    root = _common_root(folders - {folder[:depth] for folder in folders for depth in range(len(folder))})
    placed: Placed = []
    inside: dict[str, set[Parts]] = defaultdict(set)
    for parts, file in images:
        below = parts[len(root) : -1] if parts[: len(root)] == root else ()
        if below:
            name = unicodedata.normalize("NFC", below[0])
            placed.append(("train", name, parts, file))
            inside[name].add(below[1:])
        else:
            skipped.add(parts, "in no class folder")
    _check_classes(source, inside)
    return placed


def _check_classes(source: str, inside: dict[str, set[Parts]]) -> None:
    """ValueError if the folders are hardly classes; inside: the folders below each that hold images."""
    names = sorted(inside)
    splits = [name for name in names if name.lower() in SPLITS]
    if len(splits) > 1 or (splits and len(names) == 1):
        _refuse(source, splits, "hold images but no class folders: expected train/CLASS/image")
    if len(names) == 1 and names[0].lower() in _NO_CLASSES:
        _refuse(source, names, "holds images but no class folders: expected CLASS/image")
    documents = [name for name in names if name.lower() in _DOCUMENTS]
    if documents and len(names) > 1:
        _refuse(source, documents, "is beside class folders: rename it if it is a class, else move it away")
    for name, folders in inside.items():
        split = next((part for folder in folders for part in folder if part.lower() in SPLITS), None)
        if split:
            _refuse(source, [name], f"has a folder {split}/: expected {split}/{name}/image")
    # A class may have folders inside. But these are the classes where one name is in several, or others have none.
    shallow = next((name for name in names if () in inside[name]), None)
    owners: dict[str, str] = {}
    for name in names:
        tops = {folder[0] for folder in inside[name] if folder}
        if () in inside[name] or len(tops) == 1:
            continue
        other = shallow or next((owners[top] for top in sorted(tops) if top in owners), None)
        if other:
            raise ValueError(
                f"{source}: which folders are the classes, {name}/ and {other}/, or {min(tops)}/ and others in "
                f"{name}/? Give a folder that holds the classes alone"
            )
        owners |= dict.fromkeys(tops, name)


def _refuse(source: str, names: list[str], problem: str) -> NoReturn:
    raise ValueError(f"{source}: {' and '.join(f'{name}/' for name in names)} {problem}")


class _Splits:
    """The images below ROOT/train/, ROOT/test/ and the like, by the name of that folder."""

    def __init__(
        self, source: str, root: Parts, images: list[tuple[Parts, File]], texts: dict[Parts, File], skipped: Skipped
    ) -> None:
        self._source, self._root, self._texts, self._skipped = source, root, texts, skipped
        self._in_classes: dict[str, Placed] = defaultdict(list)
        self._loose: dict[str, list[tuple[Parts, File]]] = defaultdict(list)
        self._outside: list[tuple[Parts, File]] = []
        depth = len(root)
        for parts, file in images:
            name = parts[depth] if parts[:depth] == root and len(parts) > depth + 1 else ""
            if name.lower() not in SPLITS:
                self._outside.append((parts, file))
            elif len(parts) == depth + 2:
                self._loose[name].append((parts, file))
            else:
                label = unicodedata.normalize("NFC", parts[depth + 1])
                self._in_classes[name].append((SPLITS[name.lower()], label, parts, file))

    def placed(self) -> Placed:
        """Every image that has a label; ValueError in a line that says what was not understood."""
        train = self._one_of("train", {name for name in self._in_classes if SPLITS[name.lower()] == "train"})
        if train is None:
            found = sorted({*self._in_classes, *self._loose})
            _refuse(self._source, found, "without class folders in train/: expected train/CLASS/image")
        classes = {label for _, label, _, _ in self._in_classes[train]}
        if len(classes) == 1 and min(classes).lower() in _NO_CLASSES:
            _refuse(self._source, [train], f"holds {min(classes)}/ but no class folders: expected {train}/CLASS/image")
        test: dict[str, Placed] = {}
        unlabelled: dict[str, int] = {}
        names = {name for name in (*self._in_classes, *self._loose) if SPLITS[name.lower()] == "test"}
        for name in sorted(names):
            placed = self._with_labels(name, classes)
            if placed:
                test[name] = placed
            else:
                unlabelled[name] = len(self._in_classes[name]) + len(self._loose[name])
        self._one_of("test", set(test))
        for name, count in unlabelled.items():
            if not test and not name.lower().startswith("test"):  # test images are often published without labels
                _refuse(
                    self._source,
                    [name],
                    f"holds {count} images without labels: neither class folders as {train}/ has, nor {_ANNOTATIONS}; "
                    "arrange them in class folders, or move them away",
                )
            for _, _, parts, _ in self._in_classes[name]:
                self._skipped.add(parts, "without a label")
        for loose in self._loose.values():
            for parts, _ in loose:
                self._skipped.add(parts, "in no class folder")
        self._skip_outside(train, classes)
        return [*self._in_classes[train], *(placed for images in test.values() for placed in images)]

    def _one_of(self, split: str, names: set[str]) -> str | None:
        if len(names) > 1:
            _refuse(self._source, sorted(names), f"are both for the {split} split: leave one of them there")
        return next(iter(names), None)

    def _with_labels(self, name: str, classes: set[str]) -> Placed:
        """The images of a test split with their labels; none if these are not known."""
        placed = self._in_classes[name]
        found = {label for _, label, _, _ in placed}
        text = self._texts.get((*self._root, name, _ANNOTATIONS))
        if text and not found & classes:
            truth = dict(line.split("\t")[:2] for line in text.read().decode().splitlines() if "\t" in line)
            everything = [(parts, file) for _, _, parts, file in placed] + self._loose.pop(name, [])
            placed = [("test", truth[parts[-1]], parts, file) for parts, file in everything if parts[-1] in truth]
            for parts, _ in everything:
                if parts[-1] not in truth:
                    self._skipped.add(parts, f"not in {_ANNOTATIONS}")
            found = {label for _, label, _, _ in placed}
        elif not found & classes:
            return []
        if unknown := sorted(found - classes):
            raise ValueError(
                f"{self._source}: {name}/ has {len(unknown)} classes without training images, the first is {unknown[0]}"
            )
        return placed

    def _skip_outside(self, train: str, classes: set[str]) -> None:
        for parts, _ in self._outside:
            if any(unicodedata.normalize("NFC", part) in classes for part in parts[:-1]):
                _refuse(
                    self._source,
                    ["/".join(parts[:-1])],
                    f"has the name of a class, but is not in {train}/ or another split: rename it or move it away",
                )
            self._skipped.add(parts, "in no split")


def _common_root(folders: set[Parts]) -> Parts:
    """The folder that an archive often has around everything, as "cifar10" of "cifar10/dog"; folders: the innermost."""
    root: Parts = ()
    while True:
        heads = {folder[len(root)] for folder in folders if len(folder) > len(root)}
        if len(heads) != 1 or any(len(folder) <= len(root) + 1 for folder in folders):
            return root
        root += (heads.pop(),)


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()
