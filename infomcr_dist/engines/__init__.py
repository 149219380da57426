"""The world a process was started in, and what a command reports when it exits.

One module an engine is the only one that imports that engine's library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Literal

from infomcr_dist.own_address import check_own_name
from infomcr_dist.world import Diverged, Finished, SingleProcess, Stopped, UserError, World

Engine = Literal["auto", "horovod", "torch"]


def connect(hang_timeout_seconds: float | None = None, engine: Engine = "auto") -> World:
    """The world this process was started in: that of an engine whose launcher set its variables, else a single process.

    Args:
        hang_timeout_seconds: after so long, a worker that takes no part in a collective ends the job; None: never.
        engine: the engine whose launcher started this process; auto: by the environment.

    Raises:
        UserError: the launcher is not one of these, which would start processes that do not know of each other, or not
            that of the engine; or this host's own name leads nowhere.
        ConnectionError: the workers did not find each other.
    """
    chosen = _choose(os.environ, engine)
    if chosen is not None:
        rank = launched_rank(os.environ)
        try:
            hint = check_own_name(os.environ)
        except ValueError as error:
            raise UserError(f"rank {rank}: {error}") from None
        if hint is not None:
            print_error(f"rank {rank}: {hint}")
    if chosen == "torch":
        from infomcr_dist.engines.torch_distributed import TorchWorld

        try:
            return TorchWorld(hang_timeout_seconds)
        except ValueError as error:
            raise UserError(str(error), everywhere=True) from None
    world: World = SingleProcess()
    if chosen == "horovod":
        try:
            from infomcr_dist.engines.horovod import HorovodWorld
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "horovod":
                raise
            remedy = "build it with make setup, or start the workers with torchrun"
            raise UserError(f"Horovod is not installed: {remedy}", everywhere=True) from None
        world = HorovodWorld(hang_timeout_seconds)
    if world.size == 1 and "HOROVOD_RANK" not in os.environ:
        _refuse_other_launchers(os.environ)
    return world


def launched_rank(environment: Mapping[str, str]) -> int:
    """The rank that a launcher has given this process, before it connects; 0 where there is none."""
    ranks = (environment.get(name, "") for name in ("HOROVOD_RANK", *(rank for _, rank, _ in _LAUNCHERS)))
    return next((int(rank) for rank in ranks if rank.isdecimal()), 0)


def _choose(environment: Mapping[str, str], engine: Engine) -> Engine | None:
    """The engine whose launcher started this process; None: a single process, or another launcher."""
    started: list[Engine] = []
    if "HOROVOD_RANK" in environment or "OMPI_COMM_WORLD_RANK" in environment:
        started.append("horovod")
    if all(name in environment for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        started.append("torch")
    if engine == "auto":
        if len(started) > 1:
            raise UserError(
                "the environment has the variables of Horovod (HOROVOD_RANK, OMPI_COMM_WORLD_RANK) and those of "
                "torchrun (RANK, MASTER_ADDR): give engine=horovod or engine=torch",
                everywhere=True,
            )
        return started[0] if started else None
    if engine not in started:
        command = "horovodrun -np 2" if engine == "horovod" else "torchrun --nproc-per-node 2 --no-python"
        raise UserError(
            f"engine={engine}, but its launcher did not start this process: {command} infomcr …, or engine=auto",
            everywhere=True,
        )
    return engine


_LAUNCHERS = (  # the variable with the number of processes, the one with this process's rank, what sets them
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
    ("PMI_SIZE", "PMI_RANK", "mpirun"),
    ("SLURM_NTASKS", "SLURM_PROCID", "srun"),
    ("WORLD_SIZE", "RANK", "a launcher without MASTER_ADDR and MASTER_PORT"),
)


def _refuse_other_launchers(environment: Mapping[str, str]) -> None:
    """Independent processes would all write into one run directory."""
    # The batch script of a Slurm job sees the number of tasks of its allocation, but is a single process.
    batch_script = environment.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environment
    for size, _, launcher in _LAUNCHERS:
        count = environment.get(size, "")
        if not count.isdecimal() or int(count) < 2 or (launcher == "srun" and batch_script):
            continue
        what = f"would start {count} independent runs"
        if size == "OMPI_COMM_WORLD_SIZE":
            what = "needs a Horovod built with MPI (HOROVOD_WITH_MPI=1 launch/build_horovod.sh)"
        raise UserError(
            f"{launcher} ({size}={count}) {what}: start the workers with horovodrun -np {count} or torchrun "
            f"--nproc-per-node {count}, or unset {size} for a single process",
            everywhere=True,
        )


def run_in_world(
    body: Callable[[World], int], hang_timeout_seconds: float | None = None, engine: Engine = "auto"
) -> int:
    """Connect, run a command's body, and leave the world; what it exits for is reported in one line.

    Returns:
        The exit code: the body's, or that of the error.
    """
    try:
        world = connect(hang_timeout_seconds, engine)
    except UserError as error:
        if launched_rank(os.environ) == 0 or not error.everywhere:
            print_error(f"error: {error}")
        return error.exit_code
    except ConnectionError as error:
        print_error(f"error: {error}")
        return 1
    everywhere = True
    try:
        code = body(world)
    except world.exit_errors as error:
        code, everywhere = _report(world, error)
    if not everywhere:
        world.abort()
        return code
    if not world.elastic:  # there the others may continue
        world.barrier()  # nobody exits, and is taken for the cause of an error, before rank 0 has reported it
    world.close()
    return code


def _report(world: World, error: Exception) -> tuple[int, bool]:
    """Report in one line, once over all workers, why a command exits.

    Returns:
        The exit code: 0 for `Finished`, 75 for `Stopped` (try again later, in sysexits.h), a `UserError`'s own, 1 for
        anything else: diverged weights, a state that could not be saved, another worker that is gone. And whether every
        worker exits for this error.
    """
    everywhere = isinstance(error, Diverged | Stopped | Finished) or (isinstance(error, UserError) and error.everywhere)
    if isinstance(error, Stopped) and error.saved:
        code, kind = 75, "stopped"
    elif isinstance(error, Finished):
        code, kind = 0, "finished"
    else:
        code, kind = error.exit_code if isinstance(error, UserError) else 1, "error"
    if everywhere:
        if world.rank == 0:
            print_error(f"\n{kind}: {error}")
        return code, True
    gone = (
        f"another worker is gone, or waits for something else than this one in {world.location}: "
        "resume from the last checkpoint with resume=auto"
    )
    reason = str(error) if isinstance(error, UserError) else gone
    print_error(f"\n{kind}: rank {world.rank}: {reason}")
    return code, False


def print_error(text: str) -> None:
    """Print a line to stderr; nobody may be reading it any more."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
