"""What a rank needs before its first local batch: time and memory of the order of an epoch and of the index.

    python benchmarks/scale.py
    python benchmarks/scale.py samples=1000000000 before=false

A row is a process of its own: the time, and the most memory above what it had when everything was imported. "sorted" is
the order as it was up to 0.1: the positions sorted by a random word. The index is that of a synthetic data set, shards
without content and an index file of 28 bytes a sample, in `folder`; "hashed and mapped" is what the first process of a
machine does, "mapped" every other one. Both have opened the data set and read labels and places of the first local
batch. The index as it was up to 0.1 was hashed, checked and converted whole in every process.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pipelines import Sampler, open_dataset
from pipelines.format.dataset import FORMAT_VERSION, INDEX, INDEX_DTYPE, MANIFEST, index_digest
from pipelines.options import load
from pipelines.random_streams import Stream, philox

_CLASSES = 1000
_SAMPLE_BYTES = 2048


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    samples: int = 100_000_000
    ranks: int = 1024
    local_batch: int = 96
    shard_size: int = 10_000
    index: bool = True
    """Measure the index as well; it takes 28 bytes a sample in `folder`."""
    before: bool = True
    """Measure order and index as they were in 0.1; they take up to 33 bytes a sample of memory."""
    folder: str = ""
    """Empty: a temporary folder."""


def write_data_set(root: Path, samples: int, shard_size: int) -> None:
    """A prepared data set of that many samples of which only manifest and index have content."""
    folder = root / "train"
    folder.mkdir(parents=True)
    shards, digest = [], hashlib.sha256()
    with (folder / INDEX).open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(INDEX_DTYPE), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        for number, first in enumerate(range(0, samples, shard_size)):
            rows = np.zeros(min(shard_size, samples - first), INDEX_DTYPE)
            rows["offset"] = 512 + _SAMPLE_BYTES * np.arange(len(rows))
            rows["size"], rows["shard"], rows["height"], rows["width"] = 1024, number, 128, 128
            rows["label"] = np.arange(first, first + len(rows)) % _CLASSES
            file.write(rows.tobytes())
            digest.update(rows.tobytes())
            name, size = f"{number:06d}.tar", _SAMPLE_BYTES * len(rows) + 1024
            (folder / name).touch()
            os.truncate(folder / name, size)
            shards.append({"name": name, "samples": len(rows), "bytes": size, "sha256": "0" * 64})
    split = {"samples": samples, "index_sha256": digest.hexdigest(), "shards": shards}
    classes = [str(label) for label in range(_CLASSES)]
    manifest = {"format": FORMAT_VERSION, "classes": classes, "mean": [0.5] * 3, "std": [0.25] * 3}
    (root / MANIFEST).write_text(json.dumps({**manifest, "splits": {"train": split}}))


def sorted_order(settings: Settings, _: str) -> None:
    """The order of an epoch as it was."""
    np.argsort(philox(Stream.SAMPLE, 0, 0).random_raw(settings.samples), kind="stable")[: settings.local_batch]


def full(settings: Settings, _: str) -> None:
    """The first local batch with shuffle="full"."""
    _sampler(settings).local_batch(0, 0, settings.ranks - 1, settings.ranks)


def window(settings: Settings, _: str) -> None:
    """The first local batch with shuffle="window"."""
    whole, rest = divmod(settings.samples, settings.shard_size)
    sizes = np.array([settings.shard_size] * whole + [rest] * bool(rest))
    global_batch = settings.local_batch * settings.ranks
    sampler = Sampler(settings.samples, global_batch, seed=0, shuffle="window", shard_sizes=sizes)
    sampler.local_batch(0, 0, settings.ranks - 1, settings.ranks)


def whole_index(settings: Settings, root: str) -> None:
    """The index as it was opened."""
    index = np.asarray(np.load(Path(root) / "train" / INDEX, mmap_mode="r", allow_pickle=False))
    index_digest(index)
    ends = np.full(len(index) // settings.shard_size + 1, settings.shard_size * _SAMPLE_BYTES + 1024)[index["shard"]]
    assert not ((index["offset"] < 512) | (index["size"] < 0) | (index["offset"] + index["size"] > ends)).any()
    assert 0 <= index["label"].min() <= index["label"].max() < _CLASSES
    assert (index["height"] == 128).all()
    assert (index["width"] == 128).all()
    samples = _sampler(settings).local_batch(0, 0, 0, settings.ranks).samples
    index["label"].astype(np.int64)[samples], index[samples]


def mapped_index(settings: Settings, root: str) -> None:
    """The data set opened, and all that a loader needs of the first local batch."""
    split = open_dataset(root).splits["train"]
    samples = _sampler(settings).local_batch(0, 0, settings.ranks - 1, settings.ranks).samples
    split.labels[samples].astype(np.int64), split.index[samples]


def _sampler(settings: Settings) -> Sampler:
    return Sampler(settings.samples, settings.local_batch * settings.ranks, seed=0)


def measured(work: Callable[[Settings, str], None], settings: Settings, root: str) -> tuple[float, float]:
    """Seconds, and megabytes above those at the start, at most; in a process that does nothing else."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = _memory("VmRSS"), time.perf_counter()
    work(settings, root)
    return time.perf_counter() - began, (_memory("VmHWM") - before) / 1e6


def _memory(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[field].split()[0])


def main(settings: Settings) -> None:
    """Print the table."""
    rows: list[tuple[str, Callable[[Settings, str], None]]] = []
    rows += [("order, sorted (0.1)", sorted_order)] * settings.before
    rows += [("order, shuffle=full", full), ("order, shuffle=window", window)]
    if settings.index:
        rows += [("index, whole (0.1)", whole_index)] * settings.before
        rows += [("index, hashed and mapped", mapped_index), ("index, mapped", mapped_index)]
    print(f"{settings.samples:,} samples, {settings.ranks} ranks, local batches of {settings.local_batch}\n")
    print("| until the first local batch | seconds | MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory(dir=settings.folder or None) as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        root = Path(folder) / "data"
        if settings.index:
            write_data_set(root, settings.samples, settings.shard_size)
        for name, work in rows:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                seconds, megabytes = pool.submit(measured, work, settings, os.fspath(root)).result()
            print(f"| {name} | {seconds:.3f} | {megabytes:.1f} |", flush=True)


if __name__ == "__main__":
    try:
        main(load(Settings, None, sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"scale: {error}")
