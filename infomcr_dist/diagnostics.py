"""What a run checks of itself while it trains: equal weights, finite numbers, the penalty's derivative and overhead."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.overhead_budget import WINDOW
from infomcr_dist.progress import Durations, overhead_line, regularizer_line
from infomcr_dist.records import (
    FiniteDifferenceRecord,
    NonfiniteRecord,
    OverheadBudgetRecord,
    OverheadRecord,
    RegularizerOnRecord,
)
from infomcr_dist.regularizer import Losses, finite_difference_error
from infomcr_dist.run import Run
from infomcr_dist.state import weights_digest
from infomcr_dist.step import StepResult
from infomcr_dist.world import Diverged, UserError


def compare_weights(run: Run, buffers: bool = False) -> None:
    """Compare the workers' weights to the bit, and the buffers if they are to be the same as well.

    Raises:
        Diverged: on every worker where one has other weights than the rest.
    """
    world, step = run.world, run.state.step
    if world.size == 1:
        return
    digests = world.gather(weights_digest(run.state.model, buffers))
    counts = Counter(digests)
    if len(counts) > 1:
        most, count = counts.most_common(1)[0]
        others = [str(rank) for rank, digest in enumerate(digests) if digest != most]
        who = f"rank {', '.join(others)} and the rest" if 2 * count > len(digests) else "the ranks, no two alike,"
        raise Diverged(
            f"{who} have different weights after step {step}: a fault of memory, processor or network; "
            f"resume from a checkpoint of step {run.equal_step}, after which they were equal, or earlier"
        )
    run.equal_step = step


def announce_regularizer(run: Run, epoch: int, rate: float) -> None:
    run.telemetry.log(RegularizerOnRecord(run.state.step, epoch, rate))
    sub_batches, size = run.experiment.num_sub_batches, run.experiment.sub_batch_size or 1
    run.telemetry.message(regularizer_line(run.config.regularizer, epoch, rate, sub_batches, size))


def announce_overhead(run: Run, durations: Durations) -> None:
    plain, regularized = durations.median("plain"), durations.median("regularized")
    if plain and regularized:
        run.telemetry.log(OverheadRecord(run.state.step, regularized / plain))
        run.telemetry.message(overhead_line(plain, regularized))


def follow_overhead_budget(run: Run, step: int, beta: float | None, num_penalized: int | None, seconds: float) -> None:
    """Measure a step, and now and then set how many sub-batches the next ones penalize, the same on all workers."""
    budget = run.state.overhead_budget
    if budget is None:
        return
    budget.observe(num_penalized, seconds)
    if beta is not None and step % WINDOW == 0:
        record = OverheadBudgetRecord(run.state.step, budget.ratio, budget.measured_ratio, budget.mean)
        run.telemetry.log(record)
        budget.mean = run.world.broadcast(budget.propose())


def log_finite_difference_error(run: Run, criterion: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Compare the two derivatives of the penalty on this rank's first sub-batch, as they are in the run's precision."""
    size, model, settings = run.experiment.sub_batch_size, run.state.model, run.config.regularizer
    loss_fn, params = functional_loss(model, criterion), trainable_parameters(model)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        error = finite_difference_error(loss_fn, params, (images[:size], labels[:size]), settings.alpha, settings.step)
    run.telemetry.log(FiniteDifferenceRecord(run.state.step, error))


def report_nonfinite(run: Run, result: StepResult, rate: float, in_a_row: int) -> None:
    """Report what was not finite, and where; end the run after too many in a row."""
    step = run.state.step
    local = run.world.gather([bool(torch.isfinite(value)) for value in result.local])
    what = [
        f"{name} of rank {r}"
        for r, ok in enumerate(local)
        for name, fine in zip(Losses._fields, ok, strict=True)
        if not fine
    ]
    if not what:
        parameters = run.state.model.named_parameters()
        bad = [name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
        what = [f"gradient of {', '.join(bad[:3])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")]
    run.telemetry.log(NonfiniteRecord(step, what, in_a_row))
    message = f"step {step} was skipped: not finite: {', '.join(what)}"
    run.telemetry.message(message)
    if in_a_row >= run.config.max_nonfinite_steps:
        raise UserError(
            f"{message}; so were the {in_a_row - 1} before it (rate {rate:g}): lower optimizer.learning_rate or "
            "regularizer.beta, resume from the last checkpoint",
            everywhere=True,
        )
