"""Check whether this machine, or this job, is ready to train.

    infomcr doctor [RECIPE] [key=value …]
    horovodrun -np 8 infomcr doctor [RECIPE] [key=value …]
    torchrun --nproc-per-node 8 --no-python infomcr doctor [RECIPE] [key=value …]

Takes the arguments of train. Prints one line per check: ok, or FAIL and the remedy. Of several workers every one is
checked, and rank 0 prints. Nothing is left behind.

Exit code 0: all checks are ok; 1: one failed; 2: a mistake in the arguments or the recipe.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from infomcr_dist.cli import DOCTOR
from infomcr_dist.config import Config
from infomcr_dist.doctor import examine
from infomcr_dist.doctor.results import Result, lines, one_line, show
from infomcr_dist.engines import launched_rank, run_in_world
from infomcr_dist.own_address import check_own_name
from infomcr_dist.world import World
from pipelines.console import lenient
from pipelines.options import load


class _WorkerLost(Exception):
    """A collective failed; there is no other worker left to wait for."""


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    lenient()
    config, recipe, mistake = Config(), "", None
    try:
        (recipe,), overrides = DOCTOR.parse(arguments)
        config = load(Config, Path(recipe), overrides)
    except ValueError as error:
        mistake = error
    try:
        check_own_name(os.environ)
    except ValueError as error:
        _print(Result("host name", False, f"rank {launched_rank(os.environ)}: {error}"))
        return 1
    connected = False

    def body(world: World) -> int:
        nonlocal connected
        connected = True
        with world.synchronize_errors():
            if mistake is not None:
                raise mistake
        try:
            found = lines(world.gather(examine(config, recipe, world)))
        except world.exit_errors as error:
            raise _WorkerLost(f"rank {world.rank} lost the others in a collective ({one_line(error)})") from error
        failed = sum(not result.ok for result in found)
        if world.rank == 0:
            for result in found:
                _print(result)
            ranks = f"{world.size} rank{'s' * (world.size > 1)}"
            print(f"{ranks}: {f'{failed} FAILED' if failed else 'all ok'}", flush=True)
        return 1 if failed else 0

    try:
        return run_in_world(body, engine=config.engine)
    except _WorkerLost as error:
        _print(Result("workers", False, f"{error}: the first rank that ended reports why"))
    except Exception as error:
        if connected:
            raise
        # Whatever a Horovod that was not built for this torch raises when it is imported.
        reason = f"{type(error).__name__}: {one_line(error)}"
        _print(Result("horovod", False, f"this worker cannot join the others ({reason}): launch/setup.sh"))
    return 1


def _print(result: Result) -> None:
    print(show(result, coloured=sys.stdout.isatty()), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
