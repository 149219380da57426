"""The assembly of a run: everything up to its first step."""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from infomcr_dist import checkpoint, records
from infomcr_dist.averaging import AveragedWeights
from infomcr_dist.config import Config
from infomcr_dist.experiment import Experiment, compute_threads, open_experiment, prepare_demo_data
from infomcr_dist.initial_weights import load_initial_weights
from infomcr_dist.optimizers import build_optimizer
from infomcr_dist.overhead_budget import OverheadBudget
from infomcr_dist.preflight import check_run
from infomcr_dist.profiler import StepProfiler
from infomcr_dist.records import CheckpointRecord, OverheadBudgetRecord, Phase
from infomcr_dist.run_lock import lock_run
from infomcr_dist.schedules import LearningRate, PenaltyWeight
from infomcr_dist.state import (
    Committed,
    TrainState,
    check_elastic,
    find_directory_and_state,
    is_finished,
    newest_committed,
    save,
)
from infomcr_dist.step import PenaltySettings, penalty_settings
from infomcr_dist.telemetry import Telemetry
from infomcr_dist.world import Finished, World
from pipelines import Loader, open_loader
from pipelines.options import flat, to_dict, to_yaml

_SLOW_SECONDS = 5.0
"""After so long a wait for a checkpoint is reported, then after twice as long, and so on"""


@dataclass
class Run:
    """All that a run needs before its first step."""

    config: Config
    world: World
    experiment: Experiment
    directory: Path
    state: TrainState
    checkpoints: checkpoint.Writer
    telemetry: Telemetry
    profiler: StepProfiler
    train_loader: Loader
    """The training split, augmented, for the steps"""
    train_eval_loader: Loader
    """The training split as it is, for evaluation and metric"""
    test_loader: Loader
    resources: ExitStack
    restarts: dict[str, int]
    committed: Committed | None = None
    """The last state committed, in an elastic world"""
    equal_step: int = 0
    """Step after which the workers' weights were last seen to be equal"""
    plain_gradient_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=200))
    """Of the last plain steps: what a regularized step's are compared with"""

    def close(self) -> None:
        """Finish what is being saved, close the records, free the port, end the loaders."""
        self.resources.close()

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients a step gives to the allreduce."""
        parameters = self.state.model.parameters()
        return 0 if self.world.size == 1 else sum(p.nbytes for p in parameters if p.requires_grad)

    def penalty(self, num_penalized: int | None, beta: float | None) -> PenaltySettings | None:
        """How a step with so many penalized sub-batches is regularized; None for a plain one."""
        budget, size = self.state.overhead_budget, self.experiment.sub_batch_size
        if beta is None or size is None or num_penalized is None or (budget is not None and num_penalized == 0):
            return None
        weight = 1.0 if budget is None else num_penalized / budget.mean
        return penalty_settings(self.config.regularizer, size, beta * weight, num_penalized)

    def penalty_duration(self, phase: Phase, gradient_seconds: float) -> float | None:
        """Seconds that a regularized step's gradient took beyond a plain one's (median of the last ones)."""
        if phase == "plain":
            self.plain_gradient_seconds.append(gradient_seconds)
            return None
        if not self.plain_gradient_seconds:
            return None
        return max(0.0, gradient_seconds - statistics.median(self.plain_gradient_seconds))

    def commit(self) -> checkpoint.State:
        """A copy of the state; an elastic world resumes from the last one."""
        state = self.state.snapshot(self.experiment.sampler.steps)
        if self.world.elastic:
            self.committed = Committed(self.directory, state, dict(self.restarts))
        return state

    def save(self, state: checkpoint.State, best: bool = False) -> None:
        """Begin to write what `commit` returned, once the checkpoint before it is written."""
        self._wait_for_checkpoint()
        save(state, self.state.model, self.experiment, self.checkpoints, self.world, best)

    def last_save(self) -> str | None:
        """Wait until the last checkpoint is written; why it could not be, on every worker."""
        self._wait_for_checkpoint()
        return self.world.broadcast(self.log_saved())  # type: ignore[no-any-return]

    def _wait_for_checkpoint(self) -> None:
        """Wait until none is being written, on every worker, none of which is thereby taken for one that hangs."""
        began, reported, location = time.monotonic(), _SLOW_SECONDS, self.world.location
        while not self.world.broadcast(self.checkpoints.wait(1.0)):
            self.world.location = "the writing of a checkpoint"
            waited = time.monotonic() - began
            if waited >= reported:
                reported *= 2
                self.telemetry.message(f"checkpoint: still being written after {waited:.0f} s: is the disk slow?")
        self.world.location = location

    def log_saved(self) -> str | None:
        """Log the checkpoints that were written or failed since the last call; why the last of them failed."""
        failure = None
        for saved in self.checkpoints.finished():
            failure = saved.error
            outcome: Literal["written", "failed"] = "written" if saved.error is None else "failed"
            record = CheckpointRecord(self.state.step, saved.step, outcome, saved.seconds, saved.error)
            self.telemetry.log(record)
            if saved.error is not None:
                self.telemetry.message(
                    f"checkpoint: {saved.error}; training continues, the checkpoint before it is kept"
                )
        return failure


def prepare_run(config: Config, recipe: Path, world: World, committed: Committed | None = None) -> Run:
    """Everything up to the first step.

    Args:
        config: the settings.
        recipe: its name becomes part of the run directory's where none is given.
        world: the workers.
        committed: what a worker of a restarted world resumes from; one that has just joined has none.

    Raises:
        UserError: on every worker, for a user's mistake met by any.
    """
    with ExitStack() as resources:
        return _prepare_run(config, recipe, world, committed, resources)


def _prepare_run(config: Config, recipe: Path, world: World, committed: Committed | None, resources: ExitStack) -> Run:
    torch.set_num_threads(compute_threads(config.threads, world.local_size))
    with world.synchronize_errors():
        if world.elastic:
            check_elastic(config)
        if world.local_rank == 0:
            prepare_demo_data(config.data.path)
    with world.synchronize_errors():
        experiment = open_experiment(config, world.size)
        updates, watched = experiment.sampler.steps * config.epochs, config.profile.steps
        if watched is not None and watched[0] >= updates:
            raise ValueError(
                f"profile.steps must begin before the last of the run's {updates} updates, got {[*watched]}"
            )
        if committed is None:  # a restarted world has run it
            classes, size = len(experiment.dataset.classes), experiment.sub_batch_size
            check_run(config, classes, experiment.image_size, size, world.device)
        model = experiment.build_model().to(world.device)
        optimizer = build_optimizer(config.optimizer, model)
        evaluated = config.evaluation.batch_size
        train, test = experiment.splits["train"], experiment.splits["test"]
        largest = max(evaluated, config.metric.samples)
        train_loader = experiment.open_train_loader(world)
        train_eval_loader = open_loader(train, experiment.eval_loader_config(world, largest))
        test_loader = open_loader(test, experiment.eval_loader_config(world, evaluated))
        for loader in (train_loader, train_eval_loader, test_loader):
            resources.callback(loader.close)
    with world.synchronize_errors():
        telemetry = _open_telemetry(config, recipe, world)
        resources.callback(telemetry.close)

    restarts: dict[str, int] = {}
    newest = newest_committed(committed, model, world)
    if newest is not None:
        directory, saved, restarts = newest.directory, newest.state, newest.restarts
    else:
        directory, saved = Path(), None
        with world.synchronize_errors():
            if world.rank == 0:
                directory, saved = find_directory_and_state(experiment, recipe)
        directory, saved = world.broadcast((directory, saved))
        if saved is not None and is_finished(saved, config):
            raise Finished(f"{directory} has completed all of its {config.epochs} epochs: nothing is left to do")

    taken_over = None
    if saved is None and config.init_from is not None:
        with world.synchronize_errors():
            if world.rank == 0:  # which sends its weights to the others
                taken_over = load_initial_weights(Path(config.init_from), model, experiment)
    state = initial_state(experiment, model, optimizer, world)
    if saved is not None:
        state.restore(saved, directory, world)
    if state.overhead_budget is not None:
        telemetry.log(OverheadBudgetRecord(state.step, state.overhead_budget.ratio))
    writer = checkpoint.Writer(directory / "checkpoints", config.checkpoint.keep)
    resources.callback(writer.wait)
    with world.synchronize_errors():
        if world.rank == 0:
            checkpoint.make_directory(directory, "run_dir")
            if not world.elastic:  # there a lost rank 0 may end after the one in its place has begun
                resources.callback(os.close, lock_run(directory))
            checkpoint.make_directory(directory / "checkpoints", "run_dir")
            checkpoint.remove_unfinished(directory / "checkpoints")
            checkpoint.write_atomically(directory / "config.yaml", lambda file: file.write(to_yaml(config).encode()))
        steps = experiment.sampler.steps
        evaluated_epoch = state.step == state.epoch * steps
        settings = flat(to_dict(config))
        telemetry.begin(directory / records.FILE, steps * config.epochs, state.step, evaluated_epoch, settings)
        if taken_over is not None:
            telemetry.message(taken_over)
    profiled = config.profile.steps if world.rank == 0 else None
    profiler = StepProfiler(profiled, directory, world.device, telemetry.message)
    resources.callback(profiler.close)
    return Run(
        config=config,
        world=world,
        experiment=experiment,
        directory=directory,
        state=state,
        checkpoints=writer,
        telemetry=telemetry,
        profiler=profiler,
        train_loader=train_loader,
        train_eval_loader=train_eval_loader,
        test_loader=test_loader,
        resources=resources.pop_all(),
        restarts=restarts,
        equal_step=state.step,
    )


def _open_telemetry(config: Config, recipe: Path, world: World) -> Telemetry:
    info = {"model": config.model, "recipe": recipe.stem, "backend": config.data.backend}
    info |= {"engine": world.engine, "precision": config.precision, "estimator": config.regularizer.estimator}
    info |= {"method": config.regularizer.method, "derivative": config.regularizer.derivative}
    return Telemetry(
        config.telemetry,
        rank=world.rank,
        local_rank=world.local_rank,
        world_size=world.size,
        device=world.device,
        info=info,
    )


def initial_state(
    experiment: Experiment, model: nn.Module, optimizer: torch.optim.Optimizer, world: World
) -> TrainState:
    """The state before the first step, of a network on the world's device."""
    config, sampler = experiment.config, experiment.sampler
    scale = sampler.global_batch / (config.optimizer.reference_batch_size or sampler.global_batch)
    peak = config.optimizer.learning_rate * scale
    budget = None
    if config.regularizer.overhead_budget is not None and experiment.sub_batch_size is not None:
        budget = OverheadBudget(config.regularizer.overhead_budget, experiment.num_sub_batches, config.seed)
    average = None if config.averaging.kind == "none" else AveragedWeights(model, config.averaging)
    model, optimizer = world.distribute(model, optimizer)
    return TrainState(
        model=model,
        optimizer=optimizer,
        learning_rate=LearningRate(config.schedule, peak, config.epochs, sampler.steps),
        penalty_weight=PenaltyWeight(config.regularizer, config.schedule.warmup_epochs),
        overhead_budget=budget,
        average=average,
    )
