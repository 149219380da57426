"""Time of a regularized step relative to a plain step, for each estimator and the paper's networks.

    python benchmarks/step.py
    python benchmarks/step.py model=wrn_18_1_5 image_size=128 classes=1000 batch_size=64 sub_batch_size=16 threads=2

A round takes one step of every kind, in random order; a ratio compares the steps of one round. A step is forward,
backward and the SGD update. The table gives medians and, in brackets, the quartiles over the rounds. "plain, split" is
the plain gradient accumulated over the sub-batches: what a processor gains or loses by small batches alone. Images are
in the memory format channels_last, as loaders give them, where the table does not say contiguous. Freed memory is kept,
as in a run; keep_memory=false shows by the time in the kernel and the memory what that changes.
"""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from interleaved import measure
from torch.nn.functional import cross_entropy

from infomcr_dist import regularized_backward
from infomcr_dist.allocator import keep_freed_memory
from infomcr_dist.models import build
from pipelines.options import load


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    model: str = "resnet20"
    image_size: int = 32
    classes: int = 10
    batch_size: int = 128
    sub_batch_size: int = 16
    threads: int = 1
    rounds: int = 15
    keep_memory: bool = True
    """Whether freed memory is kept, as `infomcr train` does"""


def estimators(sub_batches: int) -> dict[str, dict[str, Any]]:
    """Settings of `regularized_backward` by the name in the table."""
    sampled = {
        f"sampled 1/{part}": {"estimator": "sampled", "num_sampled": sub_batches // part}
        for part in (8, 4, 2)
        if sub_batches % part == 0
    }
    return {
        "fused": {"estimator": "fused"},
        **sampled,
        "reference": {"estimator": "reference"},
        "fused, exact": {"estimator": "fused", "derivative": "exact"},
    }


def main(settings: Settings) -> None:
    """Print the table."""
    if settings.keep_memory:
        keep_freed_memory()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = build(settings.model, settings.classes, settings.image_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    images = torch.randn(settings.batch_size, 3, settings.image_size, settings.image_size)
    contiguous, images = images, images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(settings.classes, (settings.batch_size,))

    def plain(images: torch.Tensor, size: int) -> None:
        for image_part, label_part in zip(images.split(size), labels.split(size), strict=True):
            (cross_entropy(model(image_part), label_part) * (size / len(images))).backward()

    def regularized(images: torch.Tensor, how: dict[str, Any]) -> None:
        common: dict[str, Any] = {"alpha": 1e-4, "beta": 10.0, "sub_batch_size": settings.sub_batch_size}
        regularized_backward(model, cross_entropy, images, labels, **common, **how)

    def step(backward: Callable[[], None]) -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    calls: dict[str, Callable[[], object]] = {
        "plain": partial(step, partial(plain, images, settings.batch_size)),
        "plain, split": partial(step, partial(plain, images, settings.sub_batch_size)),
        "plain, contiguous": partial(step, partial(plain, contiguous, settings.batch_size)),
        "fused, contiguous": partial(step, partial(regularized, contiguous, {"estimator": "fused"})),
    }
    for name, how in estimators(settings.batch_size // settings.sub_batch_size).items():
        calls[name] = partial(step, partial(regularized, images, how))
    timings = measure(calls, settings.rounds)
    usage = resource.getrusage(resource.RUSAGE_SELF)

    print(
        f"{settings.model} at {settings.image_size}x{settings.image_size}, {settings.batch_size} images, "
        f"sub-batches of {settings.sub_batch_size}, threads: {settings.threads}, {settings.rounds} rounds, "
        f"torch {torch.__version__}; in all {usage.ru_utime:.0f} s of processor time, {usage.ru_stime:.0f} s in the "
        f"kernel, {usage.ru_maxrss / 1024:.0f} MB\n"
    )
    print("| step | ms | x plain | x plain, processor time |\n|---|---|---|---|")
    for name, timing in timings.items():
        print(f"| {name} | {1000 * timing.seconds:.0f} | {timing.ratio} | {timing.processor_ratio} |")


if __name__ == "__main__":
    try:
        main(load(Settings, None, sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"step: {error}")
