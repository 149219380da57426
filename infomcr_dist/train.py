"""Train a classifier with the information-theoretic regularizer, alone or on many workers.

    infomcr train [RECIPE] [key=value …]
    horovodrun -np 8 infomcr train [RECIPE] [key=value …]
    torchrun --nproc-per-node 8 --no-python infomcr train [RECIPE] [key=value …]

Without a recipe it trains the demo, ResNet-20 on Fashion-MNIST. SIGTERM, SIGHUP or SIGINT to any worker ends all of
them after the step they are in, or within an evaluation after a batch of it, with every step saved. Under
launch/elastic.sh workers may join and leave: every worker keeps the state after the last step in memory, and a world of
another size resumes from there. A worker that gets SIGTERM there exits after its step, and the others continue.

Exit code 0: trained; 75: stopped, resume with resume=auto, or a port or the run directory is in use, try again later;
2: a mistake in the settings or the data, reported in one line; 1: anything else.
"""

from __future__ import annotations

import math
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import nn

from infomcr_dist import diagnostics
from infomcr_dist.allocator import keep_freed_memory
from infomcr_dist.assess import assess_average, evaluate_errors, measure_curvature
from infomcr_dist.checkpoint import State
from infomcr_dist.cli import TRAIN
from infomcr_dist.config import Config
from infomcr_dist.engines import run_in_world
from infomcr_dist.first_order import FirstOrder
from infomcr_dist.graphs import Graphs
from infomcr_dist.precision import set_deterministic, set_float32_precision
from infomcr_dist.progress import Durations, epoch_line, summary
from infomcr_dist.records import (
    EndRecord,
    EpochRecord,
    Phase,
    RestartRecord,
    StepRecord,
)
from infomcr_dist.run import Run, prepare_run
from infomcr_dist.run_lock import PidFile
from infomcr_dist.schedules import TimeFraction
from infomcr_dist.signals import StopRequest
from infomcr_dist.state import Committed
from infomcr_dist.step import first_order_only, train_step
from infomcr_dist.watchdog import Watchdog
from infomcr_dist.world import SLOW, HostsChanged, Stopped, UserError, World
from pipelines.console import detached, reader_gone
from pipelines.options import load
from pipelines.random_streams import Stream, torch_seed

_MEASURED_STEPS = 20
"""Regularized steps after which their overhead is announced."""


def train(run: Run, stop: StopRequest) -> None:
    """The remaining epochs: steps, evaluation, metric, checkpoint; then the final table."""
    config, world, telemetry, state = run.config, run.world, run.telemetry, run.state
    criterion = nn.CrossEntropyLoss(label_smoothing=config.optimizer.label_smoothing)
    graphs = build_graphs(run, criterion)
    durations = Durations()
    metric_time = TimeFraction(config.metric.max_time_fraction, began=time.perf_counter())
    test = train = metric = None
    world.patience = SLOW
    run.commit()
    for epoch in range(state.epoch, config.epochs):
        last = epoch + 1 == config.epochs
        training_loss = train_epoch(run, epoch, criterion, durations, stop, graphs)
        world.location = f"the end of epoch {epoch + 1}"
        test_due = last or _due(epoch, config.evaluation.every_epochs)
        train_due = last or _due(epoch, config.evaluation.train_every_epochs)
        metric_due = _metric_due(run, epoch, metric_time, durations)
        due = last or _due(epoch, config.checkpoint.every_epochs)
        # Evaluation and metric may take long, and lose no step: from here a resumed run does them again.
        snapshot, saved = run.commit(), due and (test_due or train_due or metric_due)
        if saved:
            run.save(snapshot)
        poll = partial(_poll, run, stop, None if saved else snapshot)
        state.learning_rate.end_epoch(epoch, training_loss)
        world.average_buffers(state.model)
        diagnostics.compare_weights(run, buffers=True)
        if state.average is not None:
            state.average.after("epoch", epoch, state.model)
        test = evaluate_errors(run, "test", poll, state.model) if test_due else None
        train = evaluate_errors(run, "train", poll, state.model) if train_due else None
        metric = measure_curvature(run, metric_time, poll, state.model) if metric_due else None
        gamma_hat = metric.gamma_hat if metric is not None else None
        telemetry.log(EpochRecord(state.step, epoch + 1, epoch + 1, training_loss))
        telemetry.message(epoch_line(epoch + 1, config.epochs, training_loss, test, train, gamma_hat, metric_time))
        assess_average(run, metric_time, poll, test_due, train_due, metric_due)
        best = False
        if due and test is not None and (state.best_error is None or test.top1_error_ratio < state.best_error):
            state.best_error, best = test.top1_error_ratio, True
        state.epoch, state.epoch_loss = epoch + 1, (0.0, 0.0)
        snapshot = run.commit()
        if due:
            run.save(snapshot, best)
    assert test is not None
    assert train is not None
    telemetry.log(EndRecord(state.step, durations.median("plain"), durations.median("regularized")))
    failure = run.last_save()
    gamma_hat = metric.gamma_hat if metric is not None else None
    telemetry.message(summary(run.directory, test, train, gamma_hat, config.metric.samples, durations))
    telemetry.push()
    if failure is not None:
        raise Stopped(f"trained, but the last checkpoint is missing: {failure}", saved=False)


def train_epoch(
    run: Run, epoch: int, criterion: nn.Module, durations: Durations, stop: StopRequest, graphs: Graphs | None
) -> float:
    """Every global batch of an epoch once; returns the mean training loss over all workers' images.

    Raises:
        Stopped: after the same step on every worker, with that step saved, when any was asked to stop (in an elastic
            world on those that were asked).
        HostsChanged: the launcher has found that hosts joined or left.
        UserError: a sample cannot be read, or too many steps in a row were not finite.
    """
    config, world, telemetry, state = run.config, run.world, run.telemetry, run.state
    experiment, steps = run.experiment, run.experiment.sampler.steps
    start = max(0, state.step - epoch * steps)
    loss_sum, images_seen = state.epoch_loss
    state.model.train()
    batches = run.train_loader.batches(experiment.sampler.local_batches(epoch, world.rank, world.size, start))
    skipped, nonfinite = len(run.train_loader.skipped), 0
    began = time.perf_counter()
    while True:
        before = time.perf_counter()
        try:
            loaded = next(batches, None)
        except ValueError as error:
            raise UserError(f"data: {error}") from error
        if loaded is None:
            break
        batch, images, labels = loaded
        step = epoch * steps + batch.step
        data_wait = time.perf_counter() - before
        skipped, data_errors = len(run.train_loader.skipped), len(run.train_loader.skipped) - skipped
        world.location = f"step {step + 1}"
        run.profiler.begin_step(step)
        progress = epoch + batch.step / steps
        rate = state.learning_rate.at(progress)
        was_on = state.penalty_weight.on_since is not None
        beta = state.penalty_weight.at(progress, rate)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        # Dropout and the choice of sub-batches depend on the step alone, so that a resumed run draws the same.
        torch.manual_seed(torch_seed(Stream.STEP, config.seed, step, world.rank))
        num_penalized = None if beta is None else experiment.num_penalized(batch, step, state.overhead_budget)
        penalty = run.penalty(num_penalized, beta)
        phase: Phase = "plain" if penalty is None else "regularized"
        world.patience = 1.0 if durations.count(phase) else SLOW
        result = train_step(
            state.model,
            criterion,
            state.optimizer,
            world,
            (images, labels),
            loss_scale=len(labels) * world.size / batch.global_size,
            penalty=penalty,
            bf16=config.precision == "bf16",
            clip_gradient_norm=config.optimizer.clip_gradient_norm,
            max_batch_size=config.data.max_batch_size,
            flags=(_requested(stop, world), world.hosts_changed()),
            graphs=graphs,
        )
        world.progress, world.patience = world.progress + 1, SLOW
        run.profiler.end_step(step + 1)
        if result.finite:
            loss_sum += result.loss * batch.global_size
            images_seen += batch.global_size
            if state.average is not None:
                state.average.after("step", epoch, state.model)
        state.step, state.epoch_loss = step + 1, (loss_sum, images_seen)
        now = time.perf_counter()
        durations.add(phase, now - began)
        record = StepRecord(
            step=step + 1,
            epoch=epoch + 1,
            phase=phase,
            loss=result.loss,
            penalty=None if penalty is None else result.penalty,
            beta=None if penalty is None else beta,
            num_penalized=num_penalized,
            gradient_norm=result.gradient_norm,
            finite=result.finite,
            learning_rate=rate,
            samples=len(labels),
            global_samples=batch.global_size,
            world_size=world.size,
            data_errors=data_errors,
            step_duration_seconds=now - began,
            data_wait_seconds=data_wait,
            gradient_seconds=result.gradient_seconds,
            allreduce_wait_seconds=result.allreduce_wait_seconds,
            update_seconds=result.update_seconds,
            penalty_duration_seconds=run.penalty_duration(phase, result.gradient_seconds),
            allreduce_bytes=run.gradient_bytes,
        )
        began = now
        telemetry.log(record)
        if beta is not None and not was_on:
            diagnostics.announce_regularizer(run, epoch + 1, rate)
        every = config.regularizer.finite_difference_error_every_steps
        if penalty is not None and every and step % every == 0 and len(labels):
            diagnostics.log_finite_difference_error(run, criterion, images, labels)
        if beta is None or num_penalized is not None:
            diagnostics.follow_overhead_budget(run, step, beta, num_penalized, record.step_duration_seconds)
        if phase == "regularized" and durations.count(phase) == _MEASURED_STEPS:
            diagnostics.announce_overhead(run, durations)
        nonfinite = 0 if result.finite else nonfinite + 1
        if nonfinite:
            diagnostics.report_nonfinite(run, result, rate, nonfinite)
        if config.compare_weights_steps and (step + 1) % config.compare_weights_steps == 0:
            diagnostics.compare_weights(run)
        run.log_saved()
        stop_requested, hosts_changed = result.flags
        every_steps = config.checkpoint.every_steps
        save = bool(stop_requested) or (every_steps is not None and (batch.step + 1) % every_steps == 0)
        if world.elastic or save:
            snapshot = run.commit()
            if save:
                run.save(snapshot)
        if stop_requested:
            _stop(run, leave=stop.requested or not world.elastic)
        if hosts_changed:
            raise HostsChanged
    return loss_sum / images_seen if images_seen else math.nan


def build_graphs(run: Run, criterion: nn.Module) -> Graphs | None:
    """The run's steps as CUDA graphs, or compiled; None: kernel by kernel."""
    config, model, device, size = run.config, run.state.model, run.world.device, run.experiment.image_size
    if device.type != "cuda" and not config.compile:
        return None
    settings, bf16 = config.regularizer, config.precision == "bf16"
    eagerly = "are launched kernel by kernel, which is slow on a GPU"
    model.train()
    images = torch.zeros(2 * (run.experiment.sub_batch_size or 1), 3, size, size, device=device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    if config.data.mixes:
        labels = nn.functional.one_hot(labels, len(run.experiment.dataset.classes)).float()
    if device.type == "cuda" and not all(group.get("fused") for group in run.state.optimizer.param_groups):
        run.telemetry.message(
            f"steps {eagerly}: optimizer.kind={config.optimizer.kind} is not one of torch's fused ones"
        )
        return None
    try:
        passes = FirstOrder(
            model,
            criterion,
            images,
            labels,
            bf16=bf16,
            streams=min(8, run.experiment.num_sub_batches) if device.type == "cuda" else 1,
            compile=config.compile,
        )
    except ValueError as reason:
        run.telemetry.message(f"steps {eagerly}: {reason}")
        return None
    rounded = config.precision != "fp32"
    if settings.when != "never" and not first_order_only(
        settings.estimator, settings.derivative, settings.step, rounded
    ):
        run.telemetry.message(
            f"regularized steps {eagerly}: precision={config.precision}, estimator={settings.estimator}, "
            f"derivative={settings.derivative}, step={settings.step}"
        )
    return Graphs(passes, model, run.state.optimizer, run.world, config.optimizer.clip_gradient_norm)


@detached()
def main(arguments: list[str]) -> int:
    """The command; returns the exit code. No console delays or ends it."""
    keep_freed_memory()
    with StopRequest() as stop:
        return _main(arguments, stop)


def _main(arguments: list[str], stop: StopRequest) -> int:
    config, recipe, mistake = Config(), "", None
    try:
        (recipe,), overrides = TRAIN.parse(arguments)
        config = load(Config, Path(recipe), overrides)
    except ValueError as error:
        mistake = error  # raised once the workers are connected, so that rank 0 alone reports it
    set_float32_precision(config.precision == "tf32")
    set_deterministic(config.deterministic)

    def body(world: World) -> int:
        with ExitStack() as stack:
            if config.hang_timeout_seconds is not None:
                stack.callback(Watchdog(world, config.hang_timeout_seconds).close)
            pid_file = PidFile(config.pid_dir, world.local_rank)
            stack.callback(pid_file.remove)
            _run_with_restarts(config, Path(recipe), mistake, world, stop, pid_file)
        return 0

    return run_in_world(body, config.hang_timeout_seconds, config.engine)


def _run_with_restarts(
    config: Config, recipe: Path, mistake: Exception | None, world: World, stop: StopRequest, pid_file: PidFile
) -> None:
    """Prepare and train; where an elastic world is restarted, again from the last committed step.

    All collectives are within the loop: a worker that joins meets the others at its beginning.
    """
    committed: Committed | None = None
    while True:
        run = None
        try:
            with world.synchronize_errors():
                if mistake is not None:
                    raise mistake
                pid_file.write()
            run = prepare_run(config, recipe, world, committed)
            stop.defer(config.shutdown_timeout_seconds, lambda: f"rank {world.rank}: {world.location}")
            if committed is not None:
                _report_restart(run)
            train(run, stop)
            return
        except world.restart_errors as error:
            committed = run.committed if run is not None and run.committed is not None else committed
            if committed is not None:
                reason = "hosts_changed" if isinstance(error, HostsChanged) else "worker_lost"
                committed.restarts[reason] = committed.restarts.get(reason, 0) + 1
        finally:
            world.patience = math.inf
            if run is not None:
                run.close()
        world.restart()


def _metric_due(run: Run, epoch: int, metric_time: TimeFraction, durations: Durations) -> bool:
    settings = run.config.metric
    if settings.trials == 0 or epoch + 1 == run.config.epochs:
        return settings.trials > 0
    if settings.every_epochs is not None:
        return _due(epoch, settings.every_epochs)
    # A per-sample gradient costs about as much as a plain step's share of an image; twice that, to be safe.
    images = settings.trials * settings.samples / run.experiment.sampler.global_batch
    guess = 2 * images * (durations.median("plain") or math.inf)
    return bool(run.world.broadcast(metric_time.allows(time.perf_counter(), guess)))


def _due(epoch: int, every: int) -> bool:
    return every > 0 and (epoch + 1) % every == 0


def _requested(stop: StopRequest, world: World) -> bool:
    """Whether this worker is to stop: by a signal, or because its launcher is gone."""
    if reader_gone() or world.launcher_gone():
        stop.request()
    return stop.requested


def _poll(run: Run, stop: StopRequest, unsaved: State | None) -> None:
    """End an evaluation on every worker where any is to stop, with the state before it saved."""
    if run.world.sum([_requested(stop, run.world)])[0]:
        if unsaved is not None:
            run.save(unsaved)
        _stop(run, leave=stop.requested or not run.world.elastic)


def _stop(run: Run, leave: bool) -> None:
    """End this worker, with the step saved; or wait until it is, where only others were asked to."""
    failure, step = run.last_save(), run.state.step
    if leave:
        again = f"resume with run_dir={run.directory} resume=auto"
        if failure is not None:
            raise Stopped(
                f"step {step} could not be saved: {failure}; {again} from the checkpoint before it", saved=False
            )
        raise Stopped(f"saved after step {step}; {again}")


def _report_restart(run: Run) -> None:
    run.telemetry.log(RestartRecord(run.state.step, run.restarts, run.world.size))
    counts = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in run.restarts.items())
    run.telemetry.message(
        f"the run resumes after step {run.state.step} with {run.world.size} workers (restarts so far: {counts})"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
