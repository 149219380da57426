import os
import subprocess
import sys
from pathlib import Path

import pytest

from infomcr_dist import allocator, train

BLOCK = 64 << 20
PROGRAM = f"""
import ctypes, resource, runpy, sys
if sys.argv[1] == "keep":
    kept = runpy.run_path(sys.argv[2])["keep_freed_memory"]()
else:
    kept = False
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
libc.free.argtypes = (ctypes.c_void_p,)
def step():
    block = libc.malloc({BLOCK})
    libc.memset(block, 1, {BLOCK})
    libc.free(block)
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str, environment: dict[str, str]) -> tuple[bool, int]:
    """Whether the process said that it keeps freed memory, and its page faults in 20 steps of 64 MB."""
    command = [sys.executable, "-c", PROGRAM, mode, str(Path(allocator.__file__))]
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    done = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_freed_memory_is_kept_for_the_next_step() -> None:
    said, faults = page_faults("keep", {})
    _, otherwise = page_faults("leave", {})
    assert said
    assert faults < 20
    assert otherwise > 20 * BLOCK / (4 << 20)  # a fault gives 4 kB, or 2 MB with huge pages


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_ARENA_MAX": "2"},
        {"MALLOC_CONF": "narenas:2"},
        {"GLIBC_TUNABLES": "glibc.pthread.rseq=1:glibc.malloc.mmap_threshold=1000000"},
        {"LD_PRELOAD": "/nonexistent/libjemalloc.so.2"},
    ],
    ids=lambda environment: next(iter(environment)),
)
def test_an_allocator_that_the_environment_sets_up_is_left_alone(environment: dict[str, str]) -> None:
    said, faults = page_faults("keep", environment)
    assert not said
    assert faults > 20 * BLOCK / (4 << 20)


def test_another_tunable_is_no_choice_of_an_allocator() -> None:
    said, faults = page_faults("keep", {"GLIBC_TUNABLES": "glibc.pthread.rseq=1", "LD_PRELOAD": ""})
    assert said
    assert faults < 20


def test_training_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: calls.append(None))
    assert train.main(["no-such-recipe"]) == 2
    assert calls == [None]
