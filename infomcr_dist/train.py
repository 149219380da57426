"""Train a classifier with the information-theoretic regularizer, alone or on many workers.

    python -m infomcr_dist.train [RECIPE.yaml] [key=value …]
    horovodrun -np 8 python -m infomcr_dist.train [RECIPE.yaml] [key=value …]

Without a recipe it trains launch/recipes/demo.yaml on Fashion-MNIST. SIGTERM or SIGINT to any worker ends all of them
after the step they are in, with that step saved. Exit code 0: trained; 75: stopped, go on with resume=auto; 2: a
mistake in the settings or the data, named in one line; 1: anything else.

Under launch/elastic.sh workers may come and go: every worker keeps the state after the last step in memory, and a world
of another size goes on from there. A worker that gets SIGTERM there leaves after its step, and the others go on.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infomcr_dist.budget import WINDOW
from infomcr_dist.checkpoint import write_atomically
from infomcr_dist.config import Config
from infomcr_dist.evaluate import Curvature, Errors, estimate_curvature, evaluate
from infomcr_dist.fisher import Estimate
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.options import load_config
from infomcr_dist.regularizer import Losses, health, plain_backward, regularized_backward
from infomcr_dist.run import Committed, Run, measured_images, prepare_run, save, snapshot, weights_digest
from infomcr_dist.schedules import TimeShare
from infomcr_dist.telemetry import StepRecord
from infomcr_dist.watchdog import Watchdog
from infomcr_dist.world import (
    Diverged,
    HostsChanged,
    Solo,
    Stopped,
    StopRequest,
    UserError,
    connect,
    report_and_leave,
)

DEMO = Path(__file__).parent.parent / "launch" / "recipes" / "demo.yaml"
Durations = dict[str, "array[float]"]
_MEASURED_STEPS = 20
"""Regularized steps after which their overhead is announced."""


class Outcome(NamedTuple):
    """What an update did; the same on every worker but for ``local`` and the times."""

    loss: float
    """L(B, w) of the global batch"""
    penalty: float
    """R_α of the global batch"""
    gradient_norm: float
    finite: bool
    told: list[float]
    """sums over the workers of what each told"""
    local: Losses
    """of this worker's part"""
    gradient_seconds: float
    allreduce_wait_seconds: float
    update_seconds: float


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
    max_batch_size: int | None = None,
    tell: Sequence[float] = (),
) -> Outcome:
    """One update of L + βR_α (Jia & Su 2020, Algorithm 1), or of L where ``penalty`` is None.

    ``batch``: images (B, 3, H, W) float32, labels (B,) int64, of this worker; ``weight``: this worker's share of the
    global batch times the number of workers, so that the mean over workers is the mean over images. ``tell``: numbers
    to be added up over the workers while they wait for the gradient. Where loss, penalty or gradient of any worker is
    not finite, all leave the update out, BatchNorm's running statistics too.
    """
    began = time.perf_counter()
    images, labels = batch
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    optimizer.zero_grad()
    local = Losses(torch.zeros((), device=images.device), torch.zeros((), device=images.device))
    if len(labels):  # a small global batch may leave a worker without images: its gradient is zero
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            common: dict[str, Any] = {"weight": weight, "max_batch_size": max_batch_size}
            if penalty is None:
                local = plain_backward(model, criterion, images, labels, **common)
            else:
                local = regularized_backward(model, criterion, images, labels, **common, **penalty)
    told = torch.tensor(tell, dtype=torch.float64, device=images.device)
    share = weight / world.size
    sums = world.sum_later(torch.cat([torch.stack([local.loss, local.penalty]).double() * share, told]))
    if images.is_cuda:
        torch.cuda.current_stream().synchronize()  # so that what follows is the wait for the others
    computed = time.perf_counter()
    world.average_gradients(optimizer)
    averaged = time.perf_counter()
    loss, penalty_value, *told_by_all = sums()
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
    return Outcome(loss, penalty_value, gradient_norm, finite, told_by_all, local, *times)


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
        measured = measured_images(config, run.splits["train"])
        result = estimate_curvature(run.model, run.train_images, measured, m, config.seed, world)
        metric_time.add(time.perf_counter() - before)
        telemetry.event(
            "metric",
            epoch=epoch + 1,
            gamma_hat=result.gamma_hat.mean,
            gamma_hat_standard_error=result.gamma_hat.standard_error,
            gamma_hat_cost_seconds=metric_time.last,
            metric_duration_seconds=metric_time.last,
            fisher_trace=result.trace.mean,
            fisher_spectral_radius=result.spectral_radius.mean,
            trials=m.trials,
            samples=m.samples,
            gamma_hat_singular_trials=result.gamma_hat.singular,
        )
        return result

    test = train = metric = None
    _commit(run, run.first_epoch, run.first_step, run.epoch_loss)
    for epoch in range(run.first_epoch, config.epochs):
        last = epoch + 1 == config.epochs
        training_loss = train_epoch(run, epoch, criterion, durations, stop)
        world.place = f"the end of epoch {epoch + 1}"
        run.learning_rate.end_epoch(epoch, training_loss)
        world.average_buffers(run.model)
        _compare_weights(run, (epoch + 1) * run.order.steps, buffers=True)
        test = errors("test") if last or _due(epoch, config.evaluation.every_epochs) else None
        train = errors("train") if last or _due(epoch, config.evaluation.train_every_epochs) else None
        metric = measure() if metric_due(last) else None
        telemetry.event("epoch", epoch=epoch + 1, epochs_completed=epoch + 1, training_loss=training_loss)
        telemetry.say(_epoch_line(epoch + 1, config.epochs, training_loss, test, train, metric, metric_time))
        due, best = last or _due(epoch, config.checkpoint.every_epochs), False
        if due and test is not None and (run.best_error is None or test.top1_error_ratio < run.best_error):
            run.best_error, best = test.top1_error_ratio, True
        state = _commit(run, epoch + 1, (epoch + 1) * run.order.steps)
        if due:
            save(run, state, best)
    assert test is not None
    assert train is not None
    plain, regularized = _medians(durations)
    telemetry.event("end", plain_step_seconds=plain, regularized_step_seconds=regularized)
    failure = _last_save(run)
    telemetry.say(_summary(run, test, train, metric.gamma_hat if metric else None, durations))
    telemetry.push()
    if failure is not None:
        raise Stopped(f"trained, but the last checkpoint is missing: {failure}", saved=False)


def train_epoch(run: Run, epoch: int, criterion: nn.Module, durations: Durations, stop: StopRequest) -> float:
    """Every global batch of an epoch once; returns the mean training loss over all workers' images.

    Raises `Stopped` after the same step on every worker, with that step saved, when any was asked to stop (in an
    elastic world on those that were asked), and `HostsChanged` where the launcher has told of other hosts.
    """
    config, world, telemetry = run.config, run.world, run.telemetry
    start = max(0, run.first_step - epoch * run.order.steps)
    total_loss, images_seen = run.epoch_loss if start else (0.0, 0.0)
    run.model.train()
    batches = run.training_images.batches(run.order.parts(epoch, world.rank, world.size, start))
    skipped, nonfinite = len(run.training_images.skipped), 0
    began = time.perf_counter()
    for part in run.order.parts(epoch, world.rank, world.size, start):
        before = time.perf_counter()
        try:
            batch = next(batches)
        except ValueError as error:
            raise UserError(f"data: {error}") from error
        data_wait = time.perf_counter() - before
        skipped, new_errors = len(run.training_images.skipped), len(run.training_images.skipped) - skipped
        progress = epoch + part.step / run.order.steps
        step = epoch * run.order.steps + part.step
        world.place = f"step {step + 1}"
        rate = run.learning_rate.at(progress)
        was_on = run.penalty_weight.on_since is not None
        beta = run.penalty_weight.at(progress, rate)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        # Random masks and drawn sub-batches depend on the step alone, so that a resumed run draws the same.
        torch.manual_seed((config.seed * 1_000_003 + step) * 65_537 + world.rank)
        penalised = None if beta is None else run.penalised(part, step)
        penalty = run.penalty(part, penalised, beta)
        outcome = train_step(
            run.model,
            criterion,
            run.optimizer,
            world,
            batch,
            weight=len(part.samples) * world.size / part.global_size,
            penalty=penalty,
            bf16=config.precision == "bf16",
            clip_gradient_norm=config.optimizer.clip_gradient_norm,
            max_batch_size=config.data.max_batch_size,
            tell=(stop.wanted, world.hosts_changed()),
        )
        phase = "plain" if penalty is None else "regularized"
        if outcome.finite:
            total_loss += outcome.loss * part.global_size
            images_seen += part.global_size
        now = time.perf_counter()
        durations[phase].append(now - began)
        record = StepRecord(
            step=step + 1,
            epoch=epoch + 1,
            phase=phase,
            loss=outcome.loss,
            penalty=None if penalty is None else outcome.penalty,
            beta=None if penalty is None else beta,
            penalised=penalised,
            gradient_norm=outcome.gradient_norm,
            finite=outcome.finite,
            learning_rate=rate,
            samples=len(part.samples),
            global_samples=part.global_size,
            world_size=world.size,
            data_errors=new_errors,
            step_duration_seconds=now - began,
            data_wait_seconds=data_wait,
            gradient_seconds=outcome.gradient_seconds,
            allreduce_wait_seconds=outcome.allreduce_wait_seconds,
            update_seconds=outcome.update_seconds,
            penalty_duration_seconds=_penalty_duration(run, phase, outcome.gradient_seconds),
            allreduce_bytes=run.gradient_bytes,
        )
        began = now
        telemetry.step(record)
        if beta is not None and not was_on:
            _announce_regularizer(run, epoch + 1, rate)
        every = config.regularizer.health_every_steps
        if penalty is not None and every and step % every == 0 and len(part.samples):
            _report_health(run, criterion, batch)
        if run.budget is not None and (beta is None or penalised is not None):
            run.budget.observe(penalised, record.step_duration_seconds)
            if beta is not None and step % WINDOW == 0:
                telemetry.event("budget", overhead_ratio=run.budget.measured_ratio, penalised_mean=run.budget.mean)
                run.budget.mean = world.broadcast(run.budget.propose())
        if phase == "regularized" and len(durations[phase]) == _MEASURED_STEPS:
            _announce_overhead(run, durations)
        nonfinite = 0 if outcome.finite else nonfinite + 1
        if nonfinite:
            _tell_nonfinite(run, step + 1, outcome, rate, nonfinite)
        if config.compare_weights_steps and (step + 1) % config.compare_weights_steps == 0:
            _compare_weights(run, step + 1)
        _tell_saved(run)
        if telemetry.launcher_gone:
            stop.want()
        asked, hosts_changed = outcome.told
        due = config.checkpoint.every_steps is not None and (part.step + 1) % config.checkpoint.every_steps == 0
        if world.elastic or asked or due:
            state = _commit(run, epoch, step + 1, (total_loss, images_seen))
            if asked or due:
                save(run, state)
        if asked:
            _stop(run, step + 1, leave=stop.wanted or not world.elastic)
        if hosts_changed:
            raise HostsChanged
    return total_loss / images_seen if images_seen else math.nan


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    config, recipe, mistake = Config(), DEMO, None
    try:
        given = [a for a in arguments if "=" not in a]
        if len(given) > 1:
            raise ValueError(f"give one recipe, then key=value settings, got {' '.join(given)}")
        recipe = Path(given[0]) if given else DEMO
        config = load_config(Config, recipe, [a for a in arguments if "=" in a])
    except ValueError as error:
        mistake = error
    world = connect(config.hang_seconds)
    stop = StopRequest(config.stop_seconds)
    with ExitStack() as stack:
        stack.callback(stop.close)
        if config.hang_seconds is not None and world.size > 1:
            stack.callback(Watchdog(f"rank {world.rank}", config.hang_seconds).close)
        if config.pid_dir is not None:
            stack.callback(_pid_file(config.pid_dir, world).unlink, missing_ok=True)
        try:
            _run_to_the_end(config, recipe, mistake, world, stop)
        except world.ends as error:
            return report_and_leave(world, error)
        if not world.elastic:
            world.barrier()
        world.close()
    return 0


def _run_to_the_end(config: Config, recipe: Path, mistake: Exception | None, world: Solo, stop: StopRequest) -> None:
    """Prepare and train; where an elastic world is restarted, again from the last committed step.

    All collectives are within the loop: a worker that joins meets the others at its beginning.
    """
    committed: Committed | None = None
    while True:
        run = None
        try:
            with world.together():
                if mistake is not None:
                    raise mistake
                if config.pid_dir is not None:
                    path = _pid_file(config.pid_dir, world)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, lambda file: file.write(b"%d\n" % os.getpid()))
            run = prepare_run(config, recipe, world, committed)
            stop.listen()
            if committed is not None:
                _tell_reset(run)
            train(run, stop)
            return
        except world.resets as error:
            committed = run.committed if run is not None and run.committed is not None else committed
            if committed is not None:
                reason = "hosts_changed" if isinstance(error, HostsChanged) else "worker_lost"
                committed.resets[reason] = committed.resets.get(reason, 0) + 1
        finally:
            if run is not None:
                run.close()
        world.restart()


def _pid_file(directory: str, world: Solo) -> Path:
    return Path(directory) / f"rank-{world.local_rank}.pid"


def _commit(run: Run, epoch: int, step: int, epoch_loss: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    """A copy of the state; an elastic world goes on from the last one."""
    state = snapshot(run, epoch, step, epoch_loss)
    if run.world.elastic:
        run.committed = Committed(run.directory, state, dict(run.resets))
    return state


def _stop(run: Run, step: int, leave: bool) -> None:
    """End this worker, with the step saved; or wait until it is, where only others were asked to leave."""
    failure = _last_save(run)
    if leave:
        again = f"go on with run_dir={run.directory} resume=auto"
        if failure is not None:
            raise Stopped(
                f"step {step} could not be saved: {failure}; {again} from the checkpoint before it", saved=False
            )
        raise Stopped(f"saved after step {step}; {again}")


def _last_save(run: Run) -> str | None:
    """Wait until the last checkpoint is written; why it could not be, on every worker."""
    run.checkpoints.wait()
    return run.world.broadcast(_tell_saved(run))  # type: ignore[no-any-return]


def _tell_saved(run: Run) -> str | None:
    """Report the checkpoints that were written or failed since the last call; why the last of them failed."""
    failure = None
    for saved in run.checkpoints.finished():
        failure = saved.error
        run.telemetry.event(
            "checkpoint",
            saved_step=saved.step,
            outcome="written" if saved.error is None else "failed",
            checkpoint_duration_seconds=saved.seconds,
            error=saved.error,
        )
        if saved.error is not None:
            run.telemetry.say(f"checkpoint: {saved.error}; training goes on, the checkpoint before it is kept")
    return failure


def _tell_reset(run: Run) -> None:
    run.telemetry.event("reset", elastic_resets=run.resets, world_size=run.world.size)
    counts = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in run.resets.items())
    run.telemetry.say(
        f"the run goes on after step {run.first_step} with {run.world.size} workers (restarts so far: {counts})"
    )


def _tell_nonfinite(run: Run, step: int, outcome: Outcome, rate: float, in_a_row: int) -> None:
    """Say what was not finite, and where; end the run after too many in a row."""
    local = run.world.gather([bool(torch.isfinite(value)) for value in outcome.local])
    what = [
        f"{name} of rank {r}"
        for r, ok in enumerate(local)
        for name, fine in zip(Losses._fields, ok, strict=True)
        if not fine
    ]
    if not what:
        bad = [n for n, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        what = [f"gradient of {', '.join(bad[:3])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")]
    run.telemetry.event("nonfinite", what=what, in_a_row=in_a_row)
    message = f"step {step} was left out: not finite: {', '.join(what)}"
    run.telemetry.say(message)
    if in_a_row >= run.config.nonfinite_steps:
        raise UserError(
            f"{message}; so were the {in_a_row - 1} before it (rate {rate:g}): lower optimizer.learning_rate or "
            "regularizer.beta, go on from the last checkpoint",
            everywhere=True,
        )


def _compare_weights(run: Run, step: int, buffers: bool = False) -> None:
    """Raises `Diverged` on every worker where one has other weights than the rest."""
    if run.world.size == 1:
        return
    digests = run.world.gather(weights_digest(run.model, buffers))
    counts = Counter(digests)
    if len(counts) > 1:
        most, count = counts.most_common(1)[0]
        others = [str(rank) for rank, digest in enumerate(digests) if digest != most]
        who = f"rank {', '.join(others)} and the rest" if 2 * count > len(digests) else "the ranks, no two alike,"
        raise Diverged(
            f"{who} have different weights after step {step}: a fault of memory, processor or network; "
            f"go on from a checkpoint of step {run.equal_step}, after which they were equal, or earlier"
        )
    run.equal_step = step


def _penalty_duration(run: Run, phase: str, gradient_seconds: float) -> float | None:
    """Seconds that a regularized step's gradient took beyond a plain one's (median of the last ones)."""
    if phase == "plain":
        run.plain_gradient_seconds.append(gradient_seconds)
        return None
    if not run.plain_gradient_seconds:
        return None
    return max(0.0, gradient_seconds - statistics.median(run.plain_gradient_seconds))


def _announce_regularizer(run: Run, epoch: int, rate: float) -> None:
    s, size, world = run.config.regularizer, run.sub_batch_size, run.world
    run.telemetry.event("regularizer_on", epoch=epoch, learning_rate=rate)
    run.telemetry.say(
        f"regularizer on in epoch {epoch}, at rate {rate:.3g}: {s.way}, α {s.alpha:g}, β {s.beta:g}, "
        f"{run.order.largest_part(world.size) // (size or 1)} sub-batches of {size} images a worker"
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
