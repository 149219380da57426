"""One run at a time in a directory, and one worker at a time behind a pid file."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from infomcr_dist.world import InUse


def lock_run(directory: Path) -> int:
    """Lock a run's directory until the returned descriptor is closed or this process ends.

    Where the file system has no locks, nothing is locked.

    Raises:
        InUse: another process holds the lock; the message names its host, process and the time it began.
    """
    began = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    try:
        return _lock(directory / ".lock", f"process {os.getpid()} on {socket.gethostname()} since {began}\n")
    except InUse as holder:
        raise InUse(
            f"run_dir {directory} is in use by {holder}: give another run_dir, or wait until that run has ended"
        ) from None


class PidFile:
    """A worker's file ``DIRECTORY/rank-LOCAL_RANK.pid``, which no other replaces or removes while this one lives.

    Args:
        directory: of the files of a host's workers; None: there is no file.
        local_rank: of this worker.
    """

    def __init__(self, directory: str | None, local_rank: int) -> None:
        self._path = None if directory is None else Path(directory) / f"rank-{local_rank}.pid"
        self._descriptor: int | None = None

    def write(self) -> None:
        """Write and lock the file, once.

        Raises:
            InUse: it is that of a process that is alive.
            OSError: it cannot be written.
        """
        if self._path is None or self._descriptor is not None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = _lock(self._path, f"{os.getpid()}\n")
        except InUse as holder:
            raise InUse(
                f"pid_dir: {self._path} is that of a worker that is alive ({holder}): wait until it has ended, "
                "or give another pid_dir"
            ) from None

    def remove(self) -> None:
        """Remove the file, if this worker has written it."""
        if self._path is not None and self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def _lock(path: Path, text: str) -> int:
    """Lock a file and write the text into it; InUse, with what its holder has written, if another process has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "a process that has just begun"
            os.close(descriptor)
            raise InUse(holder) from None
        except OSError:  # a file system without locks
            pass
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # its holder has just removed it
    os.pwrite(descriptor, text.encode(), 0)  # before the file is cut: a reader of its first line finds a whole one
    os.ftruncate(descriptor, len(text.encode()))
    return descriptor
