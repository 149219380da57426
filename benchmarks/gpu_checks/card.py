"""The card, and the two limits that steps are held against."""

from collections.abc import Iterator

import torch

from gpu_checks import Context, Row
from gpu_checks.timing import block_seconds


def copy_bytes_per_second(device: str, tiny: bool) -> float:
    """Bytes read and written by a copy on the device."""
    source = torch.empty(1 << (20 if tiny else 31), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(block_seconds(lambda: target.copy_(source), device) for _ in range(3))


def matmul_flop_per_second(device: str, tiny: bool, dtype: torch.dtype = torch.bfloat16) -> float:
    """Of a product of large square matrices of random numbers."""
    size = 128 if tiny else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(block_seconds(lambda: left @ right, device) for _ in range(3))


def card(context: Context) -> Iterator[Row]:
    """What the card is, and what it reaches."""
    device, tiny = context.device, context.tiny
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found = f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {facts.multi_processor_count} multiprocessors"
        built = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        yield Row("card", f"{found}; torch {torch.__version__}, {built}, NCCL {nccl}")
    else:
        yield Row("card", f"CPU; torch {torch.__version__}")
    rate = copy_bytes_per_second(device, tiny)
    yield Row("copy", f"{rate / 1e12:.2f} TB/s", figures={"bytes_per_second": rate})
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rate = matmul_flop_per_second(device, tiny, dtype)
        yield Row(f"matmul, {name}", f"{rate / 1e12:.0f} TFLOP/s", figures={"flop_per_second": rate})
    for name in ("tf32", "ieee"):
        if device == "cuda":
            torch.backends.cuda.matmul.fp32_precision = name
        rate = matmul_flop_per_second(device, tiny, torch.float32)
        label = {"tf32": "TF32", "ieee": "fp32"}[name]
        yield Row(f"matmul, {label}", f"{rate / 1e12:.1f} TFLOP/s", figures={"flop_per_second": rate})
