"""python -m pipelines.verify PATH [processes=N]: reads a data set whole; every shard hashed, every sample decoded.

Prints a line a fault and a closing line. Exit code 0: all in order; 1: faults were found; 2: it cannot be opened.
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

from . import cli
from .indexed import decode
from .reader import Files, SampleError
from .shards import MANIFEST, Split, members, open_dataset


@dataclass(frozen=True)
class Options:
    """What `pipelines.verify` takes as key=value."""

    processes: int = 0
    """0: one a core."""


def verify(path: Path, processes: int = 0) -> Iterator[str]:
    """The faults of the data set at `path`, shard by shard; ValueError if it cannot even be opened."""
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
    """SHA-256 of each shard by (split, name); empty for shards of others, which have no manifest."""
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
            faults.append(f"{split.where(sample)} is {image.shape[0]} x {image.shape[1]}, its index says {sides}")
    return faults


def main(arguments: list[str]) -> None:
    if not arguments or "=" in arguments[0]:
        raise ValueError("usage: python -m pipelines.verify PATH [processes=N]")
    path = Path(arguments[0])
    options = cli.parse(Options, arguments[1:])
    faults = 0
    for fault in verify(path, options.processes):
        faults += 1
        print(fault)
    if faults:
        print(f"{path}: {faults} faults")
        sys.exit(1)
    splits = open_dataset(path).splits.values()
    shards = sum(len(split.shards) for split in splits)
    print(f"{path}: {sum(map(len, splits))} samples in {shards} shards, all in order")


if __name__ == "__main__":
    cli.run("pipelines.verify", main)
