"""Check a data set: hash every shard, decode every sample.

    infomcr verify PATH [processes=N]

Prints one line per fault and a closing line. Exit code 0: no faults; 1: faults were found; 2: PATH cannot be opened, or
a mistake in the arguments, in one line.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .command import VERIFY
from .format import Split, open_dataset
from .format.dataset import MANIFEST
from .format.tar import members
from .loaders.decode import decode
from .loaders.reader import Files, SampleError
from .options import load


@dataclass(frozen=True)
class Options:
    """How a data set is checked."""

    processes: int = 0
    """Number of processes; 0: one per core."""


def verify(path: Path, processes: int = 0) -> Iterator[str]:
    """The faults of the data set at `path`, shard by shard; ValueError if it cannot be opened."""
    dataset = open_dataset(path)
    digests = _digests(path)
    tasks = [
        (_one_shard(split, number), digests.get((split.name, shard.path.name)))
        for split in dataset.splits.values()
        for number, shard in enumerate(split.shards)
    ]
    workers = min(processes or len(os.sched_getaffinity(0)), len(tasks))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for faults in tqdm(pool.map(_faults, tasks), "verify", len(tasks), unit="shard", disable=None):
            yield from faults


def _digests(path: Path) -> dict[tuple[str, str], str]:
    """SHA-256 of each shard by (split, name); empty for external shards, which have no manifest."""
    if not (path / MANIFEST).exists():
        return {}
    splits = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["splits"]
    return {(name, shard["name"]): shard["sha256"] for name, split in splits.items() for shard in split["shards"]}


def _one_shard(split: Split, number: int) -> Split:
    ids = np.flatnonzero(split.index["shard"] == number)
    index = split.index[ids].copy()
    index["shard"] = 0
    return Split(split.name, (split.shards[number],), index)


def _faults(task: tuple[Split, str | None]) -> list[str]:
    split, expected = task
    shard = split.shards[0]
    faults: list[str] = []
    try:
        with shard.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if expected and digest != expected:
            faults.append(f"{shard.path}: its SHA-256 is not the one in {MANIFEST}")
        for _ in members(shard.path):
            pass
    except (ValueError, OSError) as error:
        faults.append(str(error))
    files = Files(split, threads=1)
    for sample in range(len(split)):
        try:
            image = decode(files.read(sample))
        except SampleError as error:
            where = split.where(sample)
            faults.append(str(error) if where in str(error) else f"cannot decode {where}: {error}")
            continue
        except ValueError as error:  # the shard as a whole
            faults.append(str(error))
            break
        sides = split.index["height"][sample], split.index["width"][sample]
        if image.shape[:2] != sides:
            faults.append(f"{split.where(sample)} is {image.shape[0]} x {image.shape[1]}, {sides} in its index")
    return faults


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    return VERIFY.run(arguments, _main)


def _main(paths: list[str], overrides: list[str]) -> int:
    path, options = Path(paths[0]), load(Options, None, overrides)
    faults = 0
    for fault in verify(path, options.processes):
        faults += 1
        print(fault)
    if faults:
        print(f"{path}: {faults} faults")
        return 1
    splits = open_dataset(path).splits.values()
    shards = sum(len(split.shards) for split in splits)
    print(f"{path}: {sum(map(len, splits))} samples in {shards} shards, all in order")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
