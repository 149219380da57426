"""Images without labels as a split that a loader reads: files, those below folders, and the members of shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .dataset import INDEX_DTYPE, Shard, Split
from .folders import is_system, walk
from .image_header import sides
from .tar import BLOCK, header, members, padded

_IMAGES = frozenset((".jpg", ".jpeg", ".png"))


@dataclass(frozen=True)
class LooseImages:
    """Images in the order in which they were given.

    Attributes:
        split: all of them, with 0 for every label.
        names: the path of each, or of its shard and its name in there, SHARD:NAME.
    """

    split: Split
    names: list[str]


def open_images(paths: Sequence[Path], scratch: Path) -> LooseImages:
    """The images at `paths`.

    Args:
        paths: .jpg, .jpeg and .png files, .tar shards, and folders of both; other files in folders are passed over.
        scratch: an existing folder, in which the content of image files is kept side by side as long as it is read.

    Raises:
        ValueError: a path is missing or no image, or none holds one.
    """
    names: list[str] = []
    rows: list[tuple[int, int, int, int, int, int]] = []
    shards = [Path(scratch) / "images.tar"]

    def add(name: str, where: tuple[int, int, int], encoded: bytes) -> None:
        height, width = sides(encoded)
        if not height * width:
            raise ValueError(f"{name} has no size in its header: truncated, damaged, or no image")
        names.append(name)
        rows.append((*where, 0, height, width))

    with shards[0].open("wb") as own:
        for path in _files(paths):
            with path.open("rb") as file:
                if path.suffix.lower() != ".tar":
                    encoded = file.read()
                    own.write(header("image", len(encoded)))
                    add(str(path), (own.tell(), len(encoded), 0), encoded)
                    own.write(encoded.ljust(padded(len(encoded)), b"\0"))
                    continue
                shards.append(path)
                for member in members(file, str(path)):
                    if PurePosixPath(member.name).suffix.lower() in _IMAGES and not member.fault:
                        file.seek(member.offset)
                        where = (member.offset, member.size, len(shards) - 1)
                        add(f"{path}:{member.name}", where, file.read(member.size))
        own.write(bytes(2 * BLOCK))
    if not rows:
        raise ValueError(f"no .jpg, .jpeg or .png image in {', '.join(map(str, paths))}")
    index = np.array(rows, INDEX_DTYPE)
    counts = np.bincount(index["shard"], minlength=len(shards)).tolist()
    found = tuple(Shard(path, count, path.stat().st_size) for path, count in zip(shards, counts, strict=True))
    return LooseImages(Split("images", found, index), names)


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    known = (*sorted(_IMAGES), ".tar")
    for path in paths:
        if path.is_dir():
            for name in walk(path)[0]:
                file = path / name
                if file.suffix.lower() in known and not is_system(file.name):
                    yield file
        elif not path.exists():
            raise ValueError(f"{path} does not exist: give images, folders or .tar shards")
        elif path.suffix.lower() not in known:
            raise ValueError(f"{path} must end in one of {', '.join(known)}: convert it, or give another")
        else:
            yield path
