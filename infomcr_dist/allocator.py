"""Freed memory stays with the process, for the next step."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep memory that this process frees, for what it allocates next.

    By default glibc returns large blocks to the kernel, and every step gets the memory of its activations anew, as
    pages that the kernel clears and maps one by one. An allocator that the environment sets up is left alone.

    Returns:
        Whether it is kept; False also where the C library is not glibc.
    """
    environment = os.environ
    chosen = (
        any(name.startswith("MALLOC_") for name in environment)
        or "glibc.malloc." in environment.get("GLIBC_TUNABLES", "")
        or "malloc" in environment.get("LD_PRELOAD", "")  # jemalloc, tcmalloc, mimalloc
    )
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if chosen or mallopt is None:
        return False
    # No block has a mapping of its own, and the end of the heap is never given back.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
