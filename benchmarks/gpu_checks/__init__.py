"""The checks of `benchmarks/gpu.py`, one module a topic: each check is a generator of rows."""

import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Context:
    """What a check is given."""

    device: str
    """cuda or cpu"""
    tiny: bool
    """Sizes that show that the check works, and nothing else"""
    work: Path
    """Scratch folder that the checks of one run share"""
    seconds: float
    """After so long the check is killed"""


@dataclass
class Row:
    """A line of the table."""

    name: str
    found: str
    goal: str = ""
    met: bool | None = None
    """None: there is no goal"""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured, for the JSON"""


def synchronize(device: str) -> None:
    """Wait for the device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def wait_for_imports(context: Context) -> str:
    """Name of the device; CUDA is initialised."""
    import torch

    if context.device == "cpu":
        return "CPU"
    torch.zeros(1, device="cuda")
    return torch.cuda.get_device_name()


def interpreter(*module: str) -> list[str]:
    """A command of this Python; a module of a kit without its console script is run by its name."""
    return [sys.executable, "-W", "ignore", "-m", *module]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (quartiles)."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def host_synchronizations(device: str, call: Callable[[], object]) -> int | None:
    """How often the call makes the host wait for a GPU; None on a CPU."""
    import torch

    if device == "cpu":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)
