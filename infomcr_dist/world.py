"""The workers of a run: who this process is, and the few things it does together with the others.

``connect()`` gives `Horovod` under ``horovodrun`` (or ``mpirun``) and `Solo` otherwise. This is the only file
that imports horovod, so a single process needs none.

Under ``horovodrun --host-discovery-script`` (launch/elastic.sh) the world is elastic: when a worker is lost or the
launcher finds hosts that came or went, the ones that are left `restart` it at its new size.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

_LAUNCHED_BY = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK")


class UserError(Exception):
    """A user's mistake, or broken input; the message is one line.

    ``everywhere``: every worker raises it, so that rank 0 tells it; otherwise the one that met it does.
    """

    def __init__(self, message: str, *, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


class Stopped(Exception):
    """This worker was asked to stop, and has; the state is saved unless the message says otherwise.

    ``saved``: whether it is.
    """

    def __init__(self, message: str, *, saved: bool = True) -> None:
        super().__init__(message)
        self.saved = saved


class Diverged(Exception):
    """The workers' weights are no longer the same; every worker raises it."""


class HostsChanged(Exception):
    """Hosts came or went: every worker of an elastic world raises it after the same step, to restart the world."""


class Solo:
    """A world of one process; every collective is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    elastic: bool = False
    place: str = "its preparation"
    """Where in the run this worker is, for a message that is its last"""
    ends: tuple[type[Exception], ...] = (UserError, Stopped, Diverged)
    """What a command ends for with one line: a user's mistake, or a collective that misses a worker."""
    resets: tuple[type[Exception], ...] = ()
    """What an elastic world is restarted for; nothing elsewhere."""

    def __init__(self) -> None:
        self.device = _device(self.local_rank)

    def distribute(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer to give to `average_gradients` and `update`, without the state of the one given.

        Weights and buffers become those of rank 0.
        """
        return optimizer

    def average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Wait until every ``p.grad`` is the mean over the workers."""

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights from averaged gradients."""
        optimizer.step()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        """One rank's value, on every worker."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank."""
        return [value]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the workers, in float64, added up in the order of ranks."""
        return [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]

    def sum_later(self, values: Tensor) -> Callable[[], list[float]]:
        """Begin to add up a vector of numbers over the workers; calling the result waits for the sums."""
        return values.tolist

    def hosts_changed(self) -> bool:
        """Whether the launcher has told this worker of hosts that came or went since the world began."""
        return False

    def restart(self) -> None:
        """Begin anew, at another size and rank, after one of `resets`."""

    def average_buffers(self, model: nn.Module) -> None:
        """Replace floating-point buffers (BatchNorm's running statistics) by their mean over the workers, others by
        rank 0's."""

    def barrier(self) -> None:
        """Wait for every worker."""

    def close(self) -> None:
        """Leave the world."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that a user's mistake may end (`ValueError`, `OSError`) on all workers or on none.

        Every worker must enter it, and the block must hold no collective. Raises `UserError` everywhere, with the
        message of the lowest failing rank, if the block failed anywhere.
        """
        failure: str | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = str(error)
        failures = self.gather(failure)
        first = next((message for message in failures if message is not None), None)
        if first is not None:
            raise UserError(first, everywhere=True)


class Horovod(Solo):
    """The workers of a Horovod job; one process each, one GPU each where there are any.

    ``hang_seconds``: after so long a worker that takes no part in a collective ends it, or a silent network (which is
    given at least a minute: a start may take it).
    """

    def __init__(self, hang_seconds: float | None) -> None:
        if hang_seconds is not None:  # read when Horovod starts; what the user has set for it stands
            limit = str(math.ceil(hang_seconds))
            os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(math.ceil(hang_seconds / 2)))
            os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", limit)
            os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(max(60, math.ceil(hang_seconds))))
        import horovod.torch as hvd
        from horovod.common.exceptions import HorovodInternalError

        self._hvd = hvd
        self._hosts_changed = False
        self.elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        self._begin()
        self.ends = (*self.ends, HorovodInternalError)
        if self.elastic:
            from horovod.common.elastic import notification_manager

            self.resets = (HorovodInternalError, HostsChanged)
            notification_manager.init()
            notification_manager.register_listener(self)
        super().__init__()

    def _begin(self) -> None:
        self._hvd.init()
        self.rank, self.size = self._hvd.rank(), self._hvd.size()
        self.local_rank, self.local_size = self._hvd.local_rank(), self._hvd.local_size()

    def on_hosts_updated(self, timestamp: int, update: Any) -> None:
        """Called by Horovod, on rank 0, in a thread of its own."""
        self._hosts_changed = True

    def hosts_changed(self) -> bool:
        return self._hosts_changed

    def restart(self) -> None:
        self._hosts_changed = False
        self._hvd.shutdown()
        self._begin()

    def distribute(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
        self._hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        wrapped: torch.optim.Optimizer = self._hvd.DistributedOptimizer(
            optimizer, named_parameters=model.named_parameters()
        )
        return wrapped

    def average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.synchronize()  # type: ignore[attr-defined]

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        with optimizer.skip_synchronize():  # type: ignore[attr-defined]
            optimizer.step()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        # Without a name Horovod takes that of the value's type, and waits for ever where the workers' types differ.
        return self._hvd.broadcast_object(value, root_rank=root, name="broadcast")

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = self._hvd.allgather_object(value, name="gather")
        return values

    def sum_later(self, values: Tensor) -> Callable[[], list[float]]:
        handle = self._hvd.allreduce_async(values, name="sums", op=self._hvd.Sum)
        return lambda: self._hvd.synchronize(handle).tolist()

    def average_buffers(self, model: nn.Module) -> None:
        buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        if buffers and self.size > 1:
            means: list[Tensor] = self._hvd.grouped_allreduce(list(buffers.values()), name="buffers")
            for buffer, mean in zip(buffers.values(), means, strict=True):
                buffer.copy_(mean)
        counters = {name: b for name, b in model.named_buffers() if not b.is_floating_point()}
        for name, counter in self.broadcast({name: b.cpu() for name, b in counters.items()}).items():
            counters[name].copy_(counter)

    def barrier(self) -> None:
        self._hvd.barrier()

    def close(self) -> None:
        self._hvd.shutdown()


class StopRequest:
    """From `listen` on, SIGTERM and a first SIGINT are a wish to stop; a second SIGINT ends the process at once.

    ``seconds``: how long after the wish the process may still run; then it ends, saved or not.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, seconds: float) -> None:
        self.wanted = False
        self._seconds = seconds
        self._before: list[Any] = []

    def listen(self) -> None:
        """Take the signals; may be called again."""
        if self._before:
            return
        # Python calls a handler when the main thread gets back to it, and that may wait for another worker: a thread
        # hears of the signal at once.
        hears, self._tells = os.pipe()
        os.set_blocking(self._tells, False)
        threading.Thread(target=self._listen, args=(hears,), daemon=True).start()
        self._before = [signal.signal(number, lambda *_: None) for number in self._SIGNALS]
        signal.set_wakeup_fd(self._tells)

    def close(self) -> None:
        """Give the signals back."""
        if self._before:
            signal.set_wakeup_fd(-1)
            os.close(self._tells)
            for number, handler in zip(self._SIGNALS, self._before, strict=True):
                signal.signal(number, handler)
            self._before = []

    def want(self) -> None:
        """Wish to stop."""
        if not self.wanted:
            self.wanted = True
            timer = threading.Timer(self._seconds, self._overdue)
            timer.daemon = True
            timer.start()

    def _listen(self, hears: int) -> None:
        while told := os.read(hears, 1):
            if told[0] == signal.SIGINT and self.wanted:
                os._exit(130)
            if told[0] in self._SIGNALS:
                self.want()
        os.close(hears)

    def _overdue(self) -> None:
        message = (
            f"\nerror: not all workers ended their step within stop_seconds={self._seconds:g}: "
            "ended without saving it; go on from the last checkpoint with resume=auto\n"
        )
        try:
            os.write(2, message.encode())
        finally:
            os._exit(1)


def connect(hang_seconds: float | None = None) -> Solo:
    """`Horovod` if a launcher started this process, else `Solo`; the device is this process's GPU, or the CPU."""
    return Horovod(hang_seconds) if any(name in os.environ for name in _LAUNCHED_BY) else Solo()


def report_and_leave(world: Solo, error: Exception) -> int:
    """Tell, in one line, why a command ends, once over all workers; returns its exit code.

    2 for a `UserError`, 75 for `Stopped` (try again later, in sysexits.h), 1 for anything else: diverged weights, a
    state that could not be saved, another worker that is gone.
    """
    everywhere = isinstance(error, Diverged | Stopped) or (isinstance(error, UserError) and error.everywhere)
    if isinstance(error, Stopped) and error.saved:
        code, kind = 75, "stopped"
    else:
        code, kind = 2 if isinstance(error, UserError) else 1, "error"
    if everywhere:
        if world.rank == 0:
            _say(f"\n{kind}: {error}")
        if not world.elastic:  # there others may go on
            world.barrier()  # nobody leaves, and is taken for the cause, before rank 0 has spoken
        return code
    gone = (
        f"another worker is gone, or waits for something else than this one in {world.place}: "
        "go on from the last checkpoint with resume=auto"
    )
    reason = str(error) if isinstance(error, UserError) else gone
    _say(f"\n{kind}: rank {world.rank}: {reason}")
    return code


def _say(text: str) -> None:
    with suppress(OSError):  # a launcher that was killed reads no more
        print(text, file=sys.stderr, flush=True)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
