"""Two runs never write into one directory."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infomcr_dist.run_lock import lock_run

HOLD = "import pathlib, sys, time; from infomcr_dist.run_lock import lock_run; lock_run(pathlib.Path(sys.argv[1])); "


def test_the_holder_is_named_and_the_lock_ends_with_it(tmp_path: Path) -> None:
    code = HOLD + "print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(ValueError, match=f"process {holder.pid} on {socket.gethostname()} since 20") as refused:
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
