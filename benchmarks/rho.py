"""Error of the penalty's gradient by finite differences in low precision, by the step's relative length rho.

    python benchmarks/rho.py
    python benchmarks/rho.py model=wrn_28_2 steps=50

Trains a network for a few plain steps on random images, then compares (alpha / epsilon) (g - h) under autocast to
bfloat16 with alpha H g in float64, over the sub-batches of one batch: relative error of the whole, cosine, and ratio of
lengths; and the same difference in float64, whose error is that of the step alone (curvature, kinks of ReLU).
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from infomcr_dist.checks import Derivative, Step
from infomcr_dist.functional import Params, functional_loss, trainable_parameters
from infomcr_dist.models import build
from infomcr_dist.regularizer import sub_batch_penalty
from pipelines.options import load


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    model: str = "resnet20"
    image_size: int = 16
    classes: int = 10
    batch_size: int = 64
    sub_batch_size: int = 16
    steps: int = 10
    """Plain steps before."""
    rhos: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    device: str = "cpu"


def main(settings: Settings) -> None:
    """Print the table."""
    torch.manual_seed(0)
    device = torch.device(settings.device)
    model = build(settings.model, settings.classes, settings.image_size).to(device)
    shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
    labels = torch.randint(settings.classes, (settings.batch_size,), device=device)
    # Images that have their class in them, so that there is something to learn.
    patterns = torch.randn(settings.classes, *shape[1:], device=device)
    images = torch.randn(shape, device=device) + patterns[labels]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    exact = penalty(model.double(), images.double(), labels, settings, "exact", "alpha")

    def row(step: Step) -> str:
        single, double = (found(step, low) for low in (True, False))
        cells = [
            f"{float((one - exact).norm() / exact.norm()):.3f} | {float(cosine_similarity(one, exact, dim=0)):.3f} | "
            f"{float(one.norm() / exact.norm()):.2f}"
            for one in (single, double)
        ]
        return f"| {step} | {' | '.join(cells)} |"

    def found(step: Step, low: bool) -> Tensor:
        model.to(torch.float32 if low else torch.float64)
        data = images.float() if low else images.double()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            vector = penalty(model, data, labels, settings, "finite_difference", step)
        model.double()
        return vector

    print(f"{settings.model}, {settings.batch_size} images of {settings.image_size} pixels, sub-batches of ", end="")
    print(f"{settings.sub_batch_size}, after {settings.steps} steps, {device}, torch {torch.__version__}\n")
    print(
        "| rho | bfloat16: error | cosine | length | float64: error | cosine | length |\n|---|---|---|---|---|---|---|"
    )
    for rho in settings.rhos:
        print(row(rho), flush=True)


def penalty(
    model: torch.nn.Module, images: Tensor, labels: Tensor, settings: Settings, derivative: Derivative, step: Step
) -> Tensor:
    """The gradient of R as one float64 vector."""
    parts = list(zip(images.split(settings.sub_batch_size), labels.split(settings.sub_batch_size), strict=True))
    loss_fn, params = functional_loss(model), trainable_parameters(model)
    result = sub_batch_penalty(loss_fn, params, parts, 1e-4, derivative, step)
    gradient: Params = result.penalty_gradient
    return torch.cat([gradient[name].double().flatten() for name in params])


if __name__ == "__main__":
    try:
        main(load(Settings, None, sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"rho: {error}")
