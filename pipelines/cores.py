"""How many cores this process may use."""

import math
import os
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """Cores of this process: those it is bound to, or the processor time its control groups grant, if that is less.

    Args:
        root: of the file system with ``proc`` and ``sys``.

    Returns:
        At least 1; a granted fraction of a core counts as one.
    """
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), _granted(root))))


def _granted(root: Path) -> float:
    """Cores that the strictest control group around this process grants (versions 1 and 2); infinity if none does."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    groups = root / "sys/fs/cgroup"
    cores = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = groups / controllers if (groups / controllers).is_dir() else groups / "cpu" if controllers else groups
        # In a container the path may be that of the host, which is not to be seen here: then the top is its group.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                cores = min(cores, _limit(folder))
    return cores


def _limit(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such group, or "max"
        return math.inf
