"""Cores are counted by what the process may use, not by what the machine has."""

import os
from pathlib import Path

import pytest

from pipelines.cores import available_cores

V2 = {"proc/self/cgroup": "0::/jobs/mine\n"}
V1 = {"proc/self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/jobs/mine\n0::/other\n"}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 64),
        (V2, 64),
        (V2 | {"sys/fs/cgroup/jobs/mine/cpu.max": "max 100000\n"}, 64),
        (V2 | {"sys/fs/cgroup/jobs/mine/cpu.max": "400000 100000\n"}, 4),
        (V2 | {"sys/fs/cgroup/jobs/mine/cpu.max": "50000 100000\n"}, 1),
        (V2 | {"sys/fs/cgroup/jobs/mine/cpu.max": "250000 100000\n"}, 3),
        (V2 | {"sys/fs/cgroup/jobs/mine/cpu.max": "max 100000", "sys/fs/cgroup/jobs/cpu.max": "800000 100000"}, 8),
        (V2 | {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        (V2 | {"sys/fs/cgroup/jobs/mine/cpu.max": "not a limit"}, 64),
        (V2 | {"sys/fs/cgroup/jobs/mine/cpu.max": "9900000 100000"}, 64),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/jobs/mine/cpu.cfs_quota_us": "600000\n",
                "sys/fs/cgroup/cpu,cpuacct/jobs/mine/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            64,
        ),
    ],
)
def test_cores(files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cores(tmp_path) == cores
