import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import make_data_set

from pipelines.verify import _by_shard, verify


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.verify", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])


def test_the_samples_of_each_shard_are_in_a_row(tmp_path: Path) -> None:
    split = make_data_set(tmp_path).splits["train"]
    found = [len(shard) for shard in _by_shard(split)]
    assert found == [shard.samples for shard in split.shards]
    with pytest.raises(ValueError, match=r"000000\.tar is not in the order of the shards"):
        list(_by_shard(replace(split, index=split.index[::-1])))


def test_all_in_order(tmp_path: Path) -> None:
    dataset = make_data_set(tmp_path)
    result = run(dataset.path, "processes=2")
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{dataset.path}: 36 samples in 6 shards, all in order\n"


def test_every_fault_is_found(tmp_path: Path) -> None:
    dataset = make_data_set(tmp_path)
    split = dataset.splits["train"]
    for sample, (start, data) in {3: (0, bytes(300)), 10: (-512, bytes(512)), 17: (5, b"")}.items():
        entry = split.index[sample]
        with split.shards[entry["shard"]].path.open("r+b") as file:
            file.seek(int(entry["offset"]) + start)
            file.write(data)
    faults = list(verify(dataset.path, processes=2))
    assert sum("000000.tar, sample 3 at byte" in fault and "cannot decode" in fault for fault in faults) == 1, faults
    assert sum("000001.tar, sample 3 at byte" in fault and "disagree" in fault for fault in faults) == 1, faults
    assert sum("SHA-256 is not" in fault for fault in faults) == 2
    assert sum("000002.tar" in fault for fault in faults) == 0


def test_exit_codes(tmp_path: Path) -> None:
    dataset = make_data_set(tmp_path)
    shard = dataset.splits["test"].shards[0].path
    data = bytearray(shard.read_bytes())
    data[-3000] ^= 255
    shard.write_bytes(data)
    result = run(dataset.path)
    assert result.returncode == 1
    assert f"{shard}: its SHA-256 is not the one in manifest.json" in result.stdout
    os.truncate(shard, 600)
    result = run(dataset.path)
    assert result.returncode == 2
    assert "truncated or replaced" in result.stderr
    assert run().returncode == 2
