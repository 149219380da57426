"""The workers of a run: who this process is, and the few things it does together with the others.

A single process is rank 0 of 1; the worlds of several workers are in ``engines``, one module an engine. Under
``horovodrun --host-discovery-script`` (launch/elastic.sh) the world is elastic: when a worker is lost, or the launcher
finds that hosts joined or left, the remaining workers `restart` it at its new size.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

SLOW = 10.0
"""Patience with what is not a step that has been taken before"""


class UserError(Exception):
    """A user's mistake, or broken input; the message is one line.

    Args:
        everywhere: every worker raises it, so that rank 0 reports it; otherwise the one that met it does.
        exit_code: of the command: 2, or 75 (try again later) for what may pass without the user.
    """

    def __init__(self, message: str, *, everywhere: bool = False, exit_code: int = 2) -> None:
        super().__init__(message)
        self.everywhere = everywhere
        self.exit_code = exit_code


class InUse(ValueError):
    """What is needed belongs to another process, which may end: a port, a run directory, a worker's pid file."""


class Finished(Exception):
    """There is nothing left to do."""


class Stopped(Exception):
    """This worker was asked to stop, and has.

    Args:
        saved: whether its state is saved; the message says what is not.
    """

    def __init__(self, message: str, *, saved: bool = True) -> None:
        super().__init__(message)
        self.saved = saved


class Diverged(Exception):
    """The workers' weights are no longer the same; every worker raises it."""


class HostsChanged(Exception):
    """Hosts joined or left: every worker of an elastic world raises it after the same step, to restart the world."""


class World(ABC):
    """What an engine offers; one process is one worker, with a GPU of its own where there are any."""

    engine: Literal["none", "horovod", "torch"] = "none"
    """Whose workers these are; none: a single process"""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    elastic: bool = False
    location: str = "its preparation"
    """Where in the run this worker is, for a message that is its last"""
    progress: int = 0
    """Counts what this worker has done: steps, batches of an evaluation, trials of the metric"""
    patience: float = math.inf
    """How many times ``hang_timeout_seconds`` this worker may take until its next progress (`watchdog`)"""
    exit_errors: tuple[type[Exception], ...] = (UserError, Stopped, Diverged, Finished)
    """What a command reports in one line and exits for: a user's mistake, or a collective that misses a worker"""
    restart_errors: tuple[type[Exception], ...] = ()
    """What an elastic world is restarted for; nothing elsewhere"""
    device: torch.device

    @abstractmethod
    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and the optimizer to train with, in place of these.

        Weights and buffers become those of rank 0. The optimizer may come without the state of the one given.
        """

    @abstractmethod
    def average_gradients(self, optimizer: torch.optim.Optimizer, values: Tensor) -> Tensor:
        """Wait until every ``p.grad`` is the mean over the workers.

        Args:
            optimizer: what `distribute` returned, after one backward pass of its model, or none.
            values: a vector of numbers.

        Returns:
            The sums of the values over the workers, which travel beside the gradients.
        """

    @abstractmethod
    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights from averaged gradients."""

    @abstractmethod
    def broadcast(self, value: Any, root: int = 0) -> Any:
        """One rank's value, on every worker."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, by rank."""

    @abstractmethod
    def average_buffers(self, model: nn.Module) -> None:
        """Replace floating-point buffers (BatchNorm's running statistics) by their mean over the workers, others by
        rank 0's."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait for every worker."""

    @abstractmethod
    def close(self) -> None:
        """Leave the world, as every worker does."""

    @abstractmethod
    def abort(self) -> None:
        """Leave it after an error that the others may not have met, and wait for none of them."""

    def hosts_changed(self) -> bool:
        """Whether hosts joined or left since the world began, as far as this worker was notified."""
        return False

    def launcher_gone(self) -> bool:
        """Whether the launcher is lost, as far as this worker can find out."""
        return False

    def restart(self) -> None:
        """Begin again, at another size and rank, after one of `restart_errors`."""
        raise AssertionError("a world that is not elastic has no restart_errors")

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the workers, in float64, added up in the order of ranks."""
        return [float(sum(column)) for column in zip(*self.gather(list(values)), strict=True)]

    @contextmanager
    def synchronize_errors(self) -> Iterator[None]:
        """Run a block that a user's mistake may end (`ValueError`, `OSError`) on all workers or on none.

        Every worker must enter it, and the block must hold no collective.

        Raises:
            UserError: on every worker if the block failed on any, with the message of the lowest failing rank.
        """
        failure: tuple[str, int] | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = (str(error), 75 if isinstance(error, InUse) else 2)
        failures = self.gather(failure)
        first = next((found for found in failures if found is not None), None)
        if first is not None:
            raise UserError(first[0], everywhere=True, exit_code=first[1])


class SingleProcess(World):
    """Rank 0 of 1; every collective is the identity."""

    def __init__(self) -> None:
        self.device = local_device(self.local_rank)

    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        return model, optimizer

    def average_gradients(self, optimizer: torch.optim.Optimizer, values: Tensor) -> Tensor:
        return values

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def average_buffers(self, model: nn.Module) -> None:
        pass

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def local_device(local_rank: int) -> torch.device:
    """This worker's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
