"""The workers of a Horovod job: the only module that imports horovod."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from typing import Any

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor, nn

from infomcr_dist.world import HostsChanged, World, local_device

_CYCLE_MILLISECONDS = "10"
"""Between two times at which Horovod's thread asks the other workers which gradients are ready. By default it does so
every millisecond, and each time takes a core from a worker that computes; a step on CPUs takes hundreds of them."""


class HorovodWorld(World):
    """The workers that ``horovodrun``, or ``mpirun`` with a Horovod built for it, started.

    Args:
        hang_timeout_seconds: after so long, a worker that takes no part in a collective ends it, as does a silent
            network (which is given at least a minute: a start may take it). None: never.
    """

    engine = "horovod"

    def __init__(self, hang_timeout_seconds: float | None) -> None:
        # Variables are read when Horovod starts; those that the user has set stand.
        if hang_timeout_seconds is not None:
            limit = str(math.ceil(hang_timeout_seconds))
            os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(math.ceil(hang_timeout_seconds / 2)))
            os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", limit)
            os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(max(60, math.ceil(hang_timeout_seconds))))
        if not torch.cuda.is_available():
            os.environ.setdefault("HOROVOD_CYCLE_TIME", _CYCLE_MILLISECONDS)
        self._hosts_changed = False
        self.elastic = os.environ.get("HOROVOD_ELASTIC") == "1"
        self._begin()
        self.exit_errors = (*self.exit_errors, HorovodInternalError)
        if self.elastic:
            from horovod.common.elastic import notification_manager

            self.restart_errors = (HorovodInternalError, HostsChanged)
            _reach_without_proxy(os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"])  # asked by HTTP, through urllib
            notification_manager.init()
            notification_manager.register_listener(self)
        self.device = local_device(self.local_rank)
        self._launcher: _Launcher | None = None
        server = [os.environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{part}") for part in ("ADDR", "PORT")]
        if server[0] and server[1] and (self.rank == 0 or self.elastic):  # mpirun has none, and notices by itself
            self._launcher = _Launcher(server[0], int(server[1]))

    def _begin(self) -> None:
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()

    def on_hosts_updated(self, timestamp: int, update: Any) -> None:
        """Called by Horovod, on rank 0, in a thread of its own."""
        self._hosts_changed = True

    def hosts_changed(self) -> bool:
        return self._hosts_changed

    def launcher_gone(self) -> bool:
        return self._launcher is not None and self._launcher.gone

    def restart(self) -> None:
        self._hosts_changed = False
        hvd.shutdown()
        self._begin()

    def distribute(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        distributed = hvd.DistributedOptimizer(optimizer, named_parameters=trained)
        distributed.defaults = optimizer.defaults  # Horovod takes over the parameter groups alone
        return model, distributed

    def average_gradients(self, optimizer: torch.optim.Optimizer, values: Tensor) -> Tensor:
        sums = hvd.allreduce_async(values, name="sums", op=hvd.Sum)
        optimizer.synchronize()  # type: ignore[attr-defined]
        return hvd.synchronize(sums)  # type: ignore[no-any-return]

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        with optimizer.skip_synchronize():  # type: ignore[attr-defined]
            optimizer.step()

    def broadcast(self, value: Any, root: int = 0) -> Any:
        # Without a name Horovod takes that of the value's type, and hangs where the workers' types differ.
        return hvd.broadcast_object(value, root_rank=root, name="broadcast")

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = hvd.allgather_object(value, name="gather")
        return values

    def average_buffers(self, model: nn.Module) -> None:
        buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        if buffers and self.size > 1:
            means: list[Tensor] = hvd.grouped_allreduce(list(buffers.values()), name="buffers")
            for buffer, mean in zip(buffers.values(), means, strict=True):
                buffer.copy_(mean)
        counters = {name: b for name, b in model.named_buffers() if not b.is_floating_point()}
        for name, counter in self.broadcast({name: b.cpu() for name, b in counters.items()}).items():
            counters[name].copy_(counter)

    def barrier(self) -> None:
        hvd.barrier()

    def close(self) -> None:
        hvd.shutdown()

    def abort(self) -> None:
        hvd.shutdown()


class _Launcher:
    """Watches the launcher's rendezvous server: a launcher whose host is lost closes no connection to its workers.

    Args:
        host: of the server.
        port: of the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self.gone = False
        """Whether it has not answered for about half a minute"""
        self._address = (host, port)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        failures = 0
        while failures < 3:
            try:
                with socket.create_connection(self._address, timeout=5) as connection:
                    failures = 0
                    connection.settimeout(None)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 2)):
                        connection.setsockopt(socket.IPPROTO_TCP, option, value)
                    while connection.recv(1024):  # until it ends: the server closes it after some seconds
                        pass
            except OSError:
                failures += 1
            time.sleep(2)
        self.gone = True


def _reach_without_proxy(host: str) -> None:
    """Add a host to those that urllib reaches without the proxy of ``http_proxy``."""
    others = os.environ.get("no_proxy", os.environ.get("NO_PROXY", ""))
    if others != "*":
        os.environ["no_proxy"] = f"{others},{host}" if others else host
