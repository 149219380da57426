"""Process-wide flags of torch: those of a run, and full precision while a block runs, which threads may share."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

_FULL = "ieee"
_TF32 = "tf32"
# From the general to the particular: a precision that is not set follows the one above it.
_PRECISIONS = (
    ("generic", "all"),
    ("cuda", "all"),
    ("mkldnn", "all"),
    *((backend, operation) for backend in ("cuda", "mkldnn") for operation in ("matmul", "conv", "rnn")),
)
_FUSED_ATTENTION: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
)


class _Shared:
    """Changes that the first thread to enter makes and the last to leave takes back."""

    def __init__(self, change: Callable[[], list[Callable[[], None]]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: list[Callable[[], None]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._restore = self._change()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for restore in reversed(self._restore):
                        restore()


def _full_float32() -> list[Callable[[], None]]:
    """Sets only what does not follow from above, so that what was not set before is not set after."""
    get: Any = torch._C._get_fp32_precision_getter
    put: Any = torch._C._set_fp32_precision_setter
    restore: list[Callable[[], None]] = []
    for where in _PRECISIONS:
        if (before := get(*where)) == _FULL:
            continue
        put(*where, _FULL)

        def back(where: tuple[str, str] = where, before: str = before) -> None:
            if get(*where) == _FULL:  # else the user has set it since
                put(*where, before)

        restore.append(back)
    return restore


def _unfused_attention() -> list[Callable[[], None]]:
    restore: list[Callable[[], None]] = []
    for enabled, enable in _FUSED_ATTENTION:
        if enabled():
            enable(False)
            restore.append(lambda enable=enable: enable(True))  # type: ignore[misc]
    return restore


_float32 = _Shared(_full_float32)
_attention = _Shared(_unfused_attention)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast on `device`, and neither TF32 nor bfloat16 inside float32 products, while it lasts.

    The precision of float32 products is the process's: other threads compute in full precision meanwhile. Calls may
    overlap; after the last of them every flag is as it was, unless the user has set it in between. Where
    `torch.backends.cudnn.allow_tf32` is True, as it is at first, torch refuses to read it meanwhile.
    """
    with _float32(), torch.autocast(device.type, enabled=False):
        yield


def math_attention() -> AbstractContextManager[None]:
    """Attention in plain operations, which have a second derivative and a rule for `vmap`, while it lasts."""
    return _attention()


def set_float32_precision(tf32: bool = False) -> None:
    """The precision of every float32 product and convolution of this process, from now on: IEEE, or TF32 on a GPU.

    What cuDNN does on its own is TF32. Torch keeps two sets of flags, and refuses to read the older, such as
    `torch.backends.cudnn.allow_tf32`, where the two differ: both are set.

    Args:
        tf32: TF32 in those of an NVIDIA GPU; those of a CPU are IEEE in either case.
    """
    torch._C._set_cudnn_allow_tf32(tf32)
    torch.set_float32_matmul_precision("highest")
    put: Any = torch._C._set_fp32_precision_setter
    for where in _PRECISIONS:
        put(*where, "none")
    put(*_PRECISIONS[0], _FULL)
    if tf32:
        torch.set_float32_matmul_precision("high")
        put("mkldnn", "matmul", _FULL)  # which that has set as well
        put("cuda", "conv", _TF32)
        put("cuda", "rnn", _TF32)


def rounds_float32(device: torch.device) -> bool:
    """Whether `device` takes float32 matrix products in TF32, which torch does only where it is asked to."""
    get: Any = torch._C._get_fp32_precision_getter
    return device.type == "cuda" and bool(get("cuda", "matmul") == _TF32)


def set_deterministic(deterministic: bool) -> None:
    """Let the GPU give the same bits for the same numbers every time, or let it choose the fastest way.

    Call it before the first product on a GPU. An operation that has no deterministic form warns once and runs as it is.
    A CPU gives the same bits in either case.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # For finding faults; it costs a pass over the memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic  # tries what is fastest, and may choose otherwise next time
