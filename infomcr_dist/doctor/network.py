"""Whether the hosts reach each other, their clocks agree, and an allreduce gives the mean."""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections.abc import Iterable

import torch
from torch import nn

from infomcr_dist.config import TelemetrySettings
from infomcr_dist.doctor.results import Result, attempt
from infomcr_dist.own_address import is_loopback, listen
from infomcr_dist.world import World

CLOCK_SECONDS = 1.0
"""Clocks further than this from rank 0's fail: times in records, metrics and alerts would not line up."""
_ALLREDUCE_BYTES = 64 << 20
_ROUNDS = 5
_CONNECT_SECONDS = 5.0


def check_network(results: list[Result], settings: TelemetrySettings, world: World) -> None:
    """Telemetry's port, the hosts' names and connections, clocks and an allreduce, together with the other ranks."""
    attempt(results, "telemetry port", check_port, settings, world.local_rank)
    _check_hosts(results, world)
    attempt(results, "clock", judge_clocks, clock_offsets(world))
    _check_allreduce(results, world)


def check_port(settings: TelemetrySettings, local_rank: int) -> str:
    """Whether this rank's endpoint can be opened; ValueError if its port is taken."""
    if settings.port is None:
        return "none wanted (telemetry.port=null)"
    port = settings.port + local_rank
    try:
        if port > 65535:
            raise OSError("ports end at 65535")
        family, _, _, _, address = socket.getaddrinfo(settings.address, port, type=socket.SOCK_STREAM)[0]
        socket.create_server((address[0], port), family=family).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{port} on {settings.address} (telemetry.port={settings.port} + local rank {local_rank}) cannot be used "
            f"({reason}): give another telemetry.port, or telemetry.port=null"
        ) from None
    return f"{settings.port} + local rank, on {settings.address}, is free"


def judge_name(host: str, address: str, hosts: int) -> str:
    """ValueError where a host's own name leads to itself alone, and there are others: gloo connects to that address."""
    if hosts > 1 and is_loopback(address):
        raise ValueError(
            f"{host} calls itself {address}, which other hosts cannot reach: "
            f"let {host} resolve to its network's address in its /etc/hosts"
        )
    return f"{host} is {address}"


def reach(others: Iterable[tuple[str, str, int]]) -> str:
    """Connect to each (host, address, port); ValueError lists those that do not answer."""
    failures, count = [], 0
    for host, address, port in others:
        count += 1
        try:
            socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            failures.append(f"{host} at {address} ({error.strerror or error})")
    if failures:
        raise ValueError(f"not reached: {', '.join(failures)}: open the ports between the hosts (all of TCP)")
    return f"{count} other host{'s' * (count > 1)} reached"


def clock_offsets(world: World) -> list[float]:
    """Seconds by which the clock of each rank is ahead of rank 0's, to some milliseconds."""
    rounds = []
    for _ in range(_ROUNDS):
        world.barrier()
        rounds.append(world.gather(time.time()))
    return [statistics.median(times[rank] - times[0] for times in rounds) for rank in range(world.size)]


def judge_clocks(offsets: list[float]) -> str:
    """ValueError if a clock is further than CLOCK_SECONDS from rank 0's."""
    if len(offsets) == 1:
        return "one process"
    rank = max(range(len(offsets)), key=lambda i: abs(offsets[i]))
    figures = f"rank {rank}'s is {offsets[rank]:+.3f} s from rank 0's"
    if abs(offsets[rank]) > CLOCK_SECONDS:
        raise ValueError(f"{figures}, more than {CLOCK_SECONDS:g} s: set the hosts' clocks by NTP (chrony)")
    return f"{figures}, the furthest"


def payload(device: torch.device) -> nn.Module:
    """A module that is 64 MB of buffers."""
    module = nn.Module()
    module.register_buffer("payload", torch.empty(_ALLREDUCE_BYTES // 4, device=device))
    return module


def reduce_once(buffers: nn.Module, world: World) -> float:
    """Seconds of an allreduce of the buffers of `payload`. ValueError if its result is not the mean over the ranks."""
    buffer = buffers.get_buffer("payload")
    buffer.fill_(world.rank)
    world.barrier()
    before = time.perf_counter()
    world.average_buffers(buffers)
    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)
    seconds = time.perf_counter() - before
    expected = (world.size - 1) / 2
    if not bool((buffer == expected).all()):
        raise ValueError(
            f"the mean over {world.size} ranks is wrong ({buffer.mean():g} for {expected:g}): launch/setup.sh"
        )
    return seconds


def _check_hosts(results: list[Result], world: World) -> None:
    """Every host's own name, and one rank of each host connecting to all others."""
    made: list[Result] = []
    own = attempt(made, "host name", listen)
    offers = world.gather((socket.gethostname(), own and own.address, own and own.port))
    hosts = [host for host, _, _ in offers]
    if own is None:
        results += made
    else:
        attempt(results, "host name", judge_name, own.host, own.address, len(set(hosts)))
    if len(set(hosts)) > 1 and hosts.index(hosts[world.rank]) == world.rank:
        first = {offer[0]: offer for offer in reversed(offers)}
        others = [o for host, o in first.items() if host != hosts[world.rank] and o[1] and not is_loopback(o[1])]
        attempt(results, "hosts", reach, others)
    world.barrier()
    if own is not None:
        own.server.close()


def _check_allreduce(results: list[Result], world: World) -> None:
    made: list[Result] = []
    buffers = attempt(made, "allreduce", payload, world.device)
    if not all(world.gather(buffers is not None)):
        results += [result for result in made if not result.ok]
        return
    seconds: list[float] = []
    for _ in range(_ROUNDS):
        taken = attempt(made, "allreduce", reduce_once, buffers, world)
        seconds += [] if taken is None else [taken]
    slowest = max(world.gather(statistics.median(seconds) if seconds else math.inf))
    rate = f"64 MB in {1e3 * slowest:.3g} ms, {_ALLREDUCE_BYTES / slowest / 1e9:.2f} GB/s (median of {_ROUNDS})"
    wrong = next((result for result in made if not result.ok), None)
    results.append(wrong or Result("allreduce", True, rate if world.size > 1 else "one process"))
