"""How much memory processes may still take."""

from pathlib import Path


def free_memory() -> int:
    """Bytes that processes may still take on this host, or in this container."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except OSError:  # the root of all groups, or another version of them
        return free
