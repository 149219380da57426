"""launch/slurm.sbatch as Slurm would run it: two nodes, both this machine; Slurm's own program is a stub."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infomcr_dist import checkpoint

SCRIPT = Path(__file__).parent.parent / "launch" / "slurm.sbatch"
RECIPE = """
model: resnet20
epochs: 24
data: {path: DATA, global_batch_size: 60}
schedule: {milestones: [12]}
regularizer: {sub_batch_size: 10}
metric: {trials: 0}
telemetry: {port: null}
threads: 1
"""
STEPS = 5  # an epoch: 260 images in global batches of 60, the last one of 20
SCONTROL = """#!/bin/sh
[ "$1" = show ] && [ "$2" = hostnames ] && [ "$3" = "node[1-2]" ] && printf 'localhost\\n127.0.0.1\\n' && exit
echo "$@" >>requests
"""


@pytest.fixture
def project(tmp_path: Path, small_data: Path) -> Path:
    """The directory that sbatch is run in."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "scontrol").write_text(SCONTROL)
    (tmp_path / "slurm" / "scontrol").chmod(0o755)
    (tmp_path / "requests").touch()
    return tmp_path


def submit(project: Path, *settings: str) -> subprocess.Popen[str]:
    """Run the script as the node would that Slurm starts it on."""
    variables = {
        "PATH": f"{project / 'slurm'}:{os.environ['PATH']}",
        "PYTHONPATH": str(SCRIPT.parent.parent),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), "recipe.yaml", "run_dir=run", *settings],
        cwd=project, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def steps(project: Path) -> list[int]:
    try:
        lines = (project / "run" / "records.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "step"]


def requested(project: Path) -> list[str]:
    """What Slurm was asked for since the last call."""
    lines = (project / "requests").read_text().splitlines()
    (project / "requests").write_text("")
    return lines


def test_a_job_is_saved_and_queued_again_at_its_time_limit_alone(project: Path) -> None:
    # A node is shut down, then the time is over, then it finishes.
    for number, code, requests in ((signal.SIGTERM, 75, []), (signal.SIGUSR1, 0, ["requeue 7"]), (None, 0, [])):
        done = len(steps(project))
        with submit(project) as job:
            if number is not None:
                while job.poll() is None and len(steps(project)) < done + 4:
                    time.sleep(0.05)
                job.send_signal(number)
            output, _ = job.communicate(timeout=120)
        assert job.returncode == code, output
        assert checkpoint.load_newest(project / "run", pytest.fail)[1]["step"] == steps(project)[-1], output
        assert requested(project) == requests, output
    assert steps(project) == list(range(1, 24 * STEPS + 1))


def test_a_wrong_setting_fails_the_job(project: Path) -> None:
    with submit(project, "optimizer.momentum=2") as job:
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 2, output
    assert "optimizer.momentum" in output
    assert requested(project) == []
