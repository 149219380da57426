"""Processes that wait or hang in some way, each with a watchdog of LIMIT seconds: prints how each has ended, as JSON.

Each case is a fork of this process, and its main thread is what a trainer's is. A case ends by itself with code 0.
"""

import ctypes
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from infomcr_dist.watchdog import Watchdog
from infomcr_dist.world import SLOW, SingleProcess

LIMIT = 2.0


def wait_for_a_lock(world: SingleProcess) -> None:
    """As a collective waits: in C, with the interpreter's lock released."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def read_an_empty_pipe(world: SingleProcess) -> None:
    os.read(os.pipe()[0], 1)


def keep_the_interpreters_lock(world: SingleProcess) -> None:
    ctypes.PyDLL(None).sleep(600)


def stop_among_others(world: SingleProcess) -> None:
    world.size = 2
    time.sleep(LIMIT / 2)  # the watchdog has read it
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_alone(world: SingleProcess) -> None:
    """Until the parent continues it."""
    os.kill(os.getpid(), signal.SIGSTOP)


def take_slow_steps(world: SingleProcess) -> None:
    for _ in range(6):
        time.sleep(LIMIT / 2)
        world.progress += 1


def take_a_step_that_was_slow_before(world: SingleProcess) -> None:
    world.patience = SLOW
    time.sleep(LIMIT)
    world.progress, world.patience = world.progress + 1, 1.0
    time.sleep(2 * LIMIT)


def take_a_first_step(world: SingleProcess) -> None:
    world.patience = SLOW
    time.sleep(2 * LIMIT)


def prepare(world: SingleProcess) -> None:
    world.patience = math.inf
    time.sleep(2 * LIMIT)


def wait_for_others(world: SingleProcess) -> None:
    world.size = 2
    time.sleep(2 * LIMIT)


CASES: tuple[Callable[[SingleProcess], None], ...] = (
    wait_for_a_lock, read_an_empty_pipe, keep_the_interpreters_lock, stop_among_others, stop_alone, take_slow_steps,
    take_a_step_that_was_slow_before, take_a_first_step, prepare, wait_for_others,
)  # fmt: skip


def run(case: Callable[[SingleProcess], None], errors: int) -> None:
    os.dup2(errors, 2)
    world = SingleProcess()
    world.location, world.patience = "step 3", 1.0
    watchdog = Watchdog(world, LIMIT)
    case(world)
    watchdog.close()


def main() -> None:
    started = {}
    for case in CASES:
        errors = os.memfd_create("stderr")
        if (process := os.fork()) == 0:
            try:
                run(case, errors)
            finally:
                os._exit(1 if sys.exc_info()[0] else 0)
        started[process] = case, errors
    time.sleep(3 * LIMIT)
    ended = {}
    for process, (case, errors) in started.items():
        if case is stop_alone:
            os.kill(process, signal.SIGCONT)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        ended[case.__name__] = code, os.pread(errors, 4096, 0).decode()
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
