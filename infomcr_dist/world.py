"""The workers of a run: who this process is, and the few things it does together with the others.

``connect()`` gives `Horovod` under ``horovodrun`` (or ``mpirun``) and `Solo` otherwise. This is the only file
that imports horovod, so a single process needs none.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
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
    """Every worker was asked to stop, and has: the state is saved."""


class Solo:
    """A world of one process; every collective is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    ends: tuple[type[Exception], ...] = (UserError, Stopped)
    """What a command ends for with one line: a user's mistake, or a collective that misses a worker."""

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

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank."""
        return [value]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the workers, in float64, added up in the order of ranks."""
        return [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]

    def any_later(self, flag: bool) -> Callable[[], bool]:
        """Begin to ask whether the flag is set on any worker; calling the result waits for the answer."""
        return lambda: flag

    def average_buffers(self, model: nn.Module) -> None:
        """Replace floating-point buffers (BatchNorm's running statistics) by their mean over the workers."""

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
    """The workers of a Horovod job; one process each, one GPU each where there are any."""

    def __init__(self) -> None:
        import horovod.torch as hvd
        from horovod.common.exceptions import HorovodInternalError

        hvd.init()
        self._hvd = hvd
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.ends = (UserError, Stopped, HorovodInternalError)
        super().__init__()

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

    def broadcast(self, value: Any) -> Any:
        # Without a name Horovod takes that of the value's type, and waits for ever where the workers' types differ.
        return self._hvd.broadcast_object(value, root_rank=0, name="broadcast")

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = self._hvd.allgather_object(value, name="gather")
        return values

    def any_later(self, flag: bool) -> Callable[[], bool]:
        handle = self._hvd.allreduce_async(torch.tensor(float(flag)), name="any", op=self._hvd.Sum)
        return lambda: bool(self._hvd.synchronize(handle) > 0)

    def average_buffers(self, model: nn.Module) -> None:
        buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        if buffers and self.size > 1:
            means: list[Tensor] = self._hvd.grouped_allreduce(list(buffers.values()), name="buffers")
            for buffer, mean in zip(buffers.values(), means, strict=True):
                buffer.copy_(mean)

    def barrier(self) -> None:
        self._hvd.barrier()

    def close(self) -> None:
        self._hvd.shutdown()


class StopRequest:
    """Within its context SIGTERM, and a first SIGINT, are a wish to stop; a second SIGINT ends the process at once."""

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.wanted = False

    def __enter__(self) -> StopRequest:
        self._before = [signal.signal(number, self._want) for number in self._SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self._SIGNALS, self._before, strict=True):
            signal.signal(number, handler)

    def _want(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.wanted:
            os._exit(130)
        self.wanted = True


def connect() -> Solo:
    """`Horovod` if a launcher started this process, else `Solo`; the device is this process's GPU, or the CPU."""
    return Horovod() if any(name in os.environ for name in _LAUNCHED_BY) else Solo()


def report_and_leave(world: Solo, error: Exception) -> int:
    """Tell, in one line, why a command ends, once over all workers; returns its exit code.

    2 for a `UserError`, 75 for `Stopped` (try again later, in sysexits.h), 1 where another worker is gone.
    """
    if isinstance(error, Stopped):
        if world.rank == 0:
            print(f"\nstopped: {error}", file=sys.stderr, flush=True)
        world.barrier()
        return 75
    if isinstance(error, UserError) and error.everywhere:
        if world.rank == 0:
            print(f"\nerror: {error}", file=sys.stderr, flush=True)
        world.barrier()  # nobody leaves, and is taken for the cause, before rank 0 has spoken
        return 2
    gone = "another worker is gone; go on from the last checkpoint with resume=auto"
    reason = str(error) if isinstance(error, UserError) else gone
    print(f"\nerror: rank {world.rank}: {reason}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, UserError) else 1


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
