"""Times of calls on a device, in interleaved rounds."""

import math
import random
import time
from collections.abc import Callable

import torch

from gpu_checks import synchronize

_BLOCK_SECONDS = 0.03
"""Calls follow each other for about so long, as steps of a run do: the host may be ahead of the device."""


def block_seconds(call: Callable[[], object], device: str, block: float = _BLOCK_SECONDS) -> float:
    """Seconds of a call within a block of calls; the first one warms up, the second sets the block's length."""
    call()
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    count = max(1, round(block / max(time.perf_counter() - began, 1e-9)))
    return _block(call, count, device)


def _block(call: Callable[[], object], count: int, device: str) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / count


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, device: str, until: float = math.inf
) -> dict[str, list[float]]:
    """Seconds of each call in each round; a round takes a block of every kind, in random order.

    None begins after `until`, by time.monotonic, but the first.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        once = _block(call, 1, device)
        counts[name] = max(1, round((_BLOCK_SECONDS if device == "cuda" else 0.0) / max(once, 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for name in random.sample(list(calls), len(calls)):
            seconds[name].append(_block(calls[name], counts[name], device))
    return seconds


def kernels(call: Callable[[], object], device: str) -> int:
    """Kernels that a call launches; on a CPU, operations."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CUDA] if device == "cuda" else [activity.CPU]
    with torch.profiler.profile(activities=kinds) as profiler:
        call()
        synchronize(device)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    if device == "cpu":
        return sum(event.name().startswith("aten::") for event in events)
    copies = ("Memcpy", "Memset")
    return sum(str(event.device_type()).endswith("CUDA") and not event.name().startswith(copies) for event in events)
