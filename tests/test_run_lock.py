"""Two runs never write into one directory, nor two workers into one pid file."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infomcr_dist.run_lock import PidFile, lock_run
from infomcr_dist.world import InUse

HOLD = "import pathlib, sys, time; from infomcr_dist.run_lock import lock_run; lock_run(pathlib.Path(sys.argv[1])); "


def test_the_holder_is_named_and_the_lock_ends_with_it(tmp_path: Path) -> None:
    code = HOLD + "print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(InUse, match=f"process {holder.pid} on {socket.gethostname()} since 20") as refused:
                lock_run(tmp_path)
            assert "\n" not in str(refused.value)
        holder.kill()
    os.close(lock_run(tmp_path))
    os.close(lock_run(tmp_path))


def test_a_process_that_ends_leaves_no_lock(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], check=True)
    os.close(lock_run(tmp_path))


@pytest.mark.parametrize("reason", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks(reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    os.close(lock_run(tmp_path))
    file = PidFile(str(tmp_path), 0)
    file.write()
    assert (tmp_path / "rank-0.pid").read_text() == f"{os.getpid()}\n"
    file.remove()
    assert not (tmp_path / "rank-0.pid").exists()


WORKER = """
import sys
from infomcr_dist.run_lock import PidFile
file = PidFile(sys.argv[1], 0)
file.write()
print("written", flush=True)
sys.stdin.read()
file.remove()
"""


@pytest.mark.parametrize("end", ["removed", "killed"])
def test_a_live_worker_s_pid_file_is_neither_replaced_nor_removed(end: str, tmp_path: Path) -> None:
    directory, path = str(tmp_path / "ranks"), tmp_path / "ranks" / "rank-0.pid"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", WORKER, directory], stdin=pipe, stdout=pipe, text=True) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "written\n"
        beside, other = PidFile(directory, 0), PidFile(directory, 1)
        with pytest.raises(InUse, match=rf"pid_dir: .*rank-0\.pid is that of .* alive \({worker.pid}\)") as refused:
            beside.write()
        assert "\n" not in str(refused.value)
        beside.remove()
        other.write()
        other.write()  # as at a restart of the world
        other.remove()
        assert path.read_text() == f"{worker.pid}\n"
        if end == "killed":
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        else:
            worker.stdin.close()
            worker.wait()
            assert not path.exists()
    beside.write()
    assert path.read_text() == f"{os.getpid()}\n"
    beside.remove()
    assert not path.exists()


def test_a_file_removed_while_it_was_opened_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder ends between the opening of the file and its lock."""
    flock, first = fcntl.flock, PidFile(str(tmp_path), 0)
    first.write()

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.remove()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    second = PidFile(str(tmp_path), 0)
    second.write()
    assert (tmp_path / "rank-0.pid").read_text() == f"{os.getpid()}\n"
    with pytest.raises(InUse):
        PidFile(str(tmp_path), 0).write()


def test_what_was_no_number_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "rank-0.pid").write_text("x" * 100)
    PidFile(str(tmp_path), 0).write()
    assert (tmp_path / "rank-0.pid").read_text() == f"{os.getpid()}\n"
