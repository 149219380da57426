"""Where the time of a step goes when two workers share a host: one process, two that share nothing, two ranks.

    python benchmarks/scaling.py
    python benchmarks/scaling.py engines=[horovod] "environments=[HOROVOD_CYCLE_TIME=1,HOROVOD_CYCLE_TIME=20]"

A job has two workers of one thread each; there is one for every engine and environment, and all of them take turns. In
a round a job takes `steps` steps of each kind, in random order: "one" in rank 0 while the other waits, "two" in both
without a word between them, "ranks" with the allreduce. Times are medians of a step: of the whole; of the training
thread's processor time; of its wait for the allreduce; and of the processor time of all other threads, of both
processes. The ratio compares with "two" of the same job and round: what sending the gradients costs, of which
"processor" is the part that work of any kind takes.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from turns import LAUNCHERS, Job, serve, spread

from infomcr_dist.allocator import keep_freed_memory
from infomcr_dist.config import OptimizerSettings
from infomcr_dist.engines import connect
from infomcr_dist.models import build
from infomcr_dist.optimizers import build_optimizer
from infomcr_dist.step import PenaltySettings, StepResult, train_step
from infomcr_dist.world import SingleProcess, World
from pipelines.options import load

PARTS = ("step", "main", "wait", "other")


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    model: str = "resnet20"
    image_size: int = 32
    batch_size: int = 64
    """Of a worker"""
    sub_batch_size: int = 16
    steps: int = 5
    """Of a kind in a round"""
    rounds: int = 8
    engines: tuple[str, ...] = tuple(LAUNCHERS)
    environments: tuple[str, ...] = ("",)
    """Variables of a job, as NAME=VALUE NAME=VALUE; empty: none"""


def kinds(settings: Settings, world: World) -> dict[str, Callable[[], StepResult]]:
    """A step of each kind on this worker."""
    shape = settings.batch_size, 3, settings.image_size, settings.image_size
    images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    batch = images, torch.randint(10, (settings.batch_size,))
    regularized = PenaltySettings(alpha=1e-4, beta=10.0, sub_batch_size=settings.sub_batch_size)
    calls: dict[str, Callable[[], StepResult]] = {}
    for phase, penalty in (("plain", None), ("regularized", regularized)):
        for kind, of in (("one", SingleProcess()), ("two", SingleProcess()), ("ranks", world)):
            model = build(settings.model, 10, settings.image_size)
            model, optimizer = of.distribute(model, build_optimizer(OptimizerSettings(learning_rate=0.01), model))
            step = partial(train_step, model, nn.CrossEntropyLoss(), optimizer, of, batch)
            calls[f"{phase}, {kind}"] = partial(step, loss_scale=1.0, penalty=penalty)
    return calls


def worker(settings: Settings) -> None:
    """Take a round whenever it is this job's turn."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = connect()
    calls = kinds(settings, world)

    def take_round(number: int) -> dict[str, list[float]]:
        times = {}
        for name in random.Random(number).sample(list(calls), len(calls)):
            own = [0.0] * len(PARTS)
            if world.rank == 0 or not name.endswith("one"):
                calls[name]()  # this process was stopped, or has waited: its caches are cold
                world.barrier()
                own = timed(calls[name], settings.steps)
            else:
                world.barrier()
            by_rank = world.gather(own)
            times[name] = [max(by_rank)[0], max(by_rank)[1], max(by_rank)[2], sum(of_rank[3] for of_rank in by_rank)]
        return times

    serve(world, take_round)


def timed(step: Callable[[], StepResult], steps: int) -> list[float]:
    """The `PARTS` of a step, in seconds: means over so many steps."""
    began = time.perf_counter(), time.thread_time(), time.process_time()
    wait = sum(step().allreduce_wait_seconds for _ in range(steps))
    ended = time.perf_counter(), time.thread_time(), time.process_time()
    whole, main, processor = (end - begin for begin, end in zip(began, ended, strict=True))
    return [whole / steps, main / steps, wait / steps, (processor - main) / steps]


def main(settings: Settings, arguments: list[str]) -> None:
    """Run the jobs in turns and print the table."""
    rounds: dict[tuple[str, str], list[dict[str, list[float]]]] = {}
    with ExitStack() as resources:
        jobs = {}
        for engine in settings.engines:
            for environment in settings.environments:
                variables = dict(pair.split("=", 1) for pair in environment.split())
                jobs[engine, environment] = Job(resources, engine, arguments, {"OMP_NUM_THREADS": "1"} | variables)
        for number in range(settings.rounds + 1):
            for job in random.sample(list(jobs), len(jobs)):
                result = jobs[job].round(number)
                if number:  # the first is a warm-up
                    rounds.setdefault(job, []).append(result)

    print(
        f"{settings.model} at {settings.image_size}x{settings.image_size}, {settings.batch_size} images a worker, "
        f"sub-batches of {settings.sub_batch_size}, {settings.rounds} rounds of {settings.steps} steps, "
        f"{os.cpu_count()} cores, torch {torch.__version__}\n"
    )
    print("| job | step | ms | training thread | wait | other threads | x two | x two, processor |")
    print("|---|---|---|---|---|---|---|---|")
    for (engine, environment), of_job in rounds.items():
        for name in of_job[0]:
            two = f"{name.partition(',')[0]}, two"
            parts = [f"{1000 * statistics.median(r[name][i] for r in of_job):.1f}" for i in range(len(PARTS))]
            wall = spread([r[name][0] / r[two][0] for r in of_job])
            processor = spread([_processor(r, name) / _processor(r, two) for r in of_job])
            print(f"| {engine} {environment} | {name} | {' | '.join(parts)} | {wall} | {processor} |")


def _processor(times: dict[str, list[float]], name: str) -> float:
    """Of a worker."""
    _, of_main, _, of_others = times[name]
    return of_main + of_others / (1 if name.endswith("one") else 2)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["worker"]:
            worker(load(Settings, None, sys.argv[2:]))
        else:
            main(load(Settings, None, sys.argv[1:]), sys.argv[1:])
    except ValueError as error:
        sys.exit(f"scaling: {error}")
