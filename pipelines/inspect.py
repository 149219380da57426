"""Show what is in a data set: counts, sizes, and a contact sheet of its images.

    infomcr inspect PATH [sheet=FILE.png] [key=value ...]

Exit code 0: shown; 2: PATH cannot be opened, or a mistake in the arguments, in one line.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .command import INSPECT
from .format import Dataset, Split, open_dataset
from .loaders.decode import decode
from .loaders.reader import Files, SampleError
from .options import load
from .random_streams import Stream, permutation


@dataclass(frozen=True)
class Options:
    """The contact sheet."""

    split: str = "train"
    """Split of the contact sheet."""
    sheet: str = ""
    """PNG file of the contact sheet; empty: none."""
    images: int = 64
    """Number of images on the sheet, drawn with the seed."""
    side: int = 128
    """Side of an image on the sheet, in pixels."""
    seed: int = 0
    """Seed of the images on the sheet."""

    def __post_init__(self) -> None:
        if self.images < 1 or self.side < 1:
            raise ValueError(f"images and side must be at least 1, got {self.images} and {self.side}")


def describe(dataset: Dataset) -> str:
    """A text with the counts per class and, per split, shards, bytes and the range of image sizes."""
    names = list(dataset.splits)
    lines = [f"{dataset.path}: {len(dataset.classes)} classes, fingerprint {dataset.fingerprint[:12]}"]
    for name, split in dataset.splits.items():
        size = sum(shard.bytes for shard in split.shards) / 1e6
        lines.append(f"{name}: {len(split)} samples in {len(split.shards)} shards, {size:.1f} MB")
        for what, values in (("height", split.index["height"]), ("width", split.index["width"])):
            lines.append(f"  {what} {_spread(values)} pixels")
        lines.append(f"  stored {_spread(split.index['size'])} bytes an image")
    mean, std = (" ".join(f"{value:.4f}" for value in values) for values in (dataset.mean, dataset.std))
    lines.append(f"mean {mean}, std {std} (red green blue, of 0..1)")
    counts = [np.bincount(split.labels, minlength=len(dataset.classes)) for split in dataset.splits.values()]
    width = max(len(name) for name in [*dataset.classes, "class"])
    lines.append("".join([f"{'class':<{width}}", *(f"{name:>9}" for name in names)]))
    for label, name in enumerate(dataset.classes):
        lines.append("".join([f"{name:<{width}}", *(f"{count[label]:>9}" for count in counts)]))
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, (0, 50, 100)).astype(int)
    return f"{low}" if low == high else f"{low} .. {middle} .. {high} (least, median, most)"


def contact_sheet(split: Split, images: int, side: int, seed: int = 0) -> Image.Image:
    """A square sheet of randomly chosen images, each fitted into side x side; what cannot be decoded is red."""
    chosen = permutation(Stream.INSPECT, len(split), seed)[:images].tolist()
    columns = int(np.ceil(np.sqrt(len(chosen))))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    files = Files(split, threads=1)
    for place, sample in enumerate(chosen):
        try:
            image = Image.fromarray(decode(files.read(sample)))
            scale = side / max(image.size)
            image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
        except SampleError:
            image = Image.new("RGB", (side, side), "red")
        sheet.paste(image, (place % columns * side, place // columns * side))
    return sheet


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    return INSPECT.run(arguments, _main)


def _main(paths: list[str], overrides: list[str]) -> int:
    options = load(Options, None, overrides)
    dataset = open_dataset(paths[0])
    print(describe(dataset))
    if options.sheet:
        if options.split not in dataset.splits:
            raise ValueError(f"split must be one of {', '.join(dataset.splits)}, got {options.split}")
        sheet = contact_sheet(dataset.splits[options.split], options.images, options.side, options.seed)
        sheet.save(Path(options.sheet), "PNG")
        print(f"contact sheet of {options.split}: {options.sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
