"""Everything a run needs before its first step: data, order, model, optimizer, schedules, its directory."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from infomcr_dist import checkpoint, models
from infomcr_dist.budget import Budget
from infomcr_dist.config import Config, OptimizerSettings
from infomcr_dist.options import to_dict, to_yaml
from infomcr_dist.schedules import LearningRate, PenaltyWeight
from infomcr_dist.telemetry import Telemetry
from infomcr_dist.world import Solo
from pipelines import Backend, Dataset, Loader, Order, Part, Split, open_dataset, open_loader

EMBEDDED = Path("data") / "fashion-mnist"
_FREE_ON_RESUME = (
    *("epochs", "run_dir", "resume", "threads", "nonfinite_steps"),
    *("evaluation", "metric", "checkpoint", "telemetry"),
)
"""Settings that a resumed run may change: they do not alter the steps that are left, or only add to them."""
_FREE_OF_DATA = ("path", "backend", "on_error", "batch_size", "global_batch_size", "threads", "prefetch")
"""Of the data section; the shards' fingerprint and the global batch are compared instead."""


@dataclass
class Run:
    """All that a run needs before its first step."""

    config: Config
    world: Solo
    directory: Path
    dataset: Dataset
    splits: dict[str, Split]
    """train and test: what the run trains on and is evaluated on"""
    order: Order
    image_size: int
    sub_batch_size: int | None
    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: LearningRate
    penalty_weight: PenaltyWeight
    budget: Budget | None
    first_step: int
    epoch_loss: tuple[float, float]
    """Summed loss and images of this worker in the epoch that a resumed run begins within"""
    telemetry: Telemetry
    training_images: Loader
    """The training split, augmented, for the steps"""
    train_images: Loader
    """The training split as it is, for evaluation and metric"""
    test_images: Loader

    def close(self) -> None:
        """Write out the records, free the port, end the loaders."""
        self.telemetry.close()
        for loader in (self.training_images, self.train_images, self.test_images):
            loader.close()

    def penalised(self, part: Part, step: int) -> int | None:
        """How many of a worker's sub-batches a step of the regularized phase penalises; None: its parts do not split.

        A last, smaller global batch is regularized only if every worker's part of it splits into whole sub-batches:
        their size is the penalty's strength.
        """
        size, settings = self.sub_batch_size, self.config.regularizer
        if size is None or part.global_size % (size * self.world.size):
            return None
        sub_batches = len(part.samples) // size
        if self.budget is not None:
            return min(self.budget.draw(step), sub_batches)
        return min(settings.sampled or sub_batches, sub_batches)

    def penalty(self, part: Part, penalised: int | None, beta: float | None) -> dict[str, Any] | None:
        """Arguments of `regularized_backward` for a step; None for a plain one."""
        if beta is None or not penalised:
            return None
        s = self.config.regularizer
        return {
            "alpha": s.alpha,
            "beta": beta * (penalised / self.budget.mean if self.budget is not None else 1.0),
            "sub_batch_size": self.sub_batch_size,
            "way": s.way,
            "sampled": penalised if s.way == "sampled" else None,
            "derivative": s.derivative,
        }


def save(run: Run, step: int, epoch_loss: tuple[float, float] = (0.0, 0.0)) -> None:
    """Write the state after so many steps; rank 0 writes, a failure ends every worker.

    ``epoch_loss``: this worker's summed loss and images of an epoch that is not over. What differs between workers
    within an epoch, that and BatchNorm's running statistics, is kept for each.
    """
    within = step % run.order.steps != 0
    by_rank = run.world.gather((epoch_loss, {k: b.cpu() for k, b in run.model.named_buffers()}) if within else None)
    with run.world.together():
        if run.world.rank == 0:
            state = {
                "step": step,
                "epochs": step / run.order.steps,
                "by_rank": by_rank if within else [],
                "model": run.model.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "learning_rate": run.learning_rate.state_dict(),
                "penalty_weight": run.penalty_weight.state_dict(),
                "budget": run.budget and run.budget.state_dict(),
                "settings": _settings(run.config, run.dataset, run.order),
                "config": to_dict(run.config),
                "classes": run.dataset.classes,
                "image_size": run.image_size,
            }
            checkpoint.save(run.directory / "checkpoints", step, state, run.config.checkpoint.keep)


def prepare_run(config: Config, recipe: Path, world: Solo) -> Run:
    """Everything up to the first step. Raises `UserError` on every worker for a user's mistake met by any."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.threads or max(1, cores // world.local_size))
    with world.together():
        if config.data.path == "fashion-mnist" and world.local_rank == 0 and not EMBEDDED.exists():
            _prepare_embedded()
    with world.together():
        dataset = open_dataset(EMBEDDED if config.data.path == "fashion-mnist" else config.data.path)
        splits = select_splits(config, dataset)
        order, sub_batch_size = _plan(config, splits["train"], world.size)
        image_size = config.data.image_size or stored_size(dataset)
        torch.manual_seed(config.seed)
        model = models.build(config.model, classes=len(dataset.classes), image_size=image_size).to(world.device)
        data = config.data
        local_batch = math.ceil(order.global_batch / world.size)
        evaluated = config.evaluation.batch_size

        def loader(split: str, backend: Backend, augmentation: str, batch_size: int, color_jitter: float) -> Loader:
            return open_loader(
                splits[split],
                backend=backend,
                augmentation=augmentation,
                color_jitter=color_jitter,
                size=image_size,
                mean=dataset.mean,
                std=dataset.std,
                seed=config.seed,
                batch_size=batch_size,
                device=world.device,
                threads=data.threads,
                prefetch=data.prefetch,
                on_error=data.on_error,
                rank=world.rank,
                world_size=world.size,
            )

        exact: Backend = "torch" if data.backend == "webdataset" else data.backend
        training_images = loader("train", data.backend, data.augmentation, local_batch, data.color_jitter)
        train_images = loader("train", exact, config.evaluation.transform, max(evaluated, config.metric.samples), 0.0)
        test_images = loader("test", exact, config.evaluation.transform, evaluated, 0.0)
    with world.together():
        telemetry = Telemetry(config.telemetry, rank=world.rank, local_rank=world.local_rank, world_size=world.size)
    directory, state = Path(), None
    with world.together():
        if world.rank == 0:
            directory, state = _directory_and_state(config, recipe, _settings(config, dataset, order))
    directory, state = world.broadcast((directory, state))
    first_step = 0 if state is None else state["step"]

    scale = order.global_batch / (config.optimizer.reference_batch_size or order.global_batch)
    learning_rate = LearningRate(config.schedule, config.optimizer.learning_rate * scale, config.epochs, order.steps)
    penalty_weight = PenaltyWeight(config.regularizer, config.schedule.warmup_epochs)
    budget = None
    if config.regularizer.budget is not None and sub_batch_size is not None:
        budget = Budget(config.regularizer.budget, local_batch // sub_batch_size, config.seed)
    optimizer = world.distribute(_optimizer(config.optimizer, model), model)
    if state is not None:
        with world.together():
            checkpoint.restore_weights(model, state, directory)
        optimizer.load_state_dict(state["optimizer"])
        learning_rate.load_state_dict(state["learning_rate"])
        penalty_weight.load_state_dict(state["penalty_weight"])
        if budget is not None:
            budget.load_state_dict(state["budget"])
    epoch_loss = _restore_by_rank(model, state["by_rank"], world) if state is not None else (0.0, 0.0)

    with world.together():
        if world.rank == 0:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(directory / "config.yaml", lambda file: file.write(to_yaml(config).encode()))
            telemetry.begin(directory / "records.jsonl", order.steps * config.epochs, first_step)
    return Run(
        config=config,
        world=world,
        directory=directory,
        dataset=dataset,
        splits=splits,
        order=order,
        image_size=image_size,
        sub_batch_size=sub_batch_size,
        model=model,
        optimizer=optimizer,
        learning_rate=learning_rate,
        penalty_weight=penalty_weight,
        budget=budget,
        first_step=first_step,
        epoch_loss=epoch_loss,
        telemetry=telemetry,
        training_images=training_images,
        train_images=train_images,
        test_images=test_images,
    )


def _restore_by_rank(model: nn.Module, by_rank: list[Any], world: Solo) -> tuple[float, float]:
    """Give every worker what was its own within an epoch; at another number of workers, the mean and the sum."""
    epoch_loss = (0.0, 0.0)
    if not by_rank:
        return epoch_loss
    if len(by_rank) == world.size:
        epoch_loss, buffers = by_rank[world.rank]
    else:
        names = by_rank[0][1].keys()
        buffers = {k: torch.stack([b[k].double() for _, b in by_rank]).mean(0) for k in names}
        if world.rank == 0:
            epoch_loss = (sum(loss[0] for loss, _ in by_rank), sum(loss[1] for loss, _ in by_rank))
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return epoch_loss


def select_splits(config: Config, dataset: Dataset) -> dict[str, Split]:
    """What is trained and evaluated on: whole splits, or parts of the training split."""
    missing = [name for name in ("train", "test") if name not in dataset.splits]
    if missing:
        raise ValueError(
            f"data.path: {dataset.path} has no split {missing[0]!r}: prepare it again from folders train/ and test/, "
            "or with test_fraction=0.1"
        )
    whole, held_out, taken = dataset.splits["train"], config.data.holdout_images, config.data.train_images
    if held_out + (taken or 1) > len(whole):
        raise ValueError(
            f"data.train_images and data.holdout_images must be at most the {len(whole)} training images together, "
            f"got {taken} and {held_out}"
        )
    if taken is None and held_out == 0:
        return {"train": whole, "test": dataset.splits["test"]}
    shuffled = np.random.default_rng([config.seed, 2]).permutation(len(whole))
    end = None if taken is None else held_out + taken
    test = whole.subset(shuffled[:held_out]) if held_out else dataset.splits["test"]
    return {"train": whole.subset(shuffled[held_out:end]), "test": test}


def stored_size(dataset: Dataset) -> int:
    """Side of the stored images in pixels; ValueError if they are not squares of one size."""
    index = dataset.splits["train"].index
    side = int(index["height"][0])
    if (index["height"] != side).any() or (index["width"] != side).any():
        raise ValueError(
            f"data.image_size must be given, got null: the images of {dataset.path} are not squares of one size"
        )
    return side


def _prepare_embedded() -> None:
    """Make the demo's data set, by the command a user would type; it shows its own progress and reasons."""
    print(f"preparing {EMBEDDED}, once …", flush=True)
    command = [sys.executable, "-m", "pipelines.prepare", "fashion-mnist", str(EMBEDDED)]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(
            f"data.path: fashion-mnist could not be prepared (the reason is above): repeat with "
            f"python -m pipelines.prepare fashion-mnist {EMBEDDED}, or give data.path=DIRECTORY of another data set"
        )


def _plan(config: Config, split: Split, workers: int) -> tuple[Order, int | None]:
    """The order of the training samples, and the images a sub-batch holds (None: never regularized)."""
    data, regularizer, samples = config.data, config.regularizer, len(split)
    if samples < workers:
        raise ValueError(f"data.path has {samples} training images, fewer than the {workers} workers")
    global_batch = data.global_batch_size or (data.batch_size or 0) * workers
    if global_batch < workers:
        raise ValueError(
            f"data.global_batch_size must be at least the number of workers, got {global_batch} and {workers}"
        )
    order = Order(samples, min(global_batch, samples), config.seed, data.remainder, data.mixing, split.index["shard"])
    if regularizer.when == "never":
        return order, None
    local, uneven = divmod(global_batch, workers)
    if uneven:
        raise ValueError(
            "data.global_batch_size must be a multiple of the number of workers where the regularizer is used, "
            f"got {global_batch} and {workers} workers: give data.batch_size (images a worker) instead"
        )
    for name in ("sub_batches", "sub_batch_size"):
        value = getattr(regularizer, name)
        if value is not None and local % value:
            raise ValueError(f"regularizer.{name} must divide the local batch, got {value} and {local} images a worker")
    size = regularizer.sub_batch_size or local // (regularizer.sub_batches or 1)
    if regularizer.sampled is not None and regularizer.sampled > local // size:
        raise ValueError(
            f"regularizer.sampled must be at most the number of sub-batches, "
            f"got {regularizer.sampled} and {local // size}"
        )
    return order, size


def _optimizer(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    undecayed = [] if settings.decay_norm_and_bias else [p for p in model.parameters() if p.ndim <= 1]
    decayed = [p for p in model.parameters() if settings.decay_norm_and_bias or p.ndim > 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )


def _settings(config: Config, dataset: Dataset, order: Order) -> dict[str, Any]:
    """What a resumed run must share with the run it goes on from, flat: ``optimizer.momentum: 0.9``."""
    sections = {name: value for name, value in to_dict(config).items() if name not in _FREE_ON_RESUME}
    for name in _FREE_OF_DATA:
        del sections["data"][name]
    flat = {"data.global_batch_size": order.global_batch, "data.path's shards": dataset.fingerprint[:16]}
    for name, value in sections.items():
        flat.update({f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    return flat


def _directory_and_state(
    config: Config, recipe: Path, settings: dict[str, Any]
) -> tuple[Path, checkpoint.State | None]:
    """The run's directory, and the checkpoint it goes on from, if any."""
    directory = Path(config.run_dir) if config.run_dir else None
    occupied = directory is not None and (directory / "records.jsonl").exists()
    if config.resume is None or (config.resume == "auto" and not occupied):
        if occupied:
            raise ValueError(
                f"run_dir {directory} holds a run already: go on from it with resume=auto, or give another run_dir"
            )
        return directory or Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}", None
    assert directory is not None or config.resume != "auto"
    path = checkpoint.find(directory if directory and config.resume == "auto" else Path(config.resume))
    state = checkpoint.load(path)
    different = [
        f"{name}={settings.get(name)} (checkpoint: {state['settings'].get(name)})"
        for name in sorted(settings.keys() | state["settings"].keys())
        if settings.get(name) != state["settings"].get(name)
    ]
    if different:
        raise ValueError(f"resume: {path} was trained with other settings: {', '.join(different)}")
    if state["epochs"] >= config.epochs:
        raise ValueError(
            f"resume: {path} has all of its {state['epochs']:g} epochs behind it, got epochs={config.epochs}: "
            "give a larger number to train on"
        )
    return directory or path.parent.parent, state
