"""Which world a process is in, by how it was started, and what a world does with errors."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from infomcr_dist.engines import Engine, connect, launched_rank
from infomcr_dist.world import SingleProcess, UserError

VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK", "SLURM_NTASKS",
             "SLURM_PROCID", "SLURM_STEP_ID", "ENVIRONMENT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR",
             "MASTER_PORT")  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "a launcher without MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "16", "RANK": "7", "MASTER_ADDR": "node1"}, "a launcher without MASTER_ADDR and MASTER_PORT"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}, "srun"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "ENVIRONMENT": "BATCH"}, "srun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpirun"),
    ],
)
def test_independent_processes_of_another_launcher_are_refused(
    environment: dict[str, str], launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    size = next(iter(environment.values()))
    with pytest.raises(UserError, match=rf"{launcher} \(\w+={size}\) .*horovodrun -np {size} or torchrun") as refused:
        connect()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": ""},
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},  # the batch script, not one of its tasks
    ],
)
def test_a_single_process_is_rank_0_of_1(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    world = connect()
    assert isinstance(world, SingleProcess)
    assert (world.rank, world.size) == (0, 1)


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (("WORLD_SIZE", "RANK"), "doctor"),
        (("SLURM_NTASKS", "SLURM_PROCID"), "measure"),
        (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), "train"),
    ],
)
def test_the_commands_exit_with_2_and_one_line_of_rank_0(names: tuple[str, str], command: str, tmp_path: Path) -> None:
    for rank in ("0", "1"):
        variables = [f"{name}={value}" for name, value in zip(names, ("2", rank), strict=True)]
        done = subprocess.run(
            ["env", *variables, sys.executable, "-m", f"infomcr_dist.{command}", "run"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        lines = done.stderr.strip().splitlines()
        assert len(lines) == (1 if rank == "0" else 0), done.stderr
        assert all(line.startswith("error: ") and "horovodrun -np 2" in line for line in lines)
    assert not list(tmp_path.iterdir())


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
HOROVOD = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "engine", "message"),
    [
        (TORCHRUN | HOROVOD, "auto", "has the variables of Horovod .* and those of torchrun .*: give engine=horovod"),
        (TORCHRUN | {"OMPI_COMM_WORLD_RANK": "1"}, "auto", "give engine=horovod or engine=torch"),
        (HOROVOD, "torch", "engine=torch, but its launcher did not start this process: torchrun"),
        (TORCHRUN, "horovod", "engine=horovod, but its launcher did not start this process: horovodrun"),
        ({}, "torch", "engine=torch, but its launcher"),
        ({}, "horovod", "engine=horovod, but its launcher"),
        (TORCHRUN | {"RANK": "one"}, "auto", "RANK in the environment must be a number, got 'one'"),
        (TORCHRUN | {"LOCAL_RANK": ""}, "auto", "LOCAL_RANK in the environment must be a number, got ''"),
        (TORCHRUN | HOROVOD | {"WORLD_SIZE": "-2"}, "torch", "WORLD_SIZE in the environment must be a number"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "auto", "MASTER_PORT in the environment must be a number, got 'x'"),
    ],
)
def test_an_engine_that_does_not_fit_how_the_process_was_started_is_refused(
    environment: dict[str, str], engine: Engine, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as refused:
        connect(engine=engine)
    assert "\n" not in str(refused.value)
    assert refused.value.everywhere


def test_workers_that_do_not_meet_report_it_in_one_line(tmp_path: Path) -> None:
    """Rank 0 cannot open the port at which the others would find it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        found = {"RANK": "0", "MASTER_PORT": str(other.getsockname()[1])}
        variables = [f"{name}={value}" for name, value in (TORCHRUN | found).items()]
        command = ["env", *variables, sys.executable, "-m", "infomcr_dist.train", "demo"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"error: rank 0 did not find the other workers at 127.0.0.1:{found['MASTER_PORT']}: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"RANK": "3"}, 3),
        ({"HOROVOD_RANK": "2", "RANK": "3"}, 2),
        ({"OMPI_COMM_WORLD_RANK": "1"}, 1),
        ({"RANK": "one"}, 0),
    ],
)
def test_the_rank_before_a_process_connects(environment: dict[str, str], rank: int) -> None:
    assert launched_rank(environment) == rank


@pytest.mark.parametrize("command", ["train", "measure", "doctor.__main__"])
def test_a_single_process_needs_no_engine(command: str) -> None:
    """The doctor looks at what torch.distributed was built with."""
    program = f"""
import sys
sys.modules["horovod"] = None
if {command!r} != "doctor.__main__":
    sys.modules["infomcr_dist.engines.torch_distributed"] = None
import infomcr_dist.{command}
from infomcr_dist.engines import connect
assert connect().engine == "none"
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_missing_horovod_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "infomcr_dist.engines.horovod", raising=False)
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    monkeypatch.setenv("HOROVOD_RANK", "0")
    with pytest.raises(UserError, match=r"Horovod is not installed: build it with make setup, or .* torchrun"):
        connect()


def test_a_user_s_mistake_becomes_one_error_and_a_bug_stays_itself() -> None:
    world = SingleProcess()
    for mistake in (ValueError("data.path is wrong"), OSError("no room")):
        with pytest.raises(UserError, match=str(mistake)) as error, world.synchronize_errors():
            raise mistake
        assert error.value.everywhere
    with pytest.raises(KeyError), world.synchronize_errors():
        raise KeyError("a bug")
