"""What sampling sub-batches costs: the variance of the penalty's gradient, and what training makes of it.

    python benchmarks/sampled_variance.py data=../shared/data/cifar10-jpeg.tar.gz images=3000 epochs=60 after=20 seed=0

Trains a small ResNet (one block a stage) on so many images of a tar of class folders for `epochs` epochs, and then

1. prints the variance of the penalty's part of a step at those weights, beta * (mean of g_i - h_i over the k sampled of
   M sub-batches), for k and for the number of workers, in variances of the plain gradient of one worker's batch;
2. trains for another `after` epochs at a tenth of the rate, from the same weights, by each estimator, and prints the
   training loss in eval mode, the test error and gamma_hat.
"""

import copy
import io
import math
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from infomcr_dist import regularized_backward
from infomcr_dist.curvature import gamma_hat
from infomcr_dist.functional import Batch, Params, functional_loss, gradient, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.models.layers import classifier, stem
from infomcr_dist.models.resnet import assemble, basic_block, projection
from infomcr_dist.regularizer import sub_batch_penalty
from pipelines.options import load

Step = Callable[[nn.Module, Tensor, Tensor], None]


@dataclass(frozen=True)
class Settings:
    """What is trained and measured."""

    data: str = "../shared/data/cifar10-jpeg.tar.gz"
    images: int = 3000
    test_images: int = 2000
    epochs: int = 60
    after: int = 20
    batch_size: int = 128
    sub_batch_size: int = 16
    alpha: float = 1e-4
    beta: float = 50.0
    seed: int = 0
    threads: int = 1


def load_images(path: Path, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` images (count, 3, H, W) in [-2, 2] and labels of the folders split/class/, drawn at random."""
    with tarfile.open(path) as tar:
        entries = [(m.name.split("/"), tar.extractfile(m).read()) for m in tar if m.isfile()]  # type: ignore[union-attr]
    chosen = [(name[1], data) for name, data in entries if name[0] == split and len(name) == 3]
    classes = sorted({name for name, _ in chosen})
    picks = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(chosen[i][1])).convert("RGB")) for i in picks])
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    return images.contiguous(), torch.tensor([classes.index(chosen[i][0]) for i in picks])


def resnet8(classes: int) -> nn.Module:
    """ResNet with one basic block a stage, widths 16, 32, 64."""
    blocks: list[nn.Module] = []
    inputs = 16
    for outputs in (16, 32, 64):
        stride = 1 if outputs == inputs else 2
        blocks.append(basic_block(inputs, outputs, stride, projection(inputs, outputs, stride)))
        inputs = outputs
    return assemble(stem(16, 32), blocks, classifier(64, classes))


def train(model: nn.Module, data: Batch, step: Step, epochs: int, rate: float, settings: Settings) -> None:
    """SGD with Nesterov momentum, cosine over the epochs, images as they are."""
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data[0]))
        for i in range(0, len(order) - settings.batch_size + 1, settings.batch_size):
            picks = order[i : i + settings.batch_size]
            optimizer.zero_grad()
            step(model, data[0][picks], data[1][picks])
            optimizer.step()
        schedule.step()


def plain(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    cross_entropy(model(images), labels).backward()


def alike(model: nn.Module, images: Tensor, labels: Tensor, settings: Settings, k: int) -> None:
    """Sampled, with the remainder in sub-batches too, so that all images are normalized by as many."""
    size, count = settings.sub_batch_size, settings.batch_size // settings.sub_batch_size
    head = k * size
    common: dict[str, Any] = {"alpha": settings.alpha, "sub_batch_size": size}
    # The batch is in random order. Two calls would move the running statistics twice.
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = 1 - math.sqrt(0.9)
    for part, beta in ((slice(0, head), settings.beta * count / k), (slice(head, None), 0.0)):
        share = len(images[part]) / len(images)
        regularized_backward(model, cross_entropy, images[part], labels[part], beta=beta, loss_scale=share, **common)
    for layer in layers:
        layer.momentum = 0.1


def variances(model: nn.Module, data: Batch, settings: Settings) -> None:
    """Print the first table, from `batches` random batches."""
    batches, size, count = 24, settings.sub_batch_size, settings.batch_size // settings.sub_batch_size
    loss_fn, params = functional_loss(model.train()), trainable_parameters(model)

    def flat(gradients: Params) -> Tensor:
        return torch.cat([gradient.flatten() for gradient in gradients.values()])

    whole, split, penalty = [], [], []
    for _ in range(batches):
        picks = torch.randperm(len(data[0]))[: settings.batch_size]
        images, labels = data[0][picks], data[1][picks]
        whole.append(flat(gradient(loss_fn(params, (images, labels)), params)))
        parts = [
            sub_batch_penalty(loss_fn, params, [part], settings.alpha)
            for part in zip(images.split(size), labels.split(size), strict=True)
        ]
        split.append(torch.stack([flat(part.loss_gradient) for part in parts]).mean(0))
        penalty.append(settings.beta * torch.stack([flat(part.penalty_gradient) for part in parts]))

    def variance(samples: Tensor) -> float:
        return float(samples.var(0).sum())

    plain_variance = variance(torch.stack(whole))
    means = torch.stack([terms.mean(0) for terms in penalty])
    shift = (torch.stack(split) - torch.stack(whole)).mean(0)
    within = sum(variance(terms) for terms in penalty) / batches
    rows: dict[str, Tensor | float] = {
        "plain gradient, square of its mean": torch.stack(whole).mean(0).square().sum(),
        "beta * penalty gradient, square of its mean": means.mean(0).square().sum(),
        "loss gradient by sub-batches, variance": variance(torch.stack(split)),
        "its mean less that of the plain gradient, squared": shift.square().sum(),
    }
    print("| in variances of the plain gradient of a batch | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {float(value) / plain_variance:.3g} |")
    print()
    workers = (1, 2, 8)
    print(f"| sampled k of M = {count} | " + " | ".join(f"{n} worker(s)" for n in workers) + " |")
    print("|---" * (1 + len(workers)) + "|")
    for k in (1, 2, 4, 8):
        if k <= count:
            total = variance(means) + (1 / k - 1 / count) * within
            print(f"| {k} | " + " | ".join(f"{total / n / plain_variance:.3f}" for n in workers) + " |")


def results(model: nn.Module, data: Batch, test: Batch) -> str:
    """Training loss and error, test error and gamma_hat of a model, in eval mode."""
    model.eval()
    with torch.no_grad():
        (train_logits, train_labels), (test_logits, test_labels) = (
            (torch.cat([model(part) for part in images.split(500)]), labels) for images, labels in (data, test)
        )
    loss = float(cross_entropy(train_logits, train_labels))
    train_error, test_error = (
        100 * float((logits.argmax(1) != labels).double().mean())
        for logits, labels in ((train_logits, train_labels), (test_logits, test_labels))
    )
    loss_fn, params, draws = functional_loss(model), trainable_parameters(model), torch.Generator().manual_seed(0)
    picks = [torch.randperm(len(data[0]), generator=draws)[:100] for _ in range(20)]
    gamma = gamma_hat(gradient_gram(loss_fn, params, (data[0][pick], data[1][pick])) for pick in picks)
    return f"{loss:.4f} | {train_error:.2f} | {test_error:.2f} | {gamma.mean:.1f} ± {gamma.standard_error:.1f}"


def main(settings: Settings) -> None:
    """Print both tables."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    data = load_images(Path(settings.data), "train", settings.images, settings.seed)
    test = load_images(Path(settings.data), "test", settings.test_images, settings.seed)
    start = resnet8(10)
    train(start, data, plain, settings.epochs, 0.1, settings)
    print(f"seed {settings.seed}, {settings.images} images, beta {settings.beta:g}, torch {torch.__version__}\n")
    variances(copy.deepcopy(start), data, settings)

    count = settings.batch_size // settings.sub_batch_size

    def estimate(beta: float = settings.beta, **how: Any) -> Step:
        common = {"alpha": settings.alpha, "beta": beta, "sub_batch_size": settings.sub_batch_size, **how}
        return lambda model, images, labels: void(regularized_backward(model, cross_entropy, images, labels, **common))

    quarter = max(1, count // 4)
    steps: dict[str, Step] = {
        "plain": plain,
        "fused": estimate(),
        "reference": estimate(estimator="reference"),
        "sampled 1/2": estimate(estimator="sampled", num_sampled=count // 2),
        "sampled 1/4": estimate(estimator="sampled", num_sampled=quarter),
        "sampled 1/4, remainder normalized alike": partial(alike, settings=settings, k=quarter),
        "sampled 1/4, beta / 2": estimate(settings.beta / 2, estimator="sampled", num_sampled=quarter),
        "sampled 1/4, beta / 4": estimate(settings.beta / 4, estimator="sampled", num_sampled=quarter),
        "fused, beta / 4": estimate(settings.beta / 4),
    }
    print("\n| estimator | train loss | train error, % | test error, % | gamma_hat |\n|---|---|---|---|---|")
    print(f"| before | {results(start, data, test)} |", flush=True)
    for name, step in steps.items():
        model = copy.deepcopy(start)
        train(model, data, step, settings.after, 0.01, settings)
        print(f"| {name} | {results(model, data, test)} |", flush=True)


def void(_: object) -> None:
    """For a lambda that returns nothing."""


if __name__ == "__main__":
    try:
        main(load(Settings, None, sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"sampled_variance: {error}")
