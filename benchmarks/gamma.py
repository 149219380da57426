"""Time and peak memory of one Gram matrix of per-sample gradients, in forward-backward passes over the same images.

    python benchmarks/gamma.py
    python benchmarks/gamma.py model=wrn_18_1_5 image_size=128 classes=1000 rounds=3 per_sample=false

"forward-backward" is one pass over the N images in eval mode, which gives the ordinary gradient. "one backward per
sample" is the authors' way: N of them, with J (N, W) held for the product (not with `per_sample=false`).
Rounds are interleaved; the table gives medians, in brackets quartiles, and the peak of what torch allocates.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from interleaved import measure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.models import build
from pipelines.options import load


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    model: str = "resnet20"
    image_size: int = 32
    classes: int = 10
    samples: int = 100
    threads: int = 1
    rounds: int = 7
    per_sample: bool = True


def one_backward_per_sample(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """xi from J as a whole."""
    params = list(model.parameters())
    jacobian = torch.empty(len(images), sum(parameter.numel() for parameter in params))
    for n in range(len(images)):
        loss = cross_entropy(model(images[n : n + 1]), labels[n : n + 1])
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)], out=jacobian[n])
    return (jacobian @ jacobian.T).double()


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that torch has allocated, during the call, beyond what it had before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(accumulate(sizes)))


def main(settings: Settings) -> None:
    """Print the table."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    model = build(settings.model, settings.classes, settings.image_size).eval()
    images = torch.randn(settings.samples, 3, settings.image_size, settings.image_size)
    labels = torch.randint(settings.classes, (settings.samples,))
    loss_fn, params = functional_loss(model), trainable_parameters(model)

    def forward_backward() -> None:
        torch.autograd.grad(cross_entropy(model(images), labels), list(params.values()))

    kinds: dict[str, Callable[[], object]] = {
        "forward-backward": forward_backward,
        "gradient_gram": lambda: gradient_gram(loss_fn, params, (images, labels)),
    }
    if settings.per_sample:
        kinds["one backward per sample"] = lambda: one_backward_per_sample(model, images, labels)
    peak = {name: peak_bytes(call) for name, call in kinds.items()}
    timings = measure(kinds, settings.rounds)

    print(
        f"{settings.model} at {settings.image_size}x{settings.image_size}, {settings.samples} images, "
        f"threads: {settings.threads}, {settings.rounds} rounds, torch {torch.__version__}\n"
    )
    print("| | s | x forward-backward | x, processor time | peak, GB |\n|---|---|---|---|---|")
    for name, timing in timings.items():
        ratios = f"{timing.ratio} | {timing.processor_ratio}"
        print(f"| {name} | {timing.seconds:.2f} | {ratios} | {peak[name] / 1e9:.2f} |")


if __name__ == "__main__":
    try:
        main(load(Settings, None, sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"gamma: {error}")
