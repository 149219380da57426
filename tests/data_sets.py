"""Small data sets for the tests of pipelines."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import Dataset, open_dataset
from pipelines.prepare import Options, prepare

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data"


class Touch:
    """Pickled: whoever loads it makes the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self._path}",)


def shared(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return os.fspath(path)


def picture(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Smooth random uint8 (height, width, 3): JPEG keeps such images nearly as they are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(seed: int, height: int = 32, width: int = 32) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def make_folder(
    root: Path, per_class: int = 12, classes: tuple[str, ...] = ("cat", "dog", "owl"), **sides: int
) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            (root / name / f"{number}.jpg").write_bytes(jpeg(1000 * label + number, **sides))
    return root


def imagenet(factory: pytest.TempPathFactory) -> Path:
    """The sample of ImageNet at 128 x 128, made once a run."""
    dest = factory.getbasetemp() / "imagenet-128"
    prepare(shared("imagenet-sample-250.tar"), dest, Options(size=128, shard_size=100))
    return dest


def make_data_set(folder: Path, shard_size: int = 7, per_class: int = 12, size: int = 0, **sides: int) -> Dataset:
    make_folder(folder / "source", per_class, **sides)
    options = Options(size=size, shard_size=shard_size, processes=1, test_fraction=0.25)
    prepare(os.fspath(folder / "source"), folder / "data", options)
    return open_dataset(folder / "data")


def run_prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def stored(root: Path, split: str = "train") -> dict[str, tuple[bytes, int]]:
    """Original name -> (image bytes, label), read with tarfile alone."""
    found = {}
    for path in sorted((root / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
        for name, data in files.items():
            key, _, extension = name.partition(".")
            if extension in ("jpg", "png"):
                found[json.loads(files[f"{key}.json"])["name"]] = (data, int(files[f"{key}.cls"]))
    return found


def shard_files(root: Path) -> dict[str, bytes]:
    """All files of a data set but its manifest, which names the source."""
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
