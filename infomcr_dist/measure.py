"""Measure trained models: γ̂ and the other metrics of the paper, errors, and the generalization bound.

    infomcr measure CHECKPOINT [CHECKPOINT …] [key=value …]
    horovodrun -np 8 infomcr measure CHECKPOINT [CHECKPOINT …] [key=value …]
    torchrun --nproc-per-node 8 --no-python infomcr measure CHECKPOINT [CHECKPOINT …] [key=value …]

A checkpoint is a file or a run directory (its newest). Prints a table, best γ̂ first, and writes it as JSON and as a
picture. The workers share the work; the numbers do not depend on how many there are.

Exit code 0: measured; 75: stopped, repeat the command; 2: a mistake in the settings, or a checkpoint or data that
cannot be read, reported in one line; 1: anything else.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infomcr_dist import checkpoint
from infomcr_dist.checks import Derivative
from infomcr_dist.cli import MEASURE
from infomcr_dist.config import Config, MeasureSettings, MetricSettings
from infomcr_dist.curvature import Bound, Estimate, estimate, gamma, generalization_bound, logit_scaled
from infomcr_dist.engines import run_in_world
from infomcr_dist.evaluate import Curvature, Errors, estimate_curvature, estimate_robustness, evaluate
from infomcr_dist.experiment import compute_threads, eval_loader_config, measured_images, open_data, select_splits
from infomcr_dist.functional import dot, functional_loss, trainable_parameters
from infomcr_dist.precision import set_float32_precision
from infomcr_dist.records import finite
from infomcr_dist.regularizer import sub_batch_penalty
from infomcr_dist.signals import StopRequest
from infomcr_dist.trained import Trained, load_trained
from infomcr_dist.world import World
from pipelines import Dataset, Loader, LocalBatch, Split, open_dataset, open_loader
from pipelines.console import lenient
from pipelines.options import load
from pipelines.random_streams import Stream, generator, torch_seed

_PENALTY_BATCHES = 10
_SUB_BATCHES = 8
"""A batch of `penalty_share`: M of the paper."""


@dataclass(frozen=True)
class Measurement:
    """One checkpoint's row."""

    path: str
    model: str
    epochs: float
    parameters: int
    train: Errors
    test: Errors
    curvature: Curvature
    robustness: Estimate
    penalty: Estimate | None
    """`penalty_share`; None where regularizer.sub_batch_size does not give the strength, or no sub-batch fits"""
    gamma: float
    log_volume: float
    bound: Bound


def open_subject(path: Path, settings: MeasureSettings) -> tuple[Trained, Dataset]:
    """A checkpoint's network, and the data set to measure it on. Raises ValueError if one of them cannot be read."""
    trained = load_trained(path, settings.model, torch.device("cpu"), settings.weights)
    dataset = open_dataset(settings.data) if settings.data else open_data(trained.config.data.path)
    if dataset.classes != trained.classes:
        raise ValueError(
            f"data: {dataset.path} has other classes than {trained.path} was trained on: give data=DIRECTORY"
        )
    return trained, dataset


def measure(trained: Trained, dataset: Dataset, settings: MeasureSettings, world: World) -> Measurement:
    """All metrics of a network. Raises `UserError` on every worker if the data cannot be read by one."""
    path, config, model = trained.path, trained.config, trained.model.to(world.device)
    with world.synchronize_errors():
        splits = select_splits(config, dataset)
        penalty_batch = _SUB_BATCHES * (config.regularizer.sub_batch_size or 0)
        batch_size = max(settings.batch_size, settings.samples, penalty_batch)
        loader_config = eval_loader_config(config, dataset, trained.image_size, batch_size, world)
        train_loader, test_loader = (open_loader(splits[name], loader_config) for name in ("train", "test"))
    train, test = splits["train"], splits["test"]
    measured = measured_images(config, train)
    metric = MetricSettings(trials=settings.trials, samples=settings.samples, images=settings.images)
    criterion = torch.nn.functional.cross_entropy
    scaled = criterion if settings.logit_scale is None else logit_scaled(criterion, settings.logit_scale)
    bf16 = config.precision == "bf16"
    set_float32_precision(config.precision == "tf32")
    train_errors = evaluate(model, train_loader, train, settings.batch_size, world, bf16=bf16)
    test_errors = evaluate(model, test_loader, test, settings.batch_size, world, bf16=bf16)
    curvature = estimate_curvature(model, train_loader, measured, metric, settings.seed, world, scaled)
    robustness = estimate_robustness(model, train_loader, measured, settings.images, settings.seed, world)
    penalty = penalty_share(model, train_loader, train, config, settings.seed, world)
    train_loader.close()
    test_loader.close()
    model.cpu()  # others are measured next
    params = trainable_parameters(model)
    parameters = sum(p.numel() for p in params.values())
    log_volume = settings.log_volume
    if log_volume is None:
        norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in params.values()))
        log_volume = _log_ball(parameters, 0.01 * norm)
    full = gamma(curvature.gamma_hat, parameters, min(settings.samples, len(measured)))
    bound = generalization_bound(
        gamma=full,
        train_loss=train_errors.loss,
        minimum_loss=train_errors.loss,
        parameters=parameters,
        samples=len(train),
        log_volume=log_volume,
        delta=settings.delta,
    )
    return Measurement(
        str(path), config.model, trained.epochs, parameters, train_errors, test_errors, curvature, robustness,
        penalty, full, log_volume, bound,
    )  # fmt: skip


def penalty_share(
    model: torch.nn.Module, loader: Loader, train: Split, config: Config, seed: int, world: World
) -> Estimate | None:
    """How large the penalty's part of a step is at these weights: β‖(1/M) Σ (g_i − h_i)‖ / ‖(1/M) Σ g_i‖.

    Over random batches of training images as they are, of M = 8 sub-batches (fewer where the images are), with the
    method, its strength and the size of a sub-batch of the run's settings, whether it was regularized or not, and
    BatchNorm as in training.
    """
    settings, half = config.regularizer, config.precision == "bf16"
    size = settings.sub_batch_size
    count = 0 if size is None else min(_SUB_BATCHES, len(train) // size)
    if size is None or count == 0:
        return None
    positions = np.arange(count * size)

    def batch(trial: int) -> LocalBatch:
        samples = generator(Stream.PENALTY_SHARE, seed, trial).choice(len(train), count * size, replace=False)
        return LocalBatch(0, trial, samples, positions, len(samples))

    own = []
    training = model.training
    model.train()
    loss_fn, params = functional_loss(model), trainable_parameters(model)
    trials = range(world.rank, _PENALTY_BATCHES, world.size)
    for trial, (_, images, labels) in zip(trials, loader.batches(map(batch, trials)), strict=True):
        torch.manual_seed(torch_seed(Stream.PENALTY_SHARE, seed, trial))  # of dropout
        sub_batches = list(zip(images.split(size), labels.split(size), strict=True))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            exact = half and settings.method == "infomcr"
            derivative: Derivative = "exact" if exact else "finite_difference"
            result = sub_batch_penalty(
                loss_fn, params, sub_batches, settings.alpha, derivative, method=settings.method, rho=settings.radius
            )
        penalty, loss = (float(dot(g, g).sqrt()) for g in (result.penalty_gradient, result.loss_gradient))
        own.append(settings.weight * penalty / loss if loss else math.nan)
    model.train(training)
    by_rank = world.gather(own)
    return estimate([by_rank[trial % world.size][trial // world.size] for trial in range(_PENALTY_BATCHES)])


def table(rows: list[Measurement], settings: MeasureSettings) -> str:
    """The rows, best γ̂ first, as Markdown; every ± is a standard error."""
    names = ("", "γ̂", "Frobenius", "spectral radius", "trace", "robustness", "train error", "test error", "bound")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for rank, row in enumerate(rows, 1):
        c = row.curvature
        cells = [f"{rank}. {row.path}", f"{c.gamma_hat.mean:.1f} ± {c.gamma_hat.standard_error:.1f}"]
        cells += [
            f"{e.mean:.3g} ± {e.standard_error:.1g}" for e in (c.frobenius, c.spectral_radius, c.trace, row.robustness)
        ]
        cells += [f"{row.train.top1_error_ratio:.2%}", f"{row.test.top1_error_ratio:.2%}", f"{row.bound.bound:.3g}"]
        lines.append("| " + " | ".join(cells) + " |")
    scale = "" if settings.logit_scale is None else f", logits scaled to logits / (‖logits‖ · {settings.logit_scale:g})"
    lines.append(
        f"\nγ̂ = mean of ln|ξ| (Eq. 6) over {settings.trials} trials of {settings.samples} training images{scale}"
    )
    for row in rows:
        g, b = row.curvature.gamma_hat, row.bound
        if g.singular:
            lines.append(
                f"{row.path}: {g.singular} of {g.trials} Gram matrices are not positive definite, excluded "
                f"(smallest eigenvalue of ξ/N': {g.smallest_eigenvalue:.3g})"
            )
        if row.penalty is not None:
            share = f"{row.penalty.mean:.3g} ± {row.penalty.standard_error:.1g}"
            lines.append(f"{row.path}: β‖g − h‖ / ‖g‖ with the run's α, β and sub-batches: {share}")
        lines.append(
            f"{row.path}: bound at ln V = {row.log_volume:.4g}: training loss {b.train_loss:.3g} + {b.complexity:.3g} "
            f"from 2L₀ = {b.loss_term:.3g}, 2A = {b.curvature_term:.3g}, ln(2N/δ) = {b.confidence_term:.3g}"
        )
    return "\n".join(lines)


def draw(rows: list[Measurement], path: Path) -> None:
    """Each metric against the test error, one point a checkpoint, with standard errors (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    panels: list[tuple[str, list[Estimate]]] = [
        ("γ̂", [r.curvature.gamma_hat for r in rows]),
        ("Frobenius norm", [r.curvature.frobenius for r in rows]),
        ("spectral radius", [r.curvature.spectral_radius for r in rows]),
        ("robustness", [r.robustness for r in rows]),
    ]
    for axes, (name, values) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        errors = [100 * r.test.top1_error_ratio for r in rows]
        axes.errorbar(
            [v.mean for v in values], errors, xerr=[v.standard_error for v in values], fmt="o", capsize=3
        )  # fmt: skip
        for i, value in enumerate(values, 1):
            axes.annotate(str(i), (value.mean, errors[i - 1]), textcoords="offset points", xytext=(5, 5))
        axes.set_xlabel(name)
        axes.set_ylabel("test error, %")
    checkpoint.write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    lenient()
    with StopRequest():  # which ends the command at once: nothing is written before its end
        return _main(arguments)


def _main(arguments: list[str]) -> int:
    paths: list[str] = []
    settings, mistake = MeasureSettings(), None
    try:
        paths, overrides = MEASURE.parse(arguments)
        settings = load(MeasureSettings, None, overrides)
    except ValueError as error:
        mistake = error  # raised once the workers are connected, so that rank 0 alone reports it

    def body(world: World) -> int:
        with world.synchronize_errors():
            if mistake is not None:
                raise mistake
        torch.set_num_threads(compute_threads(settings.threads, world.local_size))
        with world.synchronize_errors():  # of all of them, before the first is measured
            subjects = [open_subject(Path(path), settings) for path in paths]
        rows = [measure(*subject, settings, world) for subject in subjects]
        rows.sort(key=lambda row: row.curvature.gamma_hat.mean)
        with world.synchronize_errors():
            if world.rank == 0:
                _write(rows, settings)
        return 0

    return run_in_world(body, engine=settings.engine)


def _write(rows: list[Measurement], settings: MeasureSettings) -> None:
    results: dict[str, Any] = {"settings": asdict(settings), "checkpoints": [asdict(row) for row in rows]}
    text = json.dumps(finite(results), indent=1, ensure_ascii=False)
    checkpoint.write_atomically(Path(f"{settings.output}.json"), lambda file: file.write(text.encode()))
    draw(rows, Path(f"{settings.output}.png"))
    print(table(rows, settings))
    print(f"\nwritten: {settings.output}.json, {settings.output}.png", flush=True)


def _log_ball(dimensions: int, radius: float) -> float:
    """ln of the volume of a ball."""
    return dimensions / 2 * math.log(math.pi) - math.lgamma(dimensions / 2 + 1) + dimensions * math.log(radius)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
