"""Signals that stop a command: while it begins, as process 1 of a container, and when nobody reads its console."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infomcr_dist.signals import StopRequest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def process_1(code: str, stderr: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    """Run Python as process 1 of a container, which gets no signal that it does not handle."""
    alone = ["unshare", *([] if os.getuid() == 0 else ["--map-root-user"]), "--pid", "--fork", "--kill-child"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no container: a user may not have its own process ids here")
    # Whatever this process ignores, as under nohup, would be ignored there.
    restored = "import signal; [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGTERM)]\n"
    restored += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [*alone, sys.executable, "-c", restored + code]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("train", "torch"),
        ("measure", "torch"),
        ("study scenario_1", "torch"),
        ("report", "matplotlib"),
        ("prepare", "PIL"),
    ],
)
def test_a_signal_while_a_command_is_imported(command: str, module: str, number: signal.Signals) -> None:
    code = f"""
import os, sys, time
class Importing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {int(number)})
            time.sleep(60)
sys.meta_path.insert(0, Importing())
from infomcr_dist.cli import main
sys.exit(main({command.split()!r}))
"""
    done = process_1(code)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "\nstopped: repeat the command\n")


@pytest.mark.parametrize(
    ("module", "function", "arguments", "number", "exit_code"),
    [
        ("train", "prepare_run", [], signal.SIGTERM, 75),
        ("train", "run_in_world", [], signal.SIGHUP, 75),
        ("train", "prepare_run", [], signal.SIGINT, 130),
        ("measure", "open_subject", ["run"], signal.SIGTERM, 75),
    ],
)
def test_a_signal_before_there_is_anything_to_save(
    module: str, function: str, arguments: list[str], number: signal.Signals, exit_code: int
) -> None:
    code = f"""
import os, sys, time
from infomcr_dist import {module}
def struck(*arguments, **settings):
    os.kill(os.getpid(), {int(number)})
    time.sleep(60)
{module}.{function} = struck
sys.exit({module}.main({arguments}))
"""
    done = process_1(code)
    assert (done.returncode, done.stderr) == (exit_code, "\nstopped: there is nothing to save; repeat the command\n")


def test_no_console_keeps_an_overdue_process() -> None:
    """Its stderr is a pipe that is full, as where a terminal is paused."""
    code = """
import os, signal, time
from infomcr_dist.signals import StopRequest
with StopRequest() as stop:
    stop.defer(0.1, lambda: "step 3")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    for full in (True, False):
        reader, writer = os.pipe()
        size = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ)
        if full:
            os.write(writer, bytes(size))
        assert process_1(code, stderr=writer).returncode == 1
        os.close(writer)
        with open(reader, "rb") as file:
            left = file.read()
        expected = b"" if full else b"\nerror: step 3 did not end within shutdown_timeout_seconds=0.1: exiting without "
        assert left.lstrip(b"\0").startswith(expected)


def test_handlers_are_restored_and_what_is_ignored_stays_so() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest() as outer:
        with StopRequest() as stop:
            stop.defer(60, str)
            os.kill(os.getpid(), signal.SIGHUP)
            while not stop.requested:
                pass
        for deadline in threading.enumerate():
            if isinstance(deadline, threading.Timer):
                deadline.join(30)
                assert not deadline.is_alive(), "a deadline is over with its context"
        outer.defer(60, str)
        os.kill(os.getpid(), signal.SIGTERM)
        while not outer.requested:
            pass
    assert [signal.getsignal(number) for number in numbers] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[2])
