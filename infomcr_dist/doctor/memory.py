"""Whether the steps of a run fit the memory: the largest of each kind is taken by the trainer's own `train_step`.

Each is tried in a process of its own, which alone ends if it runs out of memory, on random images and at a learning
rate of 0.
"""

from __future__ import annotations

import os
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from torch import nn

from infomcr_dist import models
from infomcr_dist.allocator import keep_freed_memory
from infomcr_dist.config import Config
from infomcr_dist.doctor.results import Result, attempt, gigabytes
from infomcr_dist.experiment import Experiment, compute_threads
from infomcr_dist.optimizers import build_optimizer
from infomcr_dist.precision import set_deterministic, set_float32_precision
from infomcr_dist.preflight import check_run
from infomcr_dist.schedules import LearningRate, PenaltyWeight
from infomcr_dist.step import PenaltySettings, penalty_settings, train_step
from infomcr_dist.world import SingleProcess, World
from pipelines.free_memory import free_memory
from pipelines.pools import begin_worker

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """A step to try. Small, unlike an `Experiment`: it is sent to another process."""

    config: Config
    classes: int
    image_size: int
    images: int
    """Of the local batch"""
    penalty: PenaltySettings | None = None
    """None: a plain step"""

    def __str__(self) -> str:
        return f"a {'plain' if self.penalty is None else 'regularized'} step of {self.images} images"

    @property
    def remedy(self) -> str:
        """What would lower its memory."""
        smaller = "lower data.batch_size (or data.global_batch_size), or start fewer ranks per host"
        if self.penalty is not None:
            given = self.config.regularizer.sub_batches is not None
            smaller = f"{'raise regularizer.sub_batches' if given else 'lower regularizer.sub_batch_size'}, {smaller}"
            if self.penalty.estimator == "fused":  # it takes no more than a sub-batch at once
                return smaller
        return f"{'lower' if self.config.data.max_batch_size else 'give'} data.max_batch_size, {smaller}"


@dataclass(frozen=True)
class StepCost:
    """Of a step: its seconds, the peak of the memory that its process took, and the memory there is for it."""

    seconds: float
    peak_bytes: int
    room_bytes: int


def check_memory(results: list[Result], experiment: Experiment | None, world: World, room: int | None = None) -> None:
    """Try the steps of the run, on all ranks at once, as in the job.

    Args:
        results: of this rank so far.
        experiment: None where it could not be opened; the rank still takes part in the collectives.
        world: the workers.
        room: bytes that this worker may take on the CPU; None: its share of what is free on its host.
    """
    made: list[Result] = []
    if room is None:
        room = attempt(made, "memory", free_memory)
        room = None if room is None else room // world.local_size
    world.barrier()  # every rank has read what is free
    costs = None
    if experiment is not None and room is not None:
        costs = attempt(made, "memory", try_steps, experiment, world, room)
    by_rank = [of_rank for of_rank in world.gather(costs) if of_rank is not None]
    if experiment is None or costs is None:
        results += [result for result in made if not result.ok]
        return
    texts = []
    for trial, of_trial in zip(trials(experiment), zip(*by_rank, strict=True), strict=True):
        peak, seconds = max(cost.peak_bytes for cost in of_trial), max(cost.seconds for cost in of_trial)
        texts.append(f"{trial} takes {gigabytes(peak)} and {seconds:.1f} s")
    least = min(cost.room_bytes for of_rank in by_rank for cost in of_rank)
    text = f"{', '.join(texts)}, of {gigabytes(least)} free per worker (worst of the ranks)"
    results.append(Result("memory", True, text))


def trials(experiment: Experiment) -> list[Trial]:
    """The largest plain and the largest regularized step of the run, of those it takes."""
    config, sampler, size = experiment.config, experiment.sampler, experiment.world_size
    settings, first = config.regularizer, first_regularized_step(experiment)
    budget = settings.overhead_budget is not None
    plain = regularized = None
    # All global batches of an epoch but the last are of one size.
    batches = [sampler.local_batch(0, step, rank, size) for step in {0, sampler.steps - 1} for rank in range(size)]
    for batch in sorted(batches, key=lambda batch: len(batch.samples)):
        num_penalized = experiment.num_penalized(batch, 0, None)
        trial = Trial(config, len(experiment.dataset.classes), experiment.image_size, len(batch.samples))
        if num_penalized is None or first != 0 or budget:  # a budget makes some steps plain
            plain = trial
        if num_penalized is not None and first is not None:
            assert experiment.sub_batch_size is not None
            # Of the numbers that a budget draws, 1 leaves the most images to the plain pass.
            k = 1 if budget else num_penalized
            penalty = penalty_settings(settings, experiment.sub_batch_size, settings.weight, k)
            regularized = replace(trial, penalty=penalty)
    return [trial for trial in (plain, regularized) if trial is not None]


def first_regularized_step(experiment: Experiment) -> int | None:
    """The step of the run, from 0, at which its schedules switch the regularizer on, to stay; None: never.

    A plateau is assumed to come as early as it can.
    """
    config, steps = experiment.config, experiment.sampler.steps
    if experiment.sub_batch_size is None:
        return None
    rate = LearningRate(config.schedule, 1.0, config.epochs, steps)
    weight = PenaltyWeight(config.regularizer, config.schedule.warmup_epochs)
    for epoch in range(config.epochs):
        for step in range(steps):
            progress = epoch + step / steps
            if weight.at(progress, rate.at(progress)) is not None:
                return epoch * steps + step
        rate.end_epoch(epoch, training_loss=1.0)
    return None


def try_steps(experiment: Experiment, world: World, room: int) -> list[StepCost]:
    """`step_cost` of each of the `trials`; ValueError if one does not fit."""
    threads = compute_threads(experiment.config.threads, world.local_size)
    return [try_step(trial, world.local_rank, threads, room) for trial in trials(experiment)]


def try_step(trial: Trial, local_rank: int, threads: int, room: int, steps: int = 2) -> StepCost:
    """`step_cost` in a process of its own; ValueError if the step does not fit."""
    where = f"cuda:{local_rank}" if torch.cuda.is_available() else f"{gigabytes(room)} free per worker"
    what = f"{trial} of {trial.image_size} × {trial.image_size} does not fit the memory"
    return in_own_process(f"{what} ({where})", trial.remedy, step_cost, trial, local_rank, threads, room, steps)


def in_own_process(failure: str, remedy: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process.

    Args:
        failure: the message where the process runs out of memory, or is killed.
        remedy: what the user can do then.
        function: of a module's top level; called with ``arguments``. Its own errors are raised here.

    Raises:
        ValueError: the process ran out of memory, or was killed.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), begin_worker, (os.getpid(),)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise ValueError(f"{failure}; its process was killed: {remedy}") from None
        except (MemoryError, RuntimeError) as error:
            # torch has a type for this on GPUs alone.
            known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not known:
                raise
            raise ValueError(f"{failure}: {remedy}") from None


def step_cost(trial: Trial, local_rank: int, threads: int, room: int, steps: int = 2) -> StepCost:
    """Take a step some times: the first creates the optimizer's state, the others are like all that follow.

    Args:
        trial: the step.
        local_rank: as of `start_alone`, which limits this process.
        threads: likewise.
        room: likewise.
        steps: how many; the seconds are the median of all but the first.
    """
    world, room = start_alone(local_rank, threads, room)
    config, size = trial.config, trial.image_size
    set_float32_precision(config.precision == "tf32")
    set_deterministic(config.deterministic)
    torch.manual_seed(config.seed)
    model = models.build(config.model, trial.classes, size, config.frozen).to(world.device).train()
    model, optimizer = world.distribute(model, build_optimizer(config.optimizer, model))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    images = torch.randn(trial.images, 3, size, size, device=world.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(trial.classes, (trial.images,), device=world.device)
    seconds = []
    for _ in range(steps):
        result = train_step(
            model,
            nn.CrossEntropyLoss(label_smoothing=config.optimizer.label_smoothing),
            optimizer,
            world,
            (images, labels),
            loss_scale=1.0,
            penalty=trial.penalty,
            bf16=config.precision == "bf16",
            clip_gradient_norm=config.optimizer.clip_gradient_norm,
            max_batch_size=config.data.max_batch_size,
        )
        seconds.append(result.gradient_seconds + result.allreduce_wait_seconds + result.update_seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_reserved()
    return StepCost(statistics.median(seconds[1:]), peak, room)


def check_preflight(results: list[Result], experiment: Experiment, world: World) -> None:
    """Try the plain and the regularized step and the metric on this network, in a process of its own."""
    config, size = experiment.config, experiment.sub_batch_size
    room, threads = free_memory() // world.local_size, compute_threads(config.threads, world.local_size)
    facts = (config, len(experiment.dataset.classes), experiment.image_size, size)
    failure, remedy = "two sub-batches and the metric do not fit the memory", "start fewer ranks per host"
    attempt(results, "preflight", in_own_process, failure, remedy, _check_run, facts, world.local_rank, threads, room)


def _check_run(facts: tuple[Config, int, int, int | None], local_rank: int, threads: int, room: int) -> str:
    world, _ = start_alone(local_rank, threads, room)
    set_float32_precision(facts[0].precision == "tf32")
    set_deterministic(facts[0].deterministic)
    return check_run(*facts, world.device)


def start_alone(local_rank: int, threads: int, room: int) -> tuple[World, int]:
    """Make this process a worker without the others; on the CPU it can allocate ``room`` bytes from now on.

    Args:
        local_rank: of the worker whose GPU is taken, where there are any.
        threads: that it computes with on the CPU.
        room: in bytes; a GPU has as many as are free on it.

    Returns:
        A world of one process, and its room in bytes.
    """
    world = _Alone(local_rank)
    if world.device.type == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (room, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    else:
        room = torch.cuda.mem_get_info()[0]
    torch.set_num_threads(threads)
    keep_freed_memory()
    return world, room


class _Alone(SingleProcess):
    """A worker's process without the others, on the worker's GPU."""

    def __init__(self, local_rank: int) -> None:
        self.local_rank = local_rank
        super().__init__()
