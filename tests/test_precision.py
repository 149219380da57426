import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from infomcr_dist.precision import full_precision, math_attention

CPU = torch.device("cpu")
get: Any = torch._C._get_fp32_precision_getter
put: Any = torch._C._set_fp32_precision_setter
OPERATIONS = [
    ("generic", "all"),
    *((backend, kind) for backend in ("cuda", "mkldnn") for kind in ("all", "matmul", "conv", "rnn")),
]


def precisions() -> dict[tuple[str, str], str]:
    return {where: get(*where) for where in OPERATIONS}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = precisions()
    yield
    for where, value in before.items():
        put(*where, value)
    assert precisions() == before


def run_fresh(code: str) -> None:
    """In a process of its own, whose flags nobody has set."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_all_float32_products_are_full_and_afterwards_as_before() -> None:
    put("mkldnn", "matmul", "bf16")
    put("cuda", "all", "tf32")
    before = precisions()
    with torch.autocast("cpu", torch.bfloat16), full_precision(CPU):
        assert set(precisions().values()) == {"ieee"}
        assert not torch.is_autocast_enabled("cpu")
    assert precisions() == before


def test_a_later_setting_still_reaches_what_was_not_set() -> None:
    run_fresh(
        "import torch\n"
        "from infomcr_dist.precision import full_precision\n"
        "get = torch._C._get_fp32_precision_getter\n"
        "assert torch.backends.cudnn.allow_tf32\n"
        "with full_precision(torch.device('cpu')): assert get('cuda', 'conv') == 'ieee'\n"
        "assert get('cuda', 'conv') == 'tf32' and torch.backends.cudnn.allow_tf32\n"
        "torch.backends.fp32_precision = 'ieee'\n"
        "assert {get(b, o) for b in ('cuda', 'mkldnn') for o in ('matmul', 'conv')} == {'ieee'}\n"
        "torch.backends.fp32_precision = 'tf32'\n"
        "with full_precision(torch.device('cpu')): pass\n"
        "assert {get(b, o) for b in ('cuda', 'mkldnn') for o in ('matmul', 'conv')} == {'tf32'}\n"
        "torch.backends.fp32_precision = 'none'\n"
        "torch.set_float32_matmul_precision('high')\n"
        "with full_precision(torch.device('cpu')): assert get('cuda', 'matmul') == 'ieee'\n"
        "assert torch.get_float32_matmul_precision() == 'high' and torch.backends.cuda.matmul.allow_tf32\n"
    )


def test_overlapping_threads_leave_no_trace_and_are_full_to_their_end() -> None:
    put("mkldnn", "conv", "bf16")
    before = precisions()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen: list[set[str]] = []

    def first() -> None:
        with full_precision(CPU):
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> None:
        assert first_in.wait(10)
        with full_precision(CPU):
            second_in.set()
            assert first_out.wait(10)
            seen.append(set(precisions().values()))

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [{"ieee"}]
    assert precisions() == before


def test_what_the_user_sets_meanwhile_stays() -> None:
    put("mkldnn", "matmul", "bf16")
    with full_precision(CPU):
        put("mkldnn", "matmul", "tf32")
    assert get("mkldnn", "matmul") == "tf32"


def test_an_exception_restores_the_flags() -> None:
    put("mkldnn", "matmul", "bf16")
    with pytest.raises(RuntimeError, match="stop"), full_precision(CPU), math_attention():
        raise RuntimeError("stop")
    assert get("mkldnn", "matmul") == "bf16"
    assert torch.backends.cuda.flash_sdp_enabled()


def test_attention_in_plain_operations_has_a_second_derivative() -> None:
    q, k, v = torch.randn(3, 2, 1, 4, 8, requires_grad=True).unbind()
    with math_attention():
        out = F.scaled_dot_product_attention(q, k, v)
    (g,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert torch.autograd.grad(g.sum(), k)[0].abs().sum() > 0
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


def test_attention_that_the_user_has_turned_off_stays_off() -> None:
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        with math_attention():
            pass
        assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
