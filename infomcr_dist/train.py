"""Train a classifier with the information-theoretic regularizer, alone or on many workers.

    python -m infomcr_dist.train [RECIPE.yaml] [key=value …]
    horovodrun -np 8 python -m infomcr_dist.train [RECIPE.yaml] [key=value …]

Without a recipe it trains launch/recipes/demo.yaml on Fashion-MNIST. SIGTERM or SIGINT to any worker ends all of them
after the step they are in, with that step saved. Exit code 0: trained; 75: stopped, go on with resume=auto; 2: a
mistake in the settings or the data, named in one line; 1: anything else.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from array import array
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infomcr_dist.budget import WINDOW
from infomcr_dist.config import Config
from infomcr_dist.evaluate import Curvature, Errors, estimate_curvature, evaluate
from infomcr_dist.fisher import Estimate
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.options import load_config
from infomcr_dist.regularizer import Losses, health, regularized_backward
from infomcr_dist.run import Run, prepare_run, save
from infomcr_dist.schedules import TimeShare
from infomcr_dist.telemetry import StepRecord
from infomcr_dist.world import Solo, Stopped, StopRequest, UserError, connect, report_and_leave

DEMO = Path(__file__).parent.parent / "launch" / "recipes" / "demo.yaml"
Durations = dict[str, "array[float]"]
_MEASURED_STEPS = 20
"""Regularized steps after which their overhead is announced."""


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: Solo,
    batch: tuple[Tensor, Tensor],
    *,
    weight: float,
    penalty: dict[str, Any] | None,
    bf16: bool = False,
    clip_gradient_norm: float | None = None,
) -> tuple[Losses, float, float]:
    """One update of L + βR_α (Jia & Su 2020, Algorithm 1), or of L where ``penalty`` is None.

    ``batch``: images (B, 3, H, W) float32, labels (B,) int64, of this worker; ``weight``: this worker's share of the
    global batch times the number of workers, so that the mean over workers is the mean over images. Returns the losses,
    the 2-norm of the averaged gradient and the seconds spent waiting for the allreduce. Where that norm is not finite
    the update is left out, BatchNorm's running statistics too: the average is the same on every worker, so all do so.
    """
    images, labels = batch
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    optimizer.zero_grad()
    losses = Losses(torch.zeros(()), torch.zeros(()))
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        if penalty is not None:
            losses = regularized_backward(model, criterion, images, labels, weight=weight, **penalty)
        elif len(labels):  # a last, smaller global batch may leave a worker without images: its gradient is zero
            loss = criterion(model(images), labels)
            (loss * weight).backward()
            losses = Losses(loss.detach(), torch.zeros(()))
    before = time.perf_counter()
    world.average_gradients(optimizer)
    waited = time.perf_counter() - before
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if torch.isfinite(norm):
        if clip_gradient_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_gradient_norm, norm)
        world.update(optimizer)
    else:
        for buffer, before_step in buffers:
            buffer.copy_(before_step)
    return losses, norm.item(), waited


def train(run: Run, stop: StopRequest) -> None:
    """Run the epochs that are left: steps, evaluation, metric, checkpoint; then the final table."""
    config, world, telemetry = run.config, run.world, run.telemetry
    criterion = nn.CrossEntropyLoss(label_smoothing=config.optimizer.label_smoothing)
    durations: Durations = {"plain": array("d"), "regularized": array("d")}

    def errors(split: str) -> Errors:
        images = run.test_images if split == "test" else run.train_images
        result = evaluate(run.model, images, run.splits[split], config.evaluation.batch_size, world)
        telemetry.event("evaluation", epoch=epoch + 1, split=split, **asdict(result))
        return result

    metric_time = TimeShare(config.metric.share, began=time.perf_counter())

    def metric_due(last: bool) -> bool:
        settings, plain = config.metric, _medians(durations)[0]
        if settings.trials == 0 or last:
            return settings.trials > 0
        if settings.every_epochs is not None:
            return _due(epoch, settings.every_epochs)
        # A per-sample gradient costs about as much as a plain step's share of an image; twice that, to be safe.
        images = settings.trials * settings.samples / run.order.global_batch
        return bool(world.broadcast(metric_time.allows(time.perf_counter(), guess=2 * images * (plain or math.inf))))

    def measure() -> Curvature:
        m, before = config.metric, time.perf_counter()
        result = estimate_curvature(run.model, run.train_images, run.splits["train"], m, config.seed, world)
        metric_time.add(time.perf_counter() - before)
        telemetry.event(
            "metric",
            epoch=epoch + 1,
            gamma_hat=result.gamma_hat.mean,
            gamma_hat_standard_error=result.gamma_hat.standard_error,
            gamma_hat_cost_seconds=metric_time.last,
            fisher_trace=result.trace.mean,
            fisher_spectral_radius=result.spectral_radius.mean,
            trials=m.trials,
            samples=m.samples,
            singular=result.gamma_hat.singular,
        )
        return result

    test = train = metric = None
    for epoch in range(run.first_step // run.order.steps, config.epochs):
        last = epoch + 1 == config.epochs
        training_loss = train_epoch(run, epoch, criterion, durations, stop)
        run.learning_rate.end_epoch(epoch, training_loss)
        world.average_buffers(run.model)
        test = errors("test") if last or _due(epoch, config.evaluation.every_epochs) else None
        train = errors("train") if last or _due(epoch, config.evaluation.train_every_epochs) else None
        metric = measure() if metric_due(last) else None
        telemetry.event("epoch", epoch=epoch + 1, epochs_completed=epoch + 1, training_loss=training_loss)
        telemetry.say(_epoch_line(epoch + 1, config.epochs, training_loss, test, train, metric, metric_time))
        if last or _due(epoch, config.checkpoint.every_epochs):
            save(run, (epoch + 1) * run.order.steps)
    assert test is not None
    assert train is not None
    plain, regularized = _medians(durations)
    telemetry.event("end", plain_step_seconds=plain, regularized_step_seconds=regularized)
    telemetry.say(_summary(run, test, train, metric.gamma_hat if metric else None, durations))


def train_epoch(run: Run, epoch: int, criterion: nn.Module, durations: Durations, stop: StopRequest) -> float:
    """Every global batch of an epoch once; returns the mean training loss over all workers' images.

    Raises `Stopped` on every worker, after the same step and with that step saved, when any was asked to stop.
    """
    config, world, telemetry = run.config, run.world, run.telemetry
    start = max(0, run.first_step - epoch * run.order.steps)
    total_loss, images_seen = run.epoch_loss if start else (0.0, 0.0)
    run.model.train()
    batches = run.training_images.batches(run.order.parts(epoch, world.rank, world.size, start))
    skipped, nonfinite = len(run.training_images.skipped), 0
    began = time.perf_counter()
    for part in run.order.parts(epoch, world.rank, world.size, start):
        stopping = world.any_later(stop.wanted)
        before = time.perf_counter()
        try:
            batch = next(batches)
        except ValueError as error:
            raise UserError(f"data: {error}") from error
        data_wait = time.perf_counter() - before
        skipped, new_errors = len(run.training_images.skipped), len(run.training_images.skipped) - skipped
        progress = epoch + part.step / run.order.steps
        step = epoch * run.order.steps + part.step
        rate = run.learning_rate.at(progress)
        was_on = run.penalty_weight.on_since is not None
        beta = run.penalty_weight.at(progress, rate)
        if beta is not None and not was_on:
            _announce_regularizer(run, epoch + 1, rate)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        # Random masks and drawn sub-batches depend on the step alone, so that a resumed run draws the same.
        torch.manual_seed((config.seed * 1_000_003 + step) * 65_537 + world.rank)
        penalised = None if beta is None else run.penalised(part, step)
        penalty = run.penalty(part, penalised, beta)
        losses, gradient_norm, allreduce_wait = train_step(
            run.model,
            criterion,
            run.optimizer,
            world,
            batch,
            weight=len(part.samples) * world.size / part.global_size,
            penalty=penalty,
            bf16=config.precision == "bf16",
            clip_gradient_norm=config.optimizer.clip_gradient_norm,
        )
        every = config.regularizer.health_every_steps
        if penalty is not None and every and step % every == 0:
            _report_health(run, criterion, batch)
        loss = losses.loss.item()  # also waits for the device, so that the step's time is the step's
        phase = "plain" if penalty is None else "regularized"
        total_loss, images_seen = total_loss + loss * len(part.samples), images_seen + len(part.samples)
        now = time.perf_counter()
        durations[phase].append(now - began)
        record = StepRecord(
            step=step + 1,
            epoch=epoch + 1,
            phase=phase,
            loss=loss,
            penalty=None if penalty is None else losses.penalty.item(),
            beta=None if penalty is None else beta,
            penalised=penalised,
            gradient_norm=gradient_norm,
            learning_rate=rate,
            samples=len(part.samples),
            data_errors=new_errors,
            step_duration_seconds=now - began,
            data_wait_seconds=data_wait,
            allreduce_wait_seconds=allreduce_wait,
        )
        began = now
        telemetry.step(record, part.global_size)
        nonfinite = 0 if math.isfinite(gradient_norm) else nonfinite + 1
        if nonfinite >= config.nonfinite_steps:
            raise UserError(
                f"the gradient was not finite in {nonfinite} steps in a row, up to step {step + 1} (loss {loss:g}, "
                f"rate {rate:g}): lower optimizer.learning_rate or regularizer.beta, go on from the last checkpoint",
                everywhere=True,
            )
        if stopping():
            save(run, step + 1, (total_loss, images_seen))
            raise Stopped(f"saved after step {step + 1}; go on with run_dir={run.directory} resume=auto")
        if run.budget is not None and (beta is None or penalised is not None):
            run.budget.observe(penalised, record.step_duration_seconds)
            if beta is not None and step % WINDOW == 0:
                telemetry.event("budget", overhead_ratio=run.budget.measured_ratio, penalised_mean=run.budget.mean)
                run.budget.mean = world.broadcast(run.budget.propose())
        if phase == "regularized" and len(durations[phase]) == _MEASURED_STEPS:
            _announce_overhead(run, durations)
    total_loss, images_seen = world.sum([total_loss, images_seen])
    return total_loss / images_seen


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    world = connect()
    try:
        config, recipe = Config(), DEMO
        with world.together():
            given = [a for a in arguments if "=" not in a]
            if len(given) > 1:
                raise ValueError(f"give one recipe, then key=value settings, got {' '.join(given)}")
            recipe = Path(given[0]) if given else DEMO
            config = load_config(Config, recipe, [a for a in arguments if "=" in a])
        run = prepare_run(config, recipe, world)
        try:
            with StopRequest() as stop:
                train(run, stop)
        finally:
            run.close()
    except world.ends as error:
        return report_and_leave(world, error)
    world.barrier()
    world.close()
    return 0


def _announce_regularizer(run: Run, epoch: int, rate: float) -> None:
    s, size, world = run.config.regularizer, run.sub_batch_size, run.world
    run.telemetry.event("regularizer_on", epoch=epoch, learning_rate=rate)
    run.telemetry.say(
        f"regularizer on in epoch {epoch}, at rate {rate:.3g}: {s.way}, α {s.alpha:g}, β {s.beta:g}, "
        f"{run.order.global_batch // world.size // (size or 1)} sub-batches of {size} images a worker"
    )


def _report_health(run: Run, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Compare the two derivatives of the penalty on this rank's first sub-batch, as they are in the run's precision."""
    images, labels = (tensor[: run.sub_batch_size] for tensor in batch)
    loss_fn, params = functional_loss(run.model, criterion), trainable_parameters(run.model)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"):
        ratio = health(loss_fn, params, (images, labels), run.config.regularizer.alpha)
    run.telemetry.event("health", penalty_health_ratio=ratio)


def _announce_overhead(run: Run, durations: Durations) -> None:
    plain, regularized = _medians(durations)
    if plain and regularized:
        run.telemetry.event("overhead", overhead_ratio=regularized / plain)
        run.telemetry.say(
            f"a regularized step takes {regularized / plain:.2f} × a plain one "
            f"({regularized * 1e3:.0f} ms against {plain * 1e3:.0f} ms, medians)"
        )


def _medians(durations: Durations) -> tuple[float | None, float | None]:
    """Median seconds of a plain and of a regularized step; None where there was none."""
    plain, regularized = (statistics.median(d) if d else None for d in durations.values())
    return plain, regularized


def _due(epoch: int, every: int) -> bool:
    return every > 0 and (epoch + 1) % every == 0


def _epoch_line(
    epoch: int,
    epochs: int,
    loss: float,
    test: Errors | None,
    train: Errors | None,
    metric: Curvature | None,
    metric_time: TimeShare,
) -> str:
    line = f"epoch {epoch}/{epochs}: training loss {loss:.4f}"
    for split, errors in (("test", test), ("train", train)):
        if errors is not None:
            line += f", {split} error {errors.top1_error_ratio:.2%}"
    if metric is not None:
        share = metric_time.spent / (time.perf_counter() - metric_time.began)
        line += f", γ̂ {_plus_minus(metric.gamma_hat)} (took {metric_time.last:.1f} s, so far {share:.1%} of the time)"
    return line


def _plus_minus(gamma: Estimate) -> str:
    if gamma.singular == gamma.trials:
        return "not measurable"
    return f"{gamma.mean:.1f} ± {gamma.standard_error:.1f}"


def _summary(run: Run, test: Errors, train: Errors, gamma: Estimate | None, durations: Durations) -> str:
    rows = ["", f"{'error':<24}{'test':>10}{'train':>10}{'gap':>10}"]
    for name in ("top1_error_ratio", "top5_error_ratio"):
        a, b = getattr(test, name), getattr(train, name)
        rows.append(f"{name[:3]}-{name[3]:<20}{a:>10.2%}{b:>10.2%}{a - b:>+10.2%}")
    rows.append(f"{'loss':<24}{test.loss:>10.4f}{train.loss:>10.4f}{test.loss - train.loss:>+10.4f}")
    if gamma is not None:
        metric = run.config.metric
        note = f"   (ln|ξ|, Eq. 6; {gamma.trials} trials of {metric.samples} training images)"
        if gamma.singular:
            note += f"   {gamma.singular} of {gamma.trials} Gram matrices are not positive definite and left out"
        rows.append(f"{'metric γ̂':<24}{_plus_minus(gamma):>10}{note}")
    plain, regularized = _medians(durations)
    for name, seconds in (("plain", plain), ("regularized", regularized)):
        if seconds is not None:
            rows.append(f"{name + ' step, median':<24}{seconds * 1e3:>7.1f} ms   ({len(durations[name])} steps)")
    if plain and regularized:
        rows.append(f"{'regularized / plain':<24}{regularized / plain:>10.2f}")
    rows += [
        "",
        f"run directory {run.directory}/",
        "  config.yaml     the settings of this run",
        "  records.jsonl   a record a step, an epoch, an evaluation",
        "  checkpoints/    to go on from: resume=" + str(run.directory) + " epochs=…",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
