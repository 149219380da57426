"""One run at a time in a directory."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path


def lock_run(directory: Path) -> int:
    """Lock a run's directory until the returned descriptor is closed or this process ends.

    Where the file system has no locks, nothing is locked.

    Raises:
        ValueError: another process holds the lock; the message names its host, process and the time it began.
    """
    path = directory / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "a process that has just begun"
        os.close(descriptor)
        raise ValueError(
            f"run_dir {directory} is in use by {holder}: give another run_dir, or wait until that run has ended"
        ) from None
    except OSError:
        return descriptor
    os.ftruncate(descriptor, 0)
    began = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {began}\n".encode())
    return descriptor
