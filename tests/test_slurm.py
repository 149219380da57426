"""launch/slurm.sbatch on two nodes, both this machine, with a stub for Slurm; and in a Slurm of one node."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import ENGINES, ROOT, WORKERS, needs_horovod

from benchmarks.chaos import free_ports
from infomcr_dist import checkpoint
from infomcr_dist.records import FILE, StepRecord, read_records

SCRIPT = ROOT / "launch" / "slurm.sbatch"
RECIPE = """
model: plain_net:build_slow
epochs: 20
data: {path: DATA, global_batch_size: 60}
schedule: {milestones: [10]}
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


SRUN = """#!/bin/bash
# Both nodes are this machine; a signal goes to all tasks.
while [[ $1 == --* ]]; do shift; done
trap 'kill -TERM "${tasks[@]}"' TERM
for node in 1 2; do "$@" & tasks+=($!); done
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; ended=$?; done
    ((ended == 0)) || code=$ended
done
exit "$code"
"""


@pytest.fixture
def project(tmp_path: Path, small_data: Path) -> Path:
    """The directory that sbatch is run in."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "scontrol").write_text(SCONTROL)
    (tmp_path / "slurm" / "scontrol").chmod(0o755)
    (tmp_path / "slurm" / "srun").write_text(SRUN)
    (tmp_path / "slurm" / "srun").chmod(0o755)
    (tmp_path / "requests").touch()
    return tmp_path


def submit(project: Path, *settings: str, engine: str = "horovod") -> subprocess.Popen[str]:
    """Run the script as the node would that Slurm starts it on."""
    variables = {
        "PATH": f"{project / 'slurm'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{WORKERS}:{ROOT}",
        "ENGINE": engine,
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
    path = project / "run" / FILE
    return [record.step for record in read_records(path, (StepRecord,))] if path.exists() else []


def worker(project: Path) -> int:
    """The process of one of Horovod's workers."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_text().split("\0")
            ours = words[1:2] and words[1].endswith("/infomcr") and (process / "cwd").readlink() == project
            if ours and "HOROVOD_RANK=" in (process / "environ").read_text():
                return int(process.name)
    raise AssertionError("no worker")


def requested(project: Path) -> list[str]:
    """What Slurm was asked for since the last call."""
    lines = (project / "requests").read_text().splitlines()
    (project / "requests").write_text("")
    return lines


# A node is shut down, then the time limit is near, then one worker is asked to stop, then it finishes.
LIVES = {
    "horovod": [
        (signal.SIGTERM, "job", 75, []),
        (signal.SIGUSR1, "job", 0, ["requeue 7"]),
        (signal.SIGTERM, "worker", 0, ["requeue 7"]),
        (None, "", 0, []),
    ],
    "torch": [
        (signal.SIGTERM, "job", 1, []),
        (signal.SIGUSR1, "job", 0, ["requeue 7"]),
        (None, "", 0, []),
    ],
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_job_that_was_saved_and_not_cancelled_is_queued_again(project: Path, engine: str) -> None:
    for number, target, code, requests in LIVES[engine]:
        done = len(steps(project))
        with submit(project, engine=engine) as job:
            if number is not None:
                while job.poll() is None and len(steps(project)) < done + 4:
                    time.sleep(0.05)
                os.kill(job.pid if target == "job" else worker(project), number)
            output, _ = job.communicate(timeout=120)
        assert job.returncode == code, output
        assert checkpoint.load_newest(project / "run", pytest.fail)[1]["step"] == steps(project)[-1], output
        assert requested(project) == requests, output
    assert steps(project) == list(range(1, 20 * STEPS + 1))


@needs_horovod
def test_a_wrong_setting_fails_the_job(project: Path) -> None:
    with submit(project, "optimizer.momentum=2") as job:
        output, _ = job.communicate(timeout=120)
    assert job.returncode == 2, output
    assert "optimizer.momentum" in output
    assert requested(project) == []


# A job that is queued again waits until its credential has expired: two minutes by default.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=HOST(127.0.0.1)
SlurmctldPort=PORT0
SlurmdPort=PORT1
SlurmUser=root
AuthInfo=socket=FOLDER/munge,cred_expire=5
StateSaveLocation=FOLDER/state
SlurmdSpoolDir=FOLDER/spool
SlurmctldPidFile=FOLDER/slurmctld.pid
SlurmdPidFile=FOLDER/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
NodeName=HOST NodeAddr=127.0.0.1 CPUs=2
PartitionName=all Nodes=HOST Default=YES
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of this machine."""
    for program, package in (("slurmctld",) * 2, ("slurmd",) * 2, ("sbatch", "slurm-client"), ("munged", "munge")):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian, Ubuntu: apt-get install {package})")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    with ExitStack() as stack:
        # munged takes a socket only where all users can reach it.
        folder = Path(stack.enter_context(TemporaryDirectory()))
        folder.chmod(0o755)
        conf = SLURM_CONF.replace("FOLDER", str(folder)).replace("HOST", socket.gethostname().partition(".")[0])
        for name in ("PORT0", "PORT1"):
            conf = conf.replace(name, str(free_ports()))
        (folder / "slurm.conf").write_text(conf)
        (folder / "spool").mkdir()
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        files = (f"--{what}-file={folder / what}" for what in ("key", "pid", "log", "seed"))
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder / 'munge'}", *files],
            ["slurmctld", "-D"],
            ["slurmd", "-D"],
        ):
            with (folder / f"{command[0]}.log").open("wb") as log:
                daemon = subprocess.Popen(command, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            if command[0] == "munged":
                wait_until(lambda: (folder / "munge").exists())
        wait_until(lambda: "idle" in ask("sinfo", "--noheader", "--format=%T"))
        yield


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.1)


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def state(job: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in ask("scontrol", "show", "job", job).split() if "=" in word)


@pytest.mark.ops
def test_slurm_itself_queues_the_job_again(project: Path, slurm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", f"{WORKERS}:{ROOT}")
    here = ["--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--output=output"]
    command = ["sbatch", *here, str(SCRIPT), "recipe.yaml", "run_dir=run"]

    job = ask(*command).strip()
    wait_until(lambda: len(steps(project)) > 3)
    ask("scancel", "--batch", "--signal=USR1", job)  # as at the time limit

    wait_until(lambda: state(job)["JobState"] == "COMPLETED")
    assert state(job)["Restarts"] == "1"
    assert steps(project) == list(range(1, 20 * STEPS + 1)), (project / "output").read_text()

    other = ask(*command, "epochs=400").strip()
    wait_until(lambda: len(steps(project)) > 20 * STEPS + 3)
    ask("scancel", other)
    wait_until(lambda: not ask("squeue", "--noheader"))
    assert (state(other)["JobState"], state(other)["Restarts"]) == ("CANCELLED", "0")
    assert checkpoint.load_newest(project / "run", pytest.fail)[1]["step"] == steps(project)[-1]
