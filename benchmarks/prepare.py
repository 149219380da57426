"""Images per second of `pipelines.prepare` on ImageNet's archives, next to the bound of decode, resize and encode.

    python benchmarks/prepare.py
    python benchmarks/prepare.py mode=crop images=3000 processes=1 rounds=5

ILSVRC2012_img_train.tar, nested as published, is made of imagenet-sample-250.tar, repeated. A round prepares it once
(the whole command without the start of Python: listing the archives, starting processes, reading, hashing, writing to
the disk, syncing) and does the same images in a bare loop in as many processes, which run already and have the bytes in
memory: only Pillow's open, resize and save. The order is random within a round; the ratios compare the two of one
round, medians and, in brackets, quartiles over the rounds: of wall-clock time, and of the processor time of all
processes, which is the one to trust on a machine with other work.
"""

import io
import os
import random
import resource
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps

from pipelines.options import load as load_settings
from pipelines.prepare import Options, prepare


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    source: str = "../shared/data/imagenet-sample-250.tar"
    images: int = 10_000
    size: int = 128
    mode: Literal["squash", "crop"] = "squash"
    processes: int = 0
    """0: one per core."""
    rounds: int = 5


_encoded: list[bytes] = []  # of a process of the bound


def load(source: str) -> None:
    """Reads the images of a tar into memory."""
    with tarfile.open(source) as archive:
        for entry in archive:
            if entry.isreg():
                _encoded.append(archive.extractfile(entry).read())  # type: ignore[union-attr]


def bare(numbers: range, size: int, mode: str, quality: int) -> float:
    """Decode, resize and encode the images of these numbers; the processor seconds it took."""
    start = time.process_time()
    for number in numbers:
        image: Image.Image = Image.open(io.BytesIO(_encoded[number % len(_encoded)]))
        image = image if image.mode in ("RGB", "L") else image.convert("RGB")
        if mode == "crop":
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        else:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        image.save(io.BytesIO(), "JPEG", quality=quality)
    return time.process_time() - start


def make_archive(source: str, images: int, path: Path) -> None:
    """ILSVRC2012_img_train.tar with `images` images, a class for each folder of the source."""
    classes: dict[str, list[bytes]] = {}
    with tarfile.open(source) as archive:
        for entry in archive:
            if entry.isreg():
                folder = Path(entry.name).parent.name
                classes.setdefault(folder, []).append(archive.extractfile(entry).read())  # type: ignore[union-attr]
    with tarfile.open(path, "w") as outer:
        for row, (wnid, originals) in enumerate(sorted(classes.items())):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(row, images, len(classes)):
                    data = originals[number % len(originals)]
                    add(archive, f"{wnid}_{number}.JPEG", data)
            add(outer, f"{wnid}.tar", inner.getvalue())


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Appends a file."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


def main(settings: Settings) -> None:
    """Print the table."""
    processes = settings.processes or len(os.sched_getaffinity(0))
    options = Options(size=settings.size, mode=settings.mode, processes=processes)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, get_context("spawn"), load, (settings.source,)) as pool,
    ):
        source = Path(folder) / "ILSVRC2012"
        source.mkdir()
        make_archive(settings.source, settings.images, source / "ILSVRC2012_img_train.tar")
        runs = count()

        def whole() -> float:
            start = processor_seconds()
            prepare(str(source), Path(folder) / f"data{next(runs)}", options)
            return processor_seconds() - start

        def bound() -> float:
            shares = [range(start, settings.images, processes) for start in range(processes)]
            rest = settings.size, settings.mode, options.quality
            return sum(done.result() for done in [pool.submit(bare, share, *rest) for share in shares])

        calls: list[Callable[[], float]] = [whole, bound]
        for call in calls:  # once more, to warm up
            call()
        rounds = []
        for _ in range(settings.rounds):
            seconds = {}
            for call in random.sample(calls, len(calls)):
                start = time.perf_counter()
                processor = call()
                seconds[call] = time.perf_counter() - start, processor
            rounds.append([seconds[call] for call in calls])
    print(
        f"{settings.images} images to {settings.size} x {settings.size}, mode={settings.mode}, "
        f"processes: {processes}, {settings.rounds} rounds\n"
    )
    print("| | images/s | processor ms per image |\n|---|---|---|")
    for row, name in enumerate(("pipelines.prepare", "decode, resize, encode")):
        wall, processor = (statistics.median(times[row][clock] for times in rounds) for clock in (0, 1))
        print(f"| {name} | {settings.images / wall:.0f} | {1000 * processor / settings.images:.2f} |")
    print(f"| fraction of the bound | {ratio(rounds, 0)} | {ratio(rounds, 1)} |")


def ratio(rounds: list[list[tuple[float, float]]], clock: int) -> str:
    """The time of the bound relative to that of `prepare`."""
    low, middle, high = statistics.quantiles([least[clock] / ours[clock] for ours, least in rounds], n=4)
    return f"{middle:.1%} ({low:.1%}–{high:.1%})"


def processor_seconds() -> float:
    """Of this process and its children that have ended."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


if __name__ == "__main__":
    try:
        main(load_settings(Settings, None, sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"prepare: {error}")
