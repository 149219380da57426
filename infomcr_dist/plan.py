"""Estimate a run before it begins: its steps, memory, images a second, hours, and the size of its checkpoints.

    infomcr plan [RECIPE] [gpus=N] [key=value …]

Takes the settings of train. The run's own plain and regularized steps are taken on this machine, on random images and
with a worker's share of the global batch; the schedules give how many there are of each. What is not counted is printed
with the table: above all the exchange of gradients and the reading of images.

Exit code 0: planned; 2: a mistake in the settings or the data, or a step that does not fit the memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from infomcr_dist import checkpoint, state
from infomcr_dist.cli import PLAN
from infomcr_dist.config.plan import PlanSettings
from infomcr_dist.doctor.memory import first_regularized_step, trials, try_step
from infomcr_dist.doctor.results import gigabytes
from infomcr_dist.experiment import Experiment, compute_threads, open_experiment
from infomcr_dist.optimizers import build_optimizer
from infomcr_dist.preflight import check_precision
from infomcr_dist.run import initial_state
from infomcr_dist.world import SingleProcess
from pipelines.free_memory import free_memory
from pipelines.options import load

_STEPS = 6
"""Taken of each kind; the first is not like the others"""
NOT_COUNTED = "reading images, exchanging gradients, evaluation, the metric, writing checkpoints"


@dataclass(frozen=True)
class PhasePlan:
    """All plain, or all regularized steps of a run."""

    phase: str
    steps: int
    images: int
    """Of all workers and steps"""
    step_seconds: float
    """Median, at a worker's largest batch"""
    images_per_second: float
    """Of all workers"""
    memory_bytes: int
    """Peak of a worker"""
    hours: float


@dataclass(frozen=True)
class RunPlan:
    """A run."""

    recipe: str
    gpus: int
    device: str
    phases: list[PhasePlan]
    steps: int
    hours: float
    checkpoint_bytes: int
    """Of one, at the end of an epoch"""
    checkpoints: int
    """That there are at once, at most"""
    notes: list[str]


def count_steps(experiment: Experiment) -> dict[bool, tuple[int, int]]:
    """Steps and images of the whole run, plain (False) and regularized (True), by its schedules.

    Steps of an overhead budget count as regularized, also those that it leaves plain.
    """
    sampler, size = experiment.sampler, experiment.world_size
    per_epoch, total = sampler.steps, sampler.steps * experiment.config.epochs
    first = first_regularized_step(experiment)
    first = total if first is None else first
    last = sampler.local_batch(0, per_epoch - 1, 0, size)
    counts = {False: [0, 0], True: [0, 0]}
    for begin, end, on in ((0, first, False), (first, total, True)):
        lasts = end // per_epoch - begin // per_epoch  # the last global batch of an epoch may be smaller
        for steps, step in ((end - begin - lasts, 0), (lasts, per_epoch - 1)):
            batch = last if step else sampler.local_batch(0, 0, 0, size)
            regularized = on and experiment.num_penalized(batch, 0, None) is not None
            counts[regularized][0] += steps
            counts[regularized][1] += steps * batch.global_size
    return {phase: (steps, images) for phase, (steps, images) in counts.items() if steps}


def checkpoint_bytes(experiment: Experiment) -> int:
    """The size of a checkpoint at the end of an epoch: that of one which is written, and removed."""
    world = SingleProcess()
    model = experiment.build_model()
    run = initial_state(experiment, model, build_optimizer(experiment.config.optimizer, model), world)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()  # makes its state
    with tempfile.TemporaryDirectory() as folder:
        writer = checkpoint.Writer(Path(folder), 1)
        state.save(run.snapshot(experiment.sampler.steps), run.model, experiment, writer, world)
        writer.wait()
        (saved,) = writer.finished()
        if saved.error is not None:
            raise ValueError(f"a checkpoint cannot be written into the temporary directory (TMPDIR): {saved.error}")
        (path,) = checkpoint.newest_first(Path(folder))
        return path.stat().st_size


def plan(experiment: Experiment, recipe: str) -> RunPlan:
    """Take the steps and plan the run.

    Raises:
        ValueError: a step does not fit the memory, or this machine does not compute in the run's precision.
    """
    check_precision(experiment.config.precision, SingleProcess().device)
    config, gpus = experiment.config, experiment.world_size
    threads = compute_threads(config.threads, 1)
    costs = {
        trial.penalty is not None: (trial, try_step(trial, 0, threads, free_memory(), _STEPS))
        for trial in trials(experiment)
    }
    budget = config.regularizer.overhead_budget
    phases = []
    for phase, (steps, images) in count_steps(experiment).items():
        trial, cost = costs[phase]
        seconds = cost.seconds
        if phase and budget is not None:
            plain_trial, plain = costs[False]
            seconds = budget * plain.seconds * trial.images / plain_trial.images
        speed = gpus * trial.images / seconds
        name = "regularized" if phase else "plain"
        phases.append(PhasePlan(name, steps, images, seconds, speed, cost.peak_bytes, images / speed / 3600))
    on_gpu = torch.cuda.is_available()
    notes = [f"not counted: {NOT_COUNTED}"]
    if on_gpu:
        notes.append("steps are launched kernel by kernel; a run takes CUDA graphs where it can, which are faster")
    if config.schedule.kind == "plateau" and config.regularizer.when == "after_drop":
        notes.append("the training loss is taken to reach its plateau as early as it can, which is the longest run")
    if budget is not None:
        notes.append(f"regularized steps are taken to keep within regularizer.overhead_budget={budget:g}")
    return RunPlan(
        recipe=recipe,
        gpus=gpus,
        device=torch.cuda.get_device_name() if on_gpu else f"CPU, {threads} threads",
        phases=phases,
        steps=sum(phase.steps for phase in phases),
        hours=sum(phase.hours for phase in phases),
        checkpoint_bytes=checkpoint_bytes(experiment),
        checkpoints=config.checkpoint.keep + 2,  # with the best, and the one being written
        notes=notes,
    )


def table(planned: RunPlan, experiment: Experiment) -> str:
    """The plan as text."""
    config, sampler = experiment.config, experiment.sampler
    lines = [
        f"{planned.recipe}: {config.model}, {config.epochs} epochs of {sampler.steps} steps of "
        f"{sampler.global_batch} images; {planned.gpus} × {planned.device}",
        "",
        f"{'':12}{'steps':>10}{'s a step':>12}{'images/s':>12}{'GB a worker':>14}{'hours':>10}",
    ]
    for phase in planned.phases:
        lines.append(
            f"{phase.phase:12}{phase.steps:10}{phase.step_seconds:12.4f}{phase.images_per_second:12.0f}"
            f"{phase.memory_bytes / 1e9:14.2f}{phase.hours:10.3f}"
        )
    lines.append(f"{'all':12}{planned.steps:10}{'':38}{planned.hours:10.3f}")
    size, count = planned.checkpoint_bytes, planned.checkpoints
    lines += ["", f"a checkpoint has {size / 1e6:.1f} MB; at most {count} at once, {gigabytes(count * size)}"]
    return "\n".join([*lines, *planned.notes])


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    return PLAN.run(arguments, _plan)


def _plan(positionals: list[str], overrides: list[str]) -> int:
    recipe = Path(positionals[0])
    settings = load(PlanSettings, recipe, overrides)
    experiment = open_experiment(settings, settings.gpus)
    planned = plan(experiment, recipe.stem)
    print(table(planned, experiment), flush=True)
    if settings.output is not None:
        text = json.dumps(asdict(planned), indent=2) + "\n"
        checkpoint.write_atomically(Path(f"{settings.output}.json"), lambda file: file.write(text.encode()))
        print(f"\nwritten: {settings.output}.json", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
