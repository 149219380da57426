"""What the processes of every pool begin with."""

import os
import signal
import threading
import time


def begin_worker(parent: int) -> None:
    """Initializer of a pool's processes: Ctrl-C and a lost terminal are left to the parent; they end a second after it.

    They wait for work at a pipe of which they hold both ends, and would wait for ever for a parent that was killed.

    Args:
        parent: its process id.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
