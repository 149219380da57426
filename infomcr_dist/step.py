"""One update of the weights, on any engine: the trainer's, the doctor's and the benchmarks'."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from infomcr_dist.checks import RELATIVE_STEP, Derivative, Method, Step
from infomcr_dist.config import RegularizerSettings
from infomcr_dist.estimators import Estimator
from infomcr_dist.first_order import Penalty
from infomcr_dist.graphs import Graphs, update
from infomcr_dist.precision import rounds_float32
from infomcr_dist.regularizer import Losses, plain_backward, regularized_backward
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
    step: Step = "auto"
    method: Method = "infomcr"
    rho: float | None = None

    def of(self, images: int, rounded: bool) -> Penalty:
        """The same for `FirstOrder`, of a batch of so many images, in passes that round as bfloat16 or TF32 does."""
        step = (RELATIVE_STEP if rounded else "alpha") if self.step == "auto" else self.step
        sub_batches = images // self.sub_batch_size
        relative = None if step == "alpha" else float(step)
        rho = relative if self.method == "infomcr" else self.rho
        return Penalty(self.alpha, rho, sub_batches, self.num_sampled or sub_batches, self.method)


class StepResult(NamedTuple):
    """What an update did; the same on every worker but for ``local`` and the times."""

    loss: float
    """L(B, w) of the global batch"""
    penalty: float
    """R of the global batch"""
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
    graphs: Graphs | None = None,
) -> StepResult:
    """One update of L + βR (Jia & Su 2020, Algorithm 1; other penalties: `methods`), or of L where ``penalty`` is None.

    Where loss, penalty or gradient of any worker is not finite, all workers skip the update, and BatchNorm's running
    statistics stay as they were.

    Args:
        model: what `World.distribute` returned.
        criterion: mean loss of logits (B, classes) and labels.
        optimizer: likewise.
        world: the workers that take this step together.
        batch: images (B, 3, H, W) float32 of this worker, and labels (B,) int64 or as probabilities (B, classes); B may
            be 0.
        loss_scale: this worker's fraction of the global batch times the number of workers, so that the mean over
            workers is the mean over images.
        penalty: how the step is regularized.
        bf16: run the passes under autocast to bfloat16.
        clip_gradient_norm: largest 2-norm of the averaged gradient.
        max_batch_size: images that pass through the network at once; more are taken in pieces.
        flags: numbers that are added up over the workers while they wait for the gradient.
        graphs: take the step by these where they can.
    """
    images, labels = batch
    clock = _Clock(images.device)
    fraction = loss_scale / world.size
    rounded = bf16 or rounds_float32(images.device)
    if graphs is not None and not _captures(penalty, len(labels), rounded, max_batch_size):
        graphs = None
    buffers: list[tuple[Tensor, Tensor]] = []
    if graphs is not None:
        beta, kind = (0.0, None) if penalty is None else (penalty.beta, penalty.of(len(labels), rounded))
        local = Losses(*graphs.backward(images, labels, kind, beta, loss_scale))
    else:
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
    losses = torch.stack([local.loss, local.penalty]).double() * fraction
    values = torch.cat([losses, torch.tensor(flags, dtype=torch.float64).to(images.device, non_blocking=True)])
    clock.mark()
    sums = world.average_gradients(optimizer, values)
    clock.mark()
    if graphs is not None:
        outcome = graphs.update(sums[:2])
    else:
        parameters = [p for p in model.parameters() if p.grad is not None]
        outcome = update(parameters, optimizer, world, sums[:2], clip_gradient_norm)
    clock.mark()
    # The one wait for the device in a step.
    loss, penalty_value, *summed_flags, gradient_norm, finite = torch.cat([sums, outcome]).tolist()
    if not finite:
        for buffer, before_step in buffers:
            buffer.copy_(before_step)
    return StepResult(loss, penalty_value, gradient_norm, bool(finite), summed_flags, local, *clock.seconds())


def _captures(penalty: PenaltySettings | None, count: int, rounded: bool, max_batch_size: int | None) -> bool:
    """Whether `Graphs` takes a step of so many images."""
    if count == 0 or (max_batch_size is not None and count > max_batch_size):
        return False
    return penalty is None or (
        not count % penalty.sub_batch_size
        and first_order_only(penalty.estimator, penalty.derivative, penalty.step, rounded)
    )


def first_order_only(estimator: Estimator, derivative: str, step: Step, rounded: bool) -> bool:
    """Whether regularized steps of these settings are what `FirstOrder` takes: first-order passes, all of them in the
    precision of the run, where the paper's step would be noise if that is bfloat16 or TF32."""
    return estimator != "reference" and derivative != "exact" and not (rounded and step == "alpha")


class _Clock:
    """Times on the device between the marks, which do not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each two marks; the device has passed the last of them."""
        if self._cuda:
            return [first.elapsed_time(second) / 1000 for first, second in pairwise(self._marks)]
        return [second - first for first, second in pairwise(self._marks)]


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
        step=settings.step,
        method=settings.method,
        rho=settings.radius,
    )
