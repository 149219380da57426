"""Whether a network can be trained and measured, before the first epoch rather than at the end of it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist.checks import Derivative, Method, Step, devices
from infomcr_dist.config import Config
from infomcr_dist.estimators import Estimator
from infomcr_dist.functional import Criterion, functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.models import build
from infomcr_dist.passes import repeatable, unwrapped
from infomcr_dist.regularizer import plain_backward, regularized_backward
from infomcr_dist.replica import replica


def check_model(
    model: nn.Module,
    criterion: Criterion,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int | None = None,
    alpha: float = 1e-4,
    beta: float = 1.0,
    sub_batches: int | None = None,
    sub_batch_size: int | None = None,
    estimator: Estimator = "fused",
    num_sampled: int | None = None,
    derivative: Derivative | Literal["auto"] = "auto",
    step: Step = "auto",
    method: Method = "infomcr",
    rho: float | None = None,
    penalty: bool = True,
    metric: bool = True,
    metric_criterion: Criterion = F.cross_entropy,
) -> None:
    """Take a plain step, a regularized step and a Gram matrix on a copy of `model`, whose state, gradients and random
    numbers stay as they are. To be called under the autocast of the training.

    Args:
        model: The network, in training mode; may be wrapped in DistributedDataParallel, but nothing is sent.
        criterion: Its loss, a mean over its batch.
        images: (B, ...), a few sub-batches of training images.
        labels: (B,).
        classes: The model must return logits (B, classes); not checked by default.
        alpha: As for `regularized_backward`, and so on for the settings that follow.
        penalty: Whether to take the regularized step.
        metric: Whether to take the Gram matrix of gamma_hat, of two images.
        metric_criterion: Its loss.

    Raises:
        ValueError: In one line, what does not work.
    """
    inner = unwrapped(model)
    tensors = {
        id(parameter): nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for parameter in inner.parameters()
    }
    with repeatable(devices(dict(inner.named_parameters()))):
        own, own_criterion = replica((inner, criterion), tensors)
        with _one_line("the forward pass"):
            output = own(images.clone())
        if classes is not None and (not isinstance(output, Tensor) or output.shape != (len(images), classes)):
            got = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"model must return logits ({len(images)}, {classes}), got {got}")
        with _one_line("the plain step"):
            plain_backward(own, own_criterion, images, labels)
        if penalty:
            with _one_line("the regularized step"):
                regularized_backward(
                    own,
                    own_criterion,
                    images,
                    labels,
                    alpha=alpha,
                    beta=beta,
                    sub_batches=sub_batches,
                    sub_batch_size=sub_batch_size,
                    estimator=estimator,
                    num_sampled=num_sampled,
                    derivative=derivative,
                    step=step,
                    method=method,
                    rho=rho,
                )
        if metric:
            with _one_line("the Gram matrix of gamma_hat"):
                few = images[:2], labels[:2]
                gradient_gram(functional_loss(own, metric_criterion), trainable_parameters(own), few)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what the device does not compute in."""
    if precision == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise ValueError(
            f"precision=tf32 needs a GPU of compute capability 8.0 or later, this worker computes on {device}: use fp32"
        )


def check_run(config: Config, classes: int, image_size: int, sub_batch_size: int | None, device: torch.device) -> str:
    """`check_model` of a network of the run's kind, on random images and as far as the run goes.

    Args:
        config: The run's settings.
        classes: Of the data set.
        image_size: Side of the images, pixels.
        sub_batch_size: Images a sub-batch; None: the run is never regularized.
        device: Where the network is built; no generator of random numbers is changed.

    Returns:
        What works.

    Raises:
        ValueError: In one line, what does not work, and the remedy.
    """
    size, settings = sub_batch_size, config.regularizer
    check_precision(config.precision, device)
    metric = config.metric.trials > 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is slow is reported by the run itself
        torch.manual_seed(config.seed)
        model = build(config.model, classes, image_size, config.frozen).to(device).train()
        count = 2 * (size or 1)
        images = torch.randn(count, 3, image_size, image_size, device=device)
        labels = torch.arange(count, device=device) % classes
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                check_model(
                    model,
                    nn.CrossEntropyLoss(label_smoothing=config.optimizer.label_smoothing),
                    images,
                    labels,
                    classes=classes,
                    alpha=settings.alpha,
                    beta=settings.weight,
                    sub_batch_size=size,
                    estimator=settings.estimator,
                    num_sampled=1 if settings.estimator == "sampled" else None,
                    derivative=settings.derivative,
                    step=settings.step,
                    method=settings.method,
                    rho=settings.radius,
                    penalty=size is not None,
                    metric=metric,
                )
        except ValueError as error:
            raise ValueError(
                f"model={config.model}: {error}: give another network, or do without "
                "(regularizer.when=never, metric.trials=0)"
            ) from error
    parts = ["a plain step", *(["a regularized step"] if size is not None else []), *(["γ̂"] if metric else [])]
    return f"{', '.join(parts)} of {config.model}"


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Any exception as a ValueError of one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what} does not work with this model: {kind}{text[:300]}") from error
