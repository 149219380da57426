"""Jobs of several workers on this machine that take turns: while one has a round, the others are stopped (SIGSTOP)."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from infomcr_dist.world import World

WORKERS = 2
LAUNCHERS = {
    "horovod": ["horovodrun", "-np", str(WORKERS)],
    "torch": ["torchrun", "--standalone", "--nproc-per-node", str(WORKERS), "--no-python"],
}


class Job:
    """Workers that run this script as ``worker ARGUMENT…`` and call `serve` there.

    Args:
        resources: ends the job.
        engine: whose launcher starts them.
        arguments: of the script.
        environment: variables beside those of this process.
    """

    def __init__(self, resources: ExitStack, engine: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        folder = resources.enter_context(tempfile.TemporaryDirectory())
        paths = {name: f"{folder}/{name}" for name in ("TURNS_COMMANDS", "TURNS_RESULTS")}
        for path in paths.values():
            os.mkfifo(path)
        launcher = LAUNCHERS[engine]
        command = [str(Path(sys.executable).with_name(launcher[0])), *launcher[1:], sys.executable, sys.argv[0]]
        log = resources.enter_context(open(f"{folder}/log", "w"))  # noqa: SIM115
        self._launcher = subprocess.Popen(
            [*command, "worker", *arguments], env={**os.environ, **paths, **environment}, stdout=log, stderr=log
        )
        self._commands, self._results = open(paths["TURNS_COMMANDS"], "w"), paths["TURNS_RESULTS"]  # noqa: SIM115
        self._workers: list[int] = []
        resources.callback(self._close)

    def round(self, number: int) -> Any:
        """What `serve` has from rank 0 for the round of this number."""
        self._signal(signal.SIGCONT)
        self._commands.write(f"{number}\n")
        self._commands.flush()
        self._workers, result = json.loads(Path(self._results).read_text())
        self._signal(signal.SIGSTOP)
        return result

    def _close(self) -> None:
        self._commands.close()
        self._signal(signal.SIGCONT)
        self._launcher.wait()

    def _signal(self, number: int) -> None:
        for process in self._workers:
            with suppress(ProcessLookupError):  # the launcher has ended them after an interrupt
                os.kill(process, number)


def serve(world: World, take_round: Callable[[int], Any]) -> None:
    """On each worker: take a round whenever the `Job` asks for it; what rank 0's returns is its result."""
    commands = open(os.environ["TURNS_COMMANDS"]) if world.rank == 0 else None  # noqa: SIM115
    while command := world.broadcast(commands.readline() if commands else None):
        result = take_round(int(command))
        processes = world.gather(os.getpid())
        if world.rank == 0:
            with open(os.environ["TURNS_RESULTS"], "w") as results:
                results.write(json.dumps([processes, result]))
    world.close()


def spread(values: list[float]) -> str:
    """Median and, in brackets, quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"
