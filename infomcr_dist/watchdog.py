"""Kills a worker that hangs: stopped by a signal, frozen with its machine, lost in a driver.

Such a process can do nothing about itself, and the other workers would wait for it. A small process of its own watches
it: a thread of the worker sends it a heartbeat every second, and where none comes for long it reports that and kills.
A worker that is alive but does not take part in a collective is found by the engine's stall check.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

_PROGRAM = """
import os, select, signal, sys, time
worker, limit, name = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
beat = looked = time.monotonic()
while os.getppid() == worker:
    ready, _, _ = select.select([0], [], [], min(1.0, limit / 4))
    now = time.monotonic()
    if ready:
        if not os.read(0, 4096):
            break
        beat = now
    elif now - looked > limit / 2:
        beat = now  # this process did not run either: the machine was frozen, and the worker needs its chance
    elif now - beat > limit:
        try:
            sys.stderr.write(f"\\nerror: {name} has hung for {limit:g} s: killed\\n")
        finally:
            os.kill(worker, signal.SIGKILL)
        break
    looked = now
"""


class Watchdog:
    """Watches this process from its making until `close`; ``name`` is what its message calls it."""

    def __init__(self, name: str, seconds: float) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid()), str(seconds), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is meant for the worker
        )
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(min(1.0, seconds / 4),), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        self._thread.join()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _beat(self, interval: float) -> None:
        assert self._process.stdin is not None
        while not self._done.wait(interval):
            try:
                os.write(self._process.stdin.fileno(), b".")
            except OSError:
                return  # somebody ended the watcher; the worker continues unwatched
