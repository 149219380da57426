import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from infomcr_dist import train
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


def test_a_run_has_one_precision_which_both_sets_of_flags_show() -> None:
    """Whatever was set before, in the older flags or in the newer ones."""
    run_fresh(
        "import warnings; warnings.simplefilter('error')\n"
        "import torch\n"
        "from infomcr_dist.precision import full_precision, set_float32_precision\n"
        "get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter\n"
        "def older(): torch.backends.cudnn.allow_tf32 = True\n"
        "befores = [lambda: None, older, lambda: put('generic', 'all', 'tf32'), lambda: put('cuda', 'conv', 'tf32'),\n"
        "           lambda: put('mkldnn', 'matmul', 'bf16'), lambda: torch.set_float32_matmul_precision('high')]\n"
        "def check():\n"
        "    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32\n"
        "    assert torch.get_float32_matmul_precision() == 'highest'\n"
        "    operations = [(b, o) for b in ('cuda', 'mkldnn') for o in ('all', 'matmul', 'conv', 'rnn')]\n"
        "    assert {get(*operation) for operation in operations} == {'ieee'}\n"
        "    with torch.backends.cudnn.flags(enabled=True): pass  # which reads the older flag\n"
        "for before in befores:\n"
        "    before()\n"
        "    set_float32_precision()\n"
        "    check()\n"
        "    with full_precision(torch.device('cpu')): check()\n"
        "    check()\n"
    )


def test_tf32_is_a_gpu_s_alone_and_ends_in_full_precision() -> None:
    run_fresh(
        "import warnings; warnings.simplefilter('error')\n"
        "import torch\n"
        "from infomcr_dist.precision import full_precision, rounds_float32, set_float32_precision\n"
        "get, gpu, cpu = torch._C._get_fp32_precision_getter, torch.device('cuda'), torch.device('cpu')\n"
        "def found(backend): return {get(backend, operation) for operation in ('matmul', 'conv', 'rnn')}\n"
        "assert not rounds_float32(gpu)\n"
        "for _ in range(2):\n"
        "    set_float32_precision(tf32=True)\n"
        "    for _ in range(2):\n"
        "        assert found('cuda') == {'tf32'} and found('mkldnn') == {'ieee'}\n"
        "        assert torch.get_float32_matmul_precision() == 'high'\n"
        "        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32\n"
        "        assert rounds_float32(gpu) and not rounds_float32(cpu)\n"
        "        with full_precision(cpu):\n"
        "            assert found('cuda') == {'ieee'} and not rounds_float32(gpu)\n"
        "    set_float32_precision()\n"
        "    assert found('cuda') == {'ieee'} and not rounds_float32(gpu)\n"
        "torch.set_float32_matmul_precision('high')\n"
        "assert rounds_float32(gpu), 'as a user of the library asks for it'\n"
    )


def test_deterministic_mode_needs_no_gpu_and_changes_no_bit_on_a_cpu() -> None:
    run_fresh(
        "import os, warnings; warnings.simplefilter('error')\n"
        "import torch\n"
        "from infomcr_dist.precision import set_deterministic\n"
        "def gradient():\n"
        "    torch.manual_seed(0)\n"
        "    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.MaxPool2d(2))\n"
        "    net(torch.randn(4, 3, 16, 16)).square().mean().backward()\n"
        "    return [p.grad for p in net.parameters()]\n"
        "before = gradient()\n"
        "os.environ.pop('CUBLAS_WORKSPACE_CONFIG', None)\n"
        "for deterministic in (True, False):\n"
        "    set_deterministic(deterministic)\n"
        "    assert torch.are_deterministic_algorithms_enabled() == deterministic\n"
        "    assert torch.backends.cudnn.benchmark == (not deterministic)\n"
        "    assert not torch.cuda.is_initialized()\n"
        "    assert all(map(torch.equal, before, gradient()))\n"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'\n"
        "os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':16:8'\n"
        "set_deterministic(True)\n"
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':16:8', 'what the user has set stands'\n"
    )


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_sets_its_flags_before_it_reaches_for_a_gpu(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    seen = []

    def connect(*_: Any) -> int:
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        seen.append((get("cuda", "conv"), get("cuda", "matmul")))
        return 0

    monkeypatch.setattr(train, "run_in_world", connect)
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    try:
        assert train.main([f"deterministic={str(deterministic).lower()}"]) == 0
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.backends.cudnn.benchmark = before[1]
    assert seen == [(deterministic, not deterministic), ("ieee", "ieee")]
