"""The workers of a torch.distributed job: the only module that imports torch.distributed."""

from __future__ import annotations

import ctypes
import os
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # its functions keep the group there is when it is imported, as optimizers do
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.rendezvous import rendezvous

from infomcr_dist.world import World, local_device

_NEVER = timedelta(days=365)
_START = timedelta(minutes=1)
"""Given to the workers to find each other, at least."""
_BUCKET_BYTES = 4 << 20
"""Of the gradients that are sent together; the first ones leave while the backward pass computes the others."""
_PR_SET_PDEATHSIG = 1


class CollectiveError(Exception):
    """A collective failed: another worker is gone, or took no part in time."""


class TorchWorld(World):
    """The workers that ``torchrun`` started, or anything that sets its variables: gloo on CPUs, NCCL on GPUs.

    Args:
        hang_timeout_seconds: after so long, a worker that takes no part in a collective ends it (outside the steps
            after a minute at least). None: never.

    Raises:
        ValueError: a variable of the environment is not a number.
        ConnectionError: the workers did not find each other.
    """

    engine = "torch"

    def __init__(self, hang_timeout_seconds: float | None) -> None:
        self.rank, self.size = _number("RANK"), _number("WORLD_SIZE")
        self.local_rank, self.local_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        meeting_point = f"{os.environ['MASTER_ADDR']}:{_number('MASTER_PORT')}"
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun leaves its workers behind when it is killed
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        self.device = local_device(self.local_rank)
        # A wait for NCCL ends with an exception, as gloo's does, and not with the process.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        limit = _NEVER if hang_timeout_seconds is None else timedelta(seconds=hang_timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        start = max(limit, _START)
        try:
            store, rank, size = next(rendezvous("env://", timeout=start))
            store = dist.PrefixStore(_agree(store, rank, size, start), store)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=start)
            # Of their own, so that a worker which takes part in something else is missed, not misunderstood.
            self._steps = dist.new_group(timeout=limit)
        except RuntimeError as error:
            message = f"rank {self.rank} did not find the other workers at {meeting_point}: {_line(error)}"
            raise ConnectionError(message) from error
        self.exit_errors = (*self.exit_errors, CollectiveError)
        self._gradients: WeakKeyDictionary[torch.optim.Optimizer, _Gradients] = WeakKeyDictionary()

    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        with _collective(), torch.no_grad():
            for tensor in model.state_dict().values():
                value = tensor.contiguous()
                dist.broadcast(value, src=0)
                tensor.copy_(value)
        self._gradients[optimizer] = _Gradients(model.parameters(), self)
        return model, optimizer

    def average_gradients(self, optimizer: torch.optim.Optimizer, values: Tensor) -> Tensor:
        with _collective():
            wait = self._gradients[optimizer].begin_average()
            sums = values.clone()
            dist.all_reduce(sums, group=self._steps)
            wait()
        return sums

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        values = [value]
        with _collective():
            dist.broadcast_object_list(values, src=root)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        with _collective():
            dist.all_gather_object(values, value)
        return values

    def average_buffers(self, model: nn.Module) -> None:
        with _collective():
            for buffer in model.buffers():
                value = buffer.contiguous()
                if value.is_floating_point():
                    dist.all_reduce(value)
                    value.div_(self.size)
                else:
                    dist.broadcast(value, src=0)
                buffer.copy_(value)

    def barrier(self) -> None:
        self.gather(None)

    def close(self) -> None:
        dist.destroy_process_group()
        self._drop()

    def abort(self) -> None:
        _abort_process_group()
        self._drop()

    def _drop(self) -> None:
        """Drop the last reference to a group, which ends gloo's threads.

        One that frees a tensor while the interpreter exits aborts the process.
        """
        del self._steps


def _agree(store: Any, rank: int, size: int, limit: timedelta) -> str:
    """A name that these workers have for each other, and none before them.

    torchrun keeps one store for all starts of a job's workers: without a name, a worker that is restarted may find the
    address of one that is gone. Neither the count of restarts nor anything else in the environment distinguishes the
    starts on all hosts. Every worker offers a key of its own, to which rank 0 answers.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"worker {rank}", own)
        name: str = store.get(own).decode()
        store.add(name, 1)
        return name
    answered: set[bytes] = set()
    deadline = time.monotonic() + limit.total_seconds()
    while store.add(own, 0) < size - 1:
        for key in (f"worker {other}" for other in range(1, size)):
            offered = store.get(key) if store.check([key]) else None  # maybe of a worker that is gone
            if offered is not None and offered not in answered:
                store.set(offered.decode(), own)
                answered.add(offered)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{store.add(own, 0)} of {size - 1} others came within {limit}")
        time.sleep(0.01)
    return own


def backends() -> list[str]:
    """Those that this torch has, of gloo and NCCL."""
    available = {"gloo": dist.is_gloo_available(), "NCCL": dist.is_nccl_available()} if dist.is_available() else {}
    return [name for name, there in available.items() if there]


@dataclass
class _Bucket:
    """Gradients that are sent together, side by side in one vector."""

    parameters: list[nn.Parameter]
    vector: Tensor
    views: list[Tensor]
    """The vector's parts, in the parameters' shapes"""
    missing: int
    """Parameters whose gradient the backward pass has not reached"""
    work: dist.Work | None = None


class _Gradients:
    """Averages gradients while the backward pass continues.

    They are sent in buckets, in an order that does not depend on when a worker has which: an allreduce adds up the same
    numbers in the same order in every step, also in one that a resumed run repeats.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: TorchWorld) -> None:
        self._world, self._sent = world, 0
        self._buckets = [_bucket(members) for members in _split([p for p in parameters if p.requires_grad])]
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(bucket))

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            assert bucket.work is None, "a second backward pass before the gradients were averaged"
            bucket.missing -= 1
            with _collective():
                while self._sent < len(self._buckets) and self._buckets[self._sent].missing == 0:
                    self._send()

        return ready

    def _send(self) -> None:
        bucket = self._buckets[self._sent]
        for parameter in bucket.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_copy_(bucket.views, [p.grad for p in bucket.parameters if p.grad is not None])
        bucket.work = dist.all_reduce(bucket.vector, group=self._world._steps, async_op=True)
        self._sent += 1

    def begin_average(self) -> Callable[[], None]:
        """Send what is left; calling the result waits until every gradient is the mean."""
        while self._sent < len(self._buckets):
            self._send()
        return self._finish

    def _finish(self) -> None:
        for bucket in self._buckets:
            assert bucket.work is not None
            bucket.work.wait()
            bucket.vector.div_(self._world.size)
            for parameter, view in zip(bucket.parameters, bucket.views, strict=True):
                parameter.grad = view
            bucket.missing, bucket.work = len(bucket.parameters), None
        self._sent = 0


def _split(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters of each bucket, about in the order in which a backward pass reaches them."""
    open_buckets: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in reversed(parameters):
        members = open_buckets.setdefault((parameter.dtype, parameter.device), [])
        members.append(parameter)
        if sum(p.nbytes for p in members) >= _BUCKET_BYTES:
            yield open_buckets.pop((parameter.dtype, parameter.device))
    yield from open_buckets.values()


def _bucket(parameters: list[nn.Parameter]) -> _Bucket:
    sizes = [p.numel() for p in parameters]
    vector = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    views = [part.view_as(p) for part, p in zip(vector.split(sizes), parameters, strict=True)]
    return _Bucket(parameters, vector, views, len(parameters))


@contextmanager
def _collective() -> Iterator[None]:
    """A failure of torch.distributed, which may be a plain RuntimeError, as a `CollectiveError`."""
    try:
        yield
    except RuntimeError as error:
        raise CollectiveError(_line(error)) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _number(variable: str, otherwise: int | None = None) -> int:
    text = os.environ.get(variable, "" if otherwise is None else str(otherwise))
    if not text.isdecimal():
        raise ValueError(f"{variable} in the environment must be a number, got {text!r}: torchrun sets it")
    return int(text)
