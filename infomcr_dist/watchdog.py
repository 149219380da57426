"""Kills a worker that hangs: stopped by a signal, frozen with its machine, waiting for ever for a GPU or a collective.

Such a process can do nothing about itself, and the other workers would wait for it. A small process of its own watches
it: a thread of the worker sends it a line every second. Two things are seen by it.

- No line comes for ``hang_timeout_seconds``: the process does not run, or something holds the interpreter's lock.
- The lines do not change: the process runs, but its main thread has made no progress (`World.progress`) for too long.
  It waits in a kernel, or in a collective that no stall check sees because every worker takes part in it.

What is too long depends on what the worker does (`World.patience`), since the second kind must not be seen in what is
merely slow:

- a step: ``hang_timeout_seconds``. Where there are other workers twice that, and two minutes at least: the engine's own
  stall check comes first, reports more, and lets an elastic job continue;
- the first step of each kind, which compiles, loads kernels and connects GPUs, and whatever is not a step: the wait for
  data (the first builds DALI's pipeline; loaders report a disk that stalls by themselves), for a checkpoint that is
  written, a batch of an evaluation, a trial of the metric: ten times that (`world.SLOW`);
- preparation (the demo's data, opening a data set, a world that restarts): as long as it takes;
- three times whatever has once taken longer: a network may need minutes for a step.

A single process that is stopped (Ctrl-Z, a debugger) is left alone: nobody waits for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from infomcr_dist.world import World

_PROGRAM = """
import os, select, signal, sys, time
worker, limit = int(sys.argv[1]), float(sys.argv[2])

def stopped():
    try:
        with open(f"/proc/{worker}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in b"tT"
    except OSError:
        return False

received, line = b"", [b"", b"1", b"inf", b"a worker", b""]
beat = progress = looked = time.monotonic()
longest = 0.0
while os.getppid() == worker:
    ready, _, _ = select.select([0], [], [], min(1.0, limit / 4))
    now = time.monotonic()
    if now - looked > limit / 2 or (not ready and line[1] == b"1" and stopped()):
        beat = progress = now  # the machine was frozen, this process too; or the user has stopped a process alone
    looked = now
    if ready:
        more = os.read(0, 4096)
        if not more:
            break
        beat = now
        *lines, received = (received + more).split(b"\\n")
        for new in (text.split(b"\\t") for text in lines):
            if new[0] != line[0]:
                longest = max(longest, now - progress)
            if new[:3] != line[:3]:
                progress = now
            line = new
    count, size, patience, name, location = line
    allowed = float(patience) * (limit if size == b"1" else 2 * max(limit, 60))
    if now - beat > limit:
        reason = f"has hung for {limit:g} s: killed"
    elif now - progress > max(allowed, 3 * longest):
        reason = f"has made no progress for {now - progress:.0f} s in {location.decode()}: killed"
    else:
        continue
    try:
        sys.stderr.write(f"\\nerror: {name.decode()} {reason}\\n")
    finally:
        os.kill(worker, signal.SIGKILL)
    break
"""


class Watchdog:
    """Watches this process, a worker of ``world``, from its making until `close`.

    Args:
        world: what it reports of itself.
        seconds: ``hang_timeout_seconds``.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self._world = world
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, str(os.getpid()), str(seconds)],
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
        while True:
            world = self._world
            line = f"{world.progress}\t{world.size}\t{world.patience}\trank {world.rank}\t{world.location}\n"
            try:
                os.write(self._process.stdin.fileno(), line.encode())
            except OSError:
                return  # somebody ended the watcher; the worker continues unwatched
            if self._done.wait(interval):
                return
