"""A process started by another launcher than ours, and what a world does with errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from infomcr_dist.engines import connect
from infomcr_dist.world import SingleProcess, UserError

VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK", "SLURM_NTASKS",
             "SLURM_PROCID", "SLURM_STEP_ID", "ENVIRONMENT", "WORLD_SIZE", "RANK")  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "torchrun"),
        ({"WORLD_SIZE": "16", "RANK": "7"}, "torchrun"),
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
    with pytest.raises(UserError, match=rf"{launcher} \(\w+={size}\) .*horovodrun -np {size}") as refused:
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
        (("WORLD_SIZE", "RANK"), "train"),
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


def test_a_user_s_mistake_becomes_one_error_and_a_bug_stays_itself() -> None:
    world = SingleProcess()
    for mistake in (ValueError("data.path is wrong"), OSError("no room")):
        with pytest.raises(UserError, match=str(mistake)) as error, world.synchronize_errors():
            raise mistake
        assert error.value.everywhere
    with pytest.raises(KeyError), world.synchronize_errors():
        raise KeyError("a bug")
