"""Check a data set: hash every shard, decode every sample with every backend that is installed.

    infomcr verify PATH [processes=N]

Prints one line per fault and a closing line. Exit code 0: no faults; 1: faults were found; 2: PATH cannot be opened, or
a mistake in the arguments, in one line.
"""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from loky import ProcessPoolExecutor
from numpy.typing import NDArray
from tqdm import tqdm

from .command import VERIFY
from .cores import available_cores
from .format import Split, open_dataset
from .format.dataset import MANIFEST
from .format.external import index_shard
from .format.tar import members
from .loaders.decode import decode
from .loaders.reader import Files, SampleError, plain
from .options import load
from .pools import begin_worker

_ROUNDING = 2  # levels by which decoders of the same picture may differ


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
        (shard, digests.get((shard.name, shard.shards[0].path.name)))
        for split in dataset.splits.values()
        for shard in _by_shard(split)
    ]
    workers = min(processes or available_cores(), len(tasks))
    with ProcessPoolExecutor(workers, initializer=begin_worker, initargs=(os.getpid(),)) as pool:
        for faults in tqdm(pool.map(_faults, tasks), "verify", len(tasks), unit="shard", disable=None):
            yield from faults


def _digests(path: Path) -> dict[tuple[str, str], str]:
    """SHA-256 of each shard by (split, name); empty for external shards, which have no manifest."""
    if not (path / MANIFEST).exists():
        return {}
    splits = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["splits"]
    return {(name, shard["name"]): shard["sha256"] for name, split in splits.items() for shard in split["shards"]}


def _by_shard(split: Split) -> Iterator[Split]:
    """A split of each shard, whose samples are in a row."""
    first = 0
    for number, shard in enumerate(split.shards):
        index = split.index[first : first + shard.samples].copy()
        if (index["shard"] != number).any():
            raise ValueError(f"the index of {shard.path} is not in the order of the shards: prepare the data set again")
        index["shard"] = 0
        yield Split(split.name, (shard,), index)
        first += shard.samples


def _faults(task: tuple[Split, str | None]) -> list[str]:
    split, expected = task
    shard = split.shards[0]
    faults: list[str] = []
    try:
        with shard.path.open("rb") as file:
            if expected and hashlib.file_digest(file, "sha256").hexdigest() != expected:
                faults.append(f"{shard.path}: its SHA-256 is not the one in {MANIFEST}")
            members(file, str(shard.path))
        if expected is None and not np.array_equal(index_shard(shard.path)[0], split.index):
            faults.append(f"{shard.path}: its samples are not those of its index; remove that from XDG_CACHE_HOME")
    except (ValueError, OSError) as error:
        faults.append(str(error))
    files, dali = Files(split, threads=1), DaliDecoder() if _has_dali() else None
    for sample in range(len(split)):
        where = split.where(sample)
        try:
            encoded = files.read(sample)
            image = decode(encoded)
        except SampleError as error:
            faults.append(str(error) if where in str(error) else f"cannot decode {where}: {error}")
            continue
        except ValueError as error:  # the shard as a whole
            faults.append(str(error))
            break
        sides = split.index["height"][sample], split.index["width"][sample]
        if image.shape[:2] != sides:
            faults.append(f"{where} is {image.shape[0]} x {image.shape[1]}, {sides} in its index")
        elif dali is not None:
            try:
                other = dali.decode(plain(encoded))
            except SampleError as error:
                faults.append(f"cannot decode {where} with the backend dali: {error}")
                continue
            if other.shape != image.shape or np.abs(other - image.astype(np.int16)).max() > _ROUNDING:
                faults.append(f"{where}: the backends dali and torch decode different pixels")
    return faults


def _has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class DaliDecoder:
    """Decodes single images on the CPU as the backend dali does."""

    def __init__(self) -> None:
        self._pipeline: Any = None

    def decode(self, encoded: bytes) -> NDArray[np.uint8]:
        """RGB pixels (H, W, 3) of what `plain` returns; SampleError if it cannot be decoded."""
        self._pipeline = self._pipeline or self._build()
        try:
            self._pipeline.feed_input("encoded", [np.frombuffer(encoded, np.uint8)])
            (images,) = self._pipeline.run()
            return np.array(images.at(0))
        except RuntimeError:
            self._pipeline = None  # after an error it is of no more use
            raise SampleError("truncated, damaged, or no image") from None

    @staticmethod
    def _build() -> Any:
        import nvidia.dali.types
        from nvidia.dali import fn, pipeline

        types: Any = nvidia.dali.types  # its members are made at import, unseen by type checkers
        made = pipeline.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
        with made:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, batch=True)
            made.set_outputs(fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False))
        made.build()
        return made


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
    untried = "" if _has_dali() else "; DALI is not installed, and was not tried"
    print(f"{path}: {sum(map(len, splits))} samples in {shards} shards, all in order{untried}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
