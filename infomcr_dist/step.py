"""One update of the weights, on any engine: the trainer's, the doctor's and the benchmarks'."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from infomcr_dist.checks import Derivative
from infomcr_dist.config import OptimizerSettings, RegularizerSettings
from infomcr_dist.regularizer import Estimator, Losses, plain_backward, regularized_backward
from infomcr_dist.world import World


@dataclass(frozen=True)
class PenaltySettings:
    """How a step is regularized: the arguments of `regularized_backward`."""

    alpha: float
    beta: float
    sub_batch_size: int
    estimator: Estimator = "fused"
    num_sampled: int | None = None
    derivative: Derivative | Literal["auto"] = "auto"


class StepResult(NamedTuple):
    """What an update did; the same on every worker but for ``local`` and the times."""

    loss: float
    """L(B, w) of the global batch"""
    penalty: float
    """R_α of the global batch"""
    gradient_norm: float
    finite: bool
    flags: list[float]
    """Sums over the workers of the flags each gave"""
    local: Losses
    """Of this worker's part of the global batch"""
    gradient_seconds: float
    allreduce_wait_seconds: float
    update_seconds: float


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    batch: tuple[Tensor, Tensor],
    *,
    loss_scale: float,
    penalty: PenaltySettings | None,
    bf16: bool = False,
    clip_gradient_norm: float | None = None,
    max_batch_size: int | None = None,
    flags: Sequence[float] = (),
) -> StepResult:
    """One update of L + βR_α (Jia & Su 2020, Algorithm 1), or of L where ``penalty`` is None.

    Where loss, penalty or gradient of any worker is not finite, all workers skip the update, and BatchNorm's running
    statistics stay as they were.

    Args:
        model: what `World.distribute` returned.
        criterion: mean loss of logits (B, classes) and labels (B,).
        optimizer: likewise.
        world: the workers that take this step together.
        batch: images (B, 3, H, W) float32 and labels (B,) int64 of this worker; B may be 0.
        loss_scale: this worker's fraction of the global batch times the number of workers, so that the mean over
            workers is the mean over images.
        penalty: how the step is regularized.
        bf16: run the passes under autocast to bfloat16.
        clip_gradient_norm: largest 2-norm of the averaged gradient.
        max_batch_size: images that pass through the network at once; more are taken in pieces.
        flags: numbers that are added up over the workers while they wait for the gradient.
    """
    began = time.perf_counter()
    images, labels = batch
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    optimizer.zero_grad()
    local = Losses(torch.zeros((), device=images.device), torch.zeros((), device=images.device))
    if len(labels):  # a small global batch may leave a worker without images: its gradient is zero
        arguments: dict[str, Any] = {"loss_scale": loss_scale, "max_batch_size": max_batch_size}
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            if penalty is None:
                local = plain_backward(model, criterion, images, labels, **arguments)
            else:
                local = regularized_backward(model, criterion, images, labels, **arguments, **asdict(penalty))
    fraction = loss_scale / world.size
    losses = torch.stack([local.loss, local.penalty]).double() * fraction
    values = torch.cat([losses, torch.tensor(flags, dtype=torch.float64, device=images.device)])
    if images.is_cuda:
        torch.cuda.current_stream().synchronize()  # so that what follows is the wait for the others
    computed = time.perf_counter()
    loss, penalty_value, *summed_flags = world.average_gradients(optimizer, values)
    averaged = time.perf_counter()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    gradient_norm = norm.item()
    finite = all(map(math.isfinite, (loss, penalty_value, gradient_norm)))
    if finite:
        if clip_gradient_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_gradient_norm, norm)
        world.update(optimizer)
    else:
        for buffer, before_step in buffers:
            buffer.copy_(before_step)
    if images.is_cuda:
        torch.cuda.current_stream().synchronize()
    ended = time.perf_counter()
    times = (computed - began, averaged - computed, ended - averaged)
    return StepResult(loss, penalty_value, gradient_norm, finite, summed_flags, local, *times)


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a network's parameters, those without weight decay in a group of their own."""
    undecayed = [] if settings.decay_norm_and_bias else [p for p in model.parameters() if p.ndim <= 1]
    decayed = [p for p in model.parameters() if settings.decay_norm_and_bias or p.ndim > 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
        foreach=True,  # the same to the bit; on CPUs too one call for all parameters takes two thirds of the time
    )


def penalty_settings(
    settings: RegularizerSettings, sub_batch_size: int, beta: float, num_penalized: int
) -> PenaltySettings:
    """How a step is regularized, by the run's settings, at this β and with so many penalized sub-batches."""
    return PenaltySettings(
        alpha=settings.alpha,
        beta=beta,
        sub_batch_size=sub_batch_size,
        estimator=settings.estimator,
        num_sampled=num_penalized if settings.estimator == "sampled" else None,
        derivative=settings.derivative,
    )
