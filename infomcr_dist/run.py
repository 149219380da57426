"""Everything a run needs before its first step: data, order, model, optimizer, schedules, its directory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
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
    *("epochs", "run_dir", "resume", "resume_changed", "threads", "nonfinite_steps", "compare_weights_steps"),
    *("stop_seconds", "hang_seconds", "pid_dir", "evaluation", "metric", "checkpoint", "telemetry"),
)
"""Settings that a resumed run may change: they do not alter the steps that are left, or only add to them."""
_FREE_OF_DATA = (
    *("path", "backend", "on_error", "batch_size", "global_batch_size", "max_batch_size", "threads", "prefetch"),
)
"""Of the data section; the shards' fingerprint and the global batch are compared instead."""


@dataclass
class Committed:
    """The state after a step, in memory: where an elastic run goes on when its world is restarted."""

    directory: Path
    state: checkpoint.State
    resets: dict[str, int]
    """restarts so far, by their reason"""


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
    first_epoch: int
    first_step: int
    """Steps behind the run, of all epochs; where they are all of first_epoch's, only what follows its steps is left"""
    epoch_loss: tuple[float, float]
    """Summed loss, and images, of all workers in the epoch that the run begins within"""
    best_error: float | None
    """Lowest top-1 error on the evaluated images so far"""
    gradient_bytes: int
    """Bytes of gradients a step gives to the allreduce"""
    checkpoints: checkpoint.Writer
    telemetry: Telemetry
    training_images: Loader
    """The training split, augmented, for the steps"""
    train_images: Loader
    """The training split as it is, for evaluation and metric"""
    test_images: Loader
    resources: ExitStack
    resets: dict[str, int]
    committed: Committed | None = None
    """The last state committed, in an elastic world"""
    equal_step: int = 0
    """Step after which the workers' weights were last seen to be equal"""
    plain_gradient_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    """Of the last plain steps: what a regularized step's are compared with"""

    def close(self) -> None:
        """Finish what is being saved, close the records, free the port, end the loaders."""
        self.resources.close()

    def penalised(self, part: Part, step: int) -> int | None:
        """How many of a worker's sub-batches a step of the regularized phase penalises; None: its parts do not split.

        A last, smaller global batch is regularized only if it splits into whole sub-batches: their size is the
        penalty's strength.
        """
        size, settings = self.sub_batch_size, self.config.regularizer
        if size is None or part.global_size % size:
            return None
        sub_batches = len(part.samples) // size
        if self.budget is not None:
            return min(self.budget.draw(step), sub_batches)
        return min(settings.sampled or sub_batches, sub_batches)

    def penalty(self, part: Part, penalised: int | None, beta: float | None) -> dict[str, Any] | None:
        """Arguments of `regularized_backward` for a step; None for a plain one."""
        if beta is None or penalised is None or (self.budget is not None and penalised == 0):
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


def snapshot(run: Run, epoch: int, step: int, epoch_loss: tuple[float, float] = (0.0, 0.0)) -> checkpoint.State:
    """A copy of the state after so many steps, for this worker to go on from within or before an epoch."""
    return {
        "epoch": epoch,
        "step": step,
        "epochs": step / run.order.steps,
        "epoch_loss": epoch_loss,
        "best_error": run.best_error,
        "by_rank": [],
        "model": checkpoint.copied(run.model.state_dict()),
        "optimizer": checkpoint.copied(run.optimizer.state_dict()),
        "learning_rate": checkpoint.copied(run.learning_rate.state_dict()),
        "penalty_weight": checkpoint.copied(run.penalty_weight.state_dict()),
        "budget": run.budget and checkpoint.copied(run.budget.state_dict()),
    }


def save(run: Run, state: checkpoint.State, best: bool = False) -> None:
    """Begin to write a state that every worker has; rank 0 writes it, beside the training.

    What differs between workers within an epoch, BatchNorm's running statistics, is kept for each.
    """
    if state["epoch"] * run.order.steps != state["step"]:
        buffers = {name: state["model"][name].cpu() for name, _ in run.model.named_buffers()}
        state = {**state, "by_rank": run.world.gather(buffers)}
    if run.world.rank == 0:
        about = {  # not in a snapshot, which an elastic run takes at every step
            "settings": _settings(run.config, run.dataset, run.order),
            "config": to_dict(run.config),
            "classes": run.dataset.classes,
            "image_size": run.image_size,
        }
        run.checkpoints.begin(state["step"], state | about, best)


def weights_digest(model: nn.Module, buffers: bool) -> str:
    """A hash of all weights, bit by bit, and of the buffers if they are to be the same as well."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (*model.parameters(), *(model.buffers() if buffers else ())):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def prepare_run(config: Config, recipe: Path, world: Solo, committed: Committed | None = None) -> Run:
    """Everything up to the first step. Raises `UserError` on every worker for a user's mistake met by any.

    ``committed``: what a worker of a restarted world goes on from; one that has just joined has none.
    """
    with ExitStack() as resources:
        return _prepare_run(config, recipe, world, committed, resources)


def _prepare_run(config: Config, recipe: Path, world: Solo, committed: Committed | None, resources: ExitStack) -> Run:
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.threads or max(1, cores // world.local_size))
    with world.together():
        if world.elastic:
            _check_elastic(config)
        if config.data.path == "fashion-mnist" and world.local_rank == 0 and not EMBEDDED.exists():
            _prepare_embedded()
    with world.together():
        dataset = open_dataset(EMBEDDED if config.data.path == "fashion-mnist" else config.data.path)
        splits = select_splits(config, dataset)
        order, sub_batch_size = plan_steps(config, splits["train"], world.size)
        image_size = config.data.image_size or stored_size(dataset)
        torch.manual_seed(config.seed)
        model = models.build(config.model, classes=len(dataset.classes), image_size=image_size).to(world.device)
        data = config.data
        local_batch = order.largest_part(world.size)
        evaluated = config.evaluation.batch_size

        def loader(split: str, backend: Backend, augmentation: str, batch_size: int, color_jitter: float) -> Loader:
            made = open_loader(
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
            resources.callback(made.close)
            return made

        exact: Backend = "torch" if data.backend == "webdataset" else data.backend
        training_images = loader("train", data.backend, data.augmentation, local_batch, data.color_jitter)
        train_images = loader("train", exact, config.evaluation.transform, max(evaluated, config.metric.samples), 0.0)
        test_images = loader("test", exact, config.evaluation.transform, evaluated, 0.0)
    with world.together():
        info = {"model": config.model, "recipe": recipe.stem, "backend": data.backend, "precision": config.precision}
        info |= {"way": config.regularizer.way, "derivative": config.regularizer.derivative}
        telemetry = Telemetry(
            config.telemetry, rank=world.rank, local_rank=world.local_rank, world_size=world.size, info=info
        )
        resources.callback(telemetry.close)

    resets: dict[str, int] = {}
    directory, state = Path(), None
    held = world.gather(-1 if committed is None else committed.state["step"])
    if max(held) >= 0:
        # A worker may have got the averaged gradient of a step that another was lost in: its state is the newest.
        source = held.index(max(held))
        newest = None
        if committed is not None and world.rank == source:
            newest = (committed.directory, checkpoint.copied(committed.state, "cpu"), committed.resets)
        directory, state, resets = world.broadcast(newest, root=source)
        own = None if committed is None or committed.state["step"] != state["step"] else committed.state["model"]
        names = {name for name, _ in model.named_buffers()}
        buffers = world.gather(own and {name: tensor.cpu() for name, tensor in own.items() if name in names})
        state = {**state, "by_rank": [b for b in buffers if b is not None]}
    else:
        with world.together():
            if world.rank == 0:
                directory, state = _directory_and_state(config, recipe, _settings(config, dataset, order), order)
        directory, state = world.broadcast((directory, state))

    scale = order.global_batch / (config.optimizer.reference_batch_size or order.global_batch)
    learning_rate = LearningRate(config.schedule, config.optimizer.learning_rate * scale, config.epochs, order.steps)
    penalty_weight = PenaltyWeight(config.regularizer, config.schedule.warmup_epochs)
    budget = None
    if config.regularizer.budget is not None and sub_batch_size is not None:
        budget = Budget(config.regularizer.budget, local_batch // sub_batch_size, config.seed)
        telemetry.event("budget", overhead_budget_ratio=config.regularizer.budget)
    optimizer = world.distribute(_optimizer(config.optimizer, model), model)
    if state is not None:
        with world.together():
            checkpoint.restore_weights(model, state, directory)
        optimizer.load_state_dict(state["optimizer"])
        learning_rate.load_state_dict(state["learning_rate"])
        penalty_weight.load_state_dict(state["penalty_weight"])
        if budget is not None and state["budget"] is not None:
            budget.load_state_dict(state["budget"])
        _restore_buffers(model, state["by_rank"], world)

    first_epoch, first_step = (0, 0) if state is None else (state["epoch"], state["step"])
    writer = checkpoint.Writer(directory / "checkpoints", config.checkpoint.keep)
    resources.callback(writer.wait)
    with world.together():
        if world.rank == 0:
            (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            checkpoint.remove_unfinished(directory / "checkpoints")
            checkpoint.write_atomically(directory / "config.yaml", lambda file: file.write(to_yaml(config).encode()))
        over = first_step == first_epoch * order.steps
        telemetry.begin(directory / "records.jsonl", order.steps * config.epochs, first_step, over)
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
        first_epoch=first_epoch,
        first_step=first_step,
        epoch_loss=(0.0, 0.0) if state is None else tuple(state["epoch_loss"]),
        best_error=None if state is None else state["best_error"],
        gradient_bytes=0 if world.size == 1 else sum(p.nbytes for p in model.parameters() if p.requires_grad),
        checkpoints=writer,
        telemetry=telemetry,
        training_images=training_images,
        train_images=train_images,
        test_images=test_images,
        resources=resources.pop_all(),
        resets=resets,
        equal_step=first_step,
    )


def _check_elastic(config: Config) -> None:
    """What a run of a changing number of workers needs: a global batch and a strength that do not follow it."""
    if config.data.global_batch_size is None:
        raise ValueError(
            "data.global_batch_size must be given where the number of workers may change, "
            f"got data.batch_size={config.data.batch_size} (images a worker)"
        )
    if config.regularizer.sub_batches is not None:
        raise ValueError(
            "regularizer.sub_batch_size must be given where the number of workers may change, "
            f"got regularizer.sub_batches={config.regularizer.sub_batches} (a worker)"
        )
    if config.data.backend == "webdataset":
        raise ValueError(
            "data.backend=webdataset keeps no order that another number of workers could go on with: use dali"
        )
    if config.run_dir is None:
        raise ValueError("run_dir must be given where the number of workers may change: any worker may become rank 0")


def _restore_buffers(model: nn.Module, by_rank: list[dict[str, torch.Tensor]], world: Solo) -> None:
    """Give every worker the buffers that were its own within an epoch; at another number of workers, the mean."""
    if not by_rank:
        return
    if len(by_rank) == world.size:
        buffers = by_rank[world.rank]
    else:
        buffers = {k: torch.stack([b[k].double() for b in by_rank]).mean(0) for k in by_rank[0]}
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def select_splits(config: Config, dataset: Dataset) -> dict[str, Split]:
    """What is trained and evaluated on: whole splits, or parts of the training split."""
    missing = [name for name in ("train", "test") if name not in dataset.splits]
    if missing:
        raise ValueError(
            f"data.path: {dataset.path} has no split {missing[0]!r}: prepare it again from folders train/ and test/, "
            "or with test_fraction=0.1"
        )
    data, whole = config.data, dataset.splits["train"]
    held_out, taken = data.holdout_images, data.train_images
    if held_out + (taken or 1) + data.confusion_images > len(whole):
        raise ValueError(
            "data.train_images, data.confusion_images and data.holdout_images must be at most the "
            f"{len(whole)} training images together, got {taken}, {data.confusion_images} and {held_out}"
        )
    if taken is None and held_out == 0:
        return {"train": whole, "test": dataset.splits["test"]}
    shuffled = np.random.default_rng([config.seed, 2]).permutation(len(whole))
    end = None if taken is None else held_out + taken + data.confusion_images
    train = whole.subset(shuffled[held_out:end])
    if data.confusion_images:
        index = train.index.copy()
        labels = np.random.default_rng([config.seed, 3]).integers(len(dataset.classes), size=data.confusion_images)
        index["label"][taken:] = labels
        train = replace(train, index=index)
    return {"train": train, "test": whole.subset(shuffled[:held_out]) if held_out else dataset.splits["test"]}


def measured_images(config: Config, train: Split) -> Split:
    """The training images that metrics are taken on: those with labels of their own. Ids are as in ``train``."""
    return train.subset(np.arange(len(train) - config.data.confusion_images))


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


def plan_steps(config: Config, split: Split, workers: int) -> tuple[Order, int | None]:
    """The order of the training samples, and the images a sub-batch holds (None: never regularized)."""
    data, regularizer, samples = config.data, config.regularizer, len(split)
    if samples < workers:
        raise ValueError(f"data.path has {samples} training images, fewer than the {workers} workers")
    global_batch = data.global_batch_size or (data.batch_size or 0) * workers
    if global_batch < workers:
        raise ValueError(
            f"data.global_batch_size must be at least the number of workers, got {global_batch} and {workers}"
        )

    def order(unit: int) -> Order:
        batch, shards = min(global_batch, samples), split.index["shard"]
        return Order(samples, batch, config.seed, data.remainder, data.mixing, shards, unit=unit)

    if regularizer.when == "never":
        return order(1), None
    size = regularizer.sub_batch_size
    if size is None:
        assert regularizer.sub_batches is not None
        size, uneven = divmod(global_batch, workers * regularizer.sub_batches)
        if uneven:
            raise ValueError(
                f"regularizer.sub_batches must divide every worker's share of the global batch, got "
                f"{regularizer.sub_batches}, {global_batch} images and {workers} workers: give sub_batch_size instead"
            )
    elif global_batch % size:
        raise ValueError(
            f"regularizer.sub_batch_size must divide the global batch, got {size} and {global_batch} images"
        )
    most = -(-(global_batch // size) // workers)
    if regularizer.sampled is not None and regularizer.sampled > most:
        raise ValueError(
            f"regularizer.sampled must be at most the number of sub-batches of a worker, "
            f"got {regularizer.sampled} and {most}"
        )
    return order(size), size


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
    config: Config, recipe: Path, settings: dict[str, Any], order: Order
) -> tuple[Path, checkpoint.State | None]:
    """The run's directory, and the checkpoint it goes on from, if any."""
    directory = Path(config.run_dir) if config.run_dir else None
    occupied = directory is not None and (directory / "records.jsonl").exists()
    begun = directory is not None and checkpoint.newest_first(directory / "checkpoints")
    if config.resume is None or (config.resume == "auto" and not begun):
        if occupied and config.resume is None:
            raise ValueError(
                f"run_dir {directory} holds a run already: go on from it with resume=auto, or give another run_dir"
            )
        return directory or Path("runs") / f"{recipe.stem}-{time.strftime('%Y%m%d-%H%M%S')}", None
    assert directory is not None or config.resume != "auto"
    place = directory if directory and config.resume == "auto" else Path(config.resume)
    path, state = checkpoint.load_newest(place, lambda text: print(text, file=sys.stderr, flush=True))
    different = [
        f"{name}={settings.get(name)} (checkpoint: {state['settings'].get(name)})"
        for name in sorted(settings.keys() | state["settings"].keys())
        if settings.get(name) != state["settings"].get(name)
    ]
    if different and not config.resume_changed:
        raise ValueError(
            f"resume: {path} was trained with other settings: {', '.join(different)}: "
            "give those of the checkpoint, or resume_changed=true to go on with the new ones"
        )
    if different:
        print(f"resume: {path} goes on with changed settings: {', '.join(different)}", file=sys.stderr, flush=True)
        if any(text.startswith(("data.", "seed=")) for text in different):  # another sequence of global batches
            print(f"resume: epoch {state['epoch'] + 1} begins anew", file=sys.stderr, flush=True)
            state |= {"step": state["epoch"] * order.steps, "epoch_loss": (0.0, 0.0), "by_rank": []}
    if state["epochs"] >= config.epochs:
        raise ValueError(
            f"resume: {path} has all of its {state['epochs']:g} epochs behind it, got epochs={config.epochs}: "
            "give a larger number to train on"
        )
    return directory or path.parent.parent, state
