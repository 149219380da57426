"""Which world a process is in, by how it was started, and what a world does with errors."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, needs_horovod

from benchmarks import hosts as network
from infomcr_dist.engines import Engine, connect, launched_rank
from infomcr_dist.own_address import check_own_name
from infomcr_dist.world import InUse, SingleProcess, UserError

VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK", "SLURM_NTASKS",
             "SLURM_PROCID", "SLURM_STEP_ID", "ENVIRONMENT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR",
             "MASTER_PORT", "HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE", "LOCAL_WORLD_SIZE")  # fmt: skip


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
        starts = "start the workers with (horovodrun -np 2 or )?torchrun"  # as Horovod is installed or not
        assert all(line.startswith("error: ") and re.search(starts, line) for line in lines)
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


ONE_HOST = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_SIZE": "2"}
SEVERAL = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_SIZE": "1"}


@pytest.mark.parametrize("environment", [ONE_HOST, SEVERAL, TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "nowhere, its own name, does not resolve (Name or service not known): add it to /etc/hosts"),
        ("192.0.2.1", "nowhere calls itself 192.0.2.1, which is not its address (errno 99): correct its /etc/hosts"),
    ],
)
def test_a_host_whose_own_name_leads_nowhere_is_refused(
    environment: dict[str, str], address: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_this_host(address, monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(f"rank 1: {message}")) as refused:
        connect()
    assert not refused.value.everywhere, "the rank that met it reports it"


@pytest.mark.parametrize("environment", [{}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}])
def test_the_name_of_a_single_process_s_host_does_not_matter(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call_this_host(None, monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert connect().size == 1


@pytest.mark.parametrize(
    ("environment", "address", "hint"),
    [
        (SEVERAL, "127.0.0.1", "nowhere calls itself 127.0.0.1; if the workers do not meet, that is the cause"),
        (ONE_HOST, "127.0.0.1", None),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2"}, None, None),  # torch's gloo takes the loopback address
    ],
)
def test_a_name_that_may_serve(
    environment: dict[str, str], address: str | None, hint: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call_this_host(address, monkeypatch)
    assert check_own_name(environment) == hint


def call_this_host(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name it "nowhere", which leads to an address, or nowhere."""
    look_up = socket.getaddrinfo

    def found(host: str, *arguments: Any, **more: Any) -> Any:
        if host == "nowhere" and address is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(address if host == "nowhere" else host, *arguments, **more)

    monkeypatch.setattr(socket, "gethostname", lambda: "nowhere")
    monkeypatch.setattr(socket, "getaddrinfo", found)


@needs_horovod
@pytest.mark.skipif(network.missing() is not None, reason=str(network.missing()))
def test_a_job_on_a_host_whose_own_name_leads_nowhere_ends_with_2(tmp_path: Path) -> None:
    horovodrun = str(Path(sys.executable).with_name("horovodrun"))
    job = [horovodrun, "-np", "2", sys.executable, "-m", "infomcr_dist.train"]
    named = ["unshare", "--uts", "sh", "-c", 'hostname nowhere-to-be-found; exec "$@"', "sh", *job]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(named, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert 1 <= len(lines) <= 2
    assert all("nowhere-to-be-found, its own name, does not resolve" in line for line in lines)
    assert not list(tmp_path.iterdir())


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
        assert error.value.exit_code == 2
    with pytest.raises(UserError, match="taken") as error, world.synchronize_errors():
        raise InUse("the port is taken")
    assert error.value.exit_code == 75, "it may be free later"
    with pytest.raises(KeyError), world.synchronize_errors():
        raise KeyError("a bug")
