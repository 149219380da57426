"""The world a process was started in, and what a command reports when it exits.

One module an engine is the only one that imports that engine's library.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress

from infomcr_dist.world import Diverged, Finished, SingleProcess, Stopped, UserError, World


def connect(hang_timeout_seconds: float | None = None) -> World:
    """The world this process was started in: Horovod's under ``horovodrun`` or ``mpirun``, else a single process.

    Args:
        hang_timeout_seconds: after so long, a worker that takes no part in a collective ends the job; None: never.

    Raises:
        UserError: another launcher started several processes, which would not know of each other.
    """
    if "HOROVOD_RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ:
        from infomcr_dist.engines.horovod import HorovodWorld

        world: World = HorovodWorld(hang_timeout_seconds)
    else:
        world = SingleProcess()
    if world.size == 1 and "HOROVOD_RANK" not in os.environ:
        _refuse_other_launchers(os.environ)
    return world


_LAUNCHERS = (  # the variable with the number of processes, the one with this process's rank, what sets them
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun"),
    ("PMI_SIZE", "PMI_RANK", "mpirun"),
    ("SLURM_NTASKS", "SLURM_PROCID", "srun"),
    ("WORLD_SIZE", "RANK", "torchrun"),
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
            f"{launcher} ({size}={count}) {what}: start the workers with horovodrun -np {count}, "
            f"or unset {size} for a single process",
            everywhere=True,
        )


def run_in_world(body: Callable[[World], int], hang_timeout_seconds: float | None = None) -> int:
    """Connect, run a command's body, and leave the world; what it exits for is reported in one line.

    Returns:
        The exit code: the body's, or that of the error.
    """
    try:
        world = connect(hang_timeout_seconds)
    except UserError as error:
        if all(os.environ.get(rank, "0") == "0" for _, rank, _ in _LAUNCHERS):
            print_error(f"error: {error}")
        return 2
    try:
        code = body(world)
    except world.exit_errors as error:
        return report_and_exit_code(world, error)
    if not world.elastic:
        world.barrier()
    world.close()
    return code


def report_and_exit_code(world: World, error: Exception) -> int:
    """Report in one line, once over all workers, why a command exits; returns its exit code.

    0 for `Finished`, 2 for a `UserError`, 75 for `Stopped` (try again later, in sysexits.h), 1 for anything else:
    diverged weights, a state that could not be saved, another worker that is gone.
    """
    everywhere = isinstance(error, Diverged | Stopped | Finished) or (isinstance(error, UserError) and error.everywhere)
    if isinstance(error, Stopped) and error.saved:
        code, kind = 75, "stopped"
    elif isinstance(error, Finished):
        code, kind = 0, "finished"
    else:
        code, kind = 2 if isinstance(error, UserError) else 1, "error"
    if everywhere:
        if world.rank == 0:
            print_error(f"\n{kind}: {error}")
        if not world.elastic:  # there the others may continue
            world.barrier()  # nobody exits, and is taken for the cause, before rank 0 has reported
        return code
    gone = (
        f"another worker is gone, or waits for something else than this one in {world.location}: "
        "resume from the last checkpoint with resume=auto"
    )
    reason = str(error) if isinstance(error, UserError) else gone
    print_error(f"\n{kind}: rank {world.rank}: {reason}")
    return code


def print_error(text: str) -> None:
    """Print a line to stderr; nobody may be reading it any more."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
