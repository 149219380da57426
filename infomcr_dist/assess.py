"""What an epoch of a run is worth: errors and γ̂, of the weights and of their average, as records."""

from __future__ import annotations

import time
from typing import Literal

from torch import nn

from infomcr_dist.evaluate import Curvature, Errors, Poll, estimate_curvature, evaluate, recompute_statistics
from infomcr_dist.experiment import measured_images
from infomcr_dist.progress import average_line
from infomcr_dist.records import EvaluationRecord, MetricRecord, Weights
from infomcr_dist.run import Run
from infomcr_dist.schedules import TimeFraction


def assess_average(run: Run, metric_time: TimeFraction, poll: Poll, test: bool, train: bool, metric: bool) -> None:
    """Evaluate and measure the averaged weights, if there are any, where the weights themselves were."""
    average, config, world = run.state.average, run.config, run.world
    if average is None or not average.begun or not (test or train or metric):
        return
    split, images = run.experiment.splits["train"], config.averaging.statistics_images
    largest, bf16 = max(config.evaluation.batch_size, config.metric.samples), config.precision == "bf16"
    network, loader = average.module, run.train_eval_loader
    for own, current in zip(network.buffers(), run.state.model.buffers(), strict=True):
        own.copy_(current)  # equal on all workers by now
    recompute_statistics(network, loader, split, images, largest, config.seed, world, poll, bf16=bf16)
    line = average_line(
        evaluate_errors(run, "test", poll, network, "averaged") if test else None,
        evaluate_errors(run, "train", poll, network, "averaged") if train else None,
        measure_curvature(run, metric_time, poll, network, "averaged").gamma_hat if metric else None,
    )
    run.telemetry.message(line)


def evaluate_errors(
    run: Run, split: Literal["train", "test"], poll: Poll, model: nn.Module, weights: Weights = "current"
) -> Errors:
    """Errors of a split, logged."""
    loader = run.test_loader if split == "test" else run.train_eval_loader
    batch_size, bf16 = run.config.evaluation.batch_size, run.config.precision == "bf16"
    errors = evaluate(model, loader, run.experiment.splits[split], batch_size, run.world, poll, bf16=bf16)
    run.telemetry.log(EvaluationRecord(run.state.step, run.state.epoch + 1, split, **vars(errors), weights=weights))
    return errors


def measure_curvature(
    run: Run, metric_time: TimeFraction, poll: Poll, model: nn.Module, weights: Weights = "current"
) -> Curvature:
    """γ̂ and what comes with it, logged; its time counts."""
    settings, before = run.config.metric, time.perf_counter()
    split = measured_images(run.config, run.experiment.splits["train"])
    result = estimate_curvature(model, run.train_eval_loader, split, settings, run.config.seed, run.world, poll=poll)
    seconds = time.perf_counter() - before
    metric_time.add(seconds)
    record = MetricRecord(
        step=run.state.step,
        epoch=run.state.epoch + 1,
        gamma_hat=result.gamma_hat.mean,
        gamma_hat_standard_error=result.gamma_hat.standard_error,
        gamma_hat_cost_seconds=seconds,
        fisher_trace=result.trace.mean,
        fisher_spectral_radius=result.spectral_radius.mean,
        trials=settings.trials,
        samples=settings.samples,
        gamma_hat_singular_trials=result.gamma_hat.singular,
        weights=weights,
    )
    run.telemetry.log(record)
    return result
