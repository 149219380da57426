"""python -m pipelines.inspect PATH [key=value ...]: what is in a data set: counts, sizes, and a sheet of its images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from . import cli
from .indexed import decode
from .order import permutation
from .reader import Files, SampleError
from .shards import Dataset, Split, open_dataset


@dataclass(frozen=True)
class Options:
    """What `pipelines.inspect` takes as key=value."""

    split: str = "train"
    """Of the contact sheet."""
    sheet: str = ""
    """PNG file to draw a contact sheet into; none if empty."""
    images: int = 64
    """On the sheet, chosen at random."""
    side: int = 128
    """Of an image on the sheet, in pixels."""
    seed: int = 0


def describe(dataset: Dataset) -> str:
    """Counts per class and, per split, shards, bytes, and the range of image sizes; a table as text."""
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
    chosen = permutation(len(split), seed, 0)[:images].tolist()
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


def main(arguments: list[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise ValueError("usage: python -m pipelines.inspect PATH [sheet=FILE.png split=train images=64 side=128]")
    options = cli.parse(Options, arguments[1:])
    dataset = open_dataset(arguments[0])
    print(describe(dataset))
    if options.sheet:
        if options.split not in dataset.splits:
            raise ValueError(f"split must be one of {', '.join(dataset.splits)}, got {options.split}")
        if options.images < 1 or options.side < 1:
            raise ValueError(f"images and side must be at least 1, got {options.images} and {options.side}")
        sheet = contact_sheet(dataset.splits[options.split], options.images, options.side, options.seed)
        sheet.save(Path(options.sheet), "PNG")
        print(f"contact sheet of {options.split}: {options.sheet}")


if __name__ == "__main__":
    cli.run("pipelines.inspect", main)
