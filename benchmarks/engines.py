"""Time of a step on either engine, plain and regularized, next to the usual loop of each, on two workers.

    python benchmarks/engines.py
    python benchmarks/engines.py model=wrn_28_2 rounds=20

Two workers of each engine, one thread each, on this machine; both jobs are there all the time and take turns, a step of
every kind a round in random order, while the other job is stopped (SIGSTOP). "usual loop" is Horovod's example and a
loop with DistributedDataParallel, for the plain step. "two processes" takes the same plain step in both processes at
once without a word between them: what of the machine two workers have, to which the efficiency refers. The table gives
medians and, in brackets, the quartiles of the ratios to Horovod's plain step of the same round.
"""

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
from turns import LAUNCHERS, WORKERS, Job, serve, spread

from infomcr_dist.engines import connect
from infomcr_dist.models import build
from infomcr_dist.step import PenaltySettings, train_step
from infomcr_dist.world import SingleProcess, World
from pipelines.options import load


@dataclass(frozen=True)
class Settings:
    """What is timed."""

    model: str = "resnet20"
    batch_size: int = 64
    """Of a worker"""
    sub_batch_size: int = 16
    rounds: int = 15


def kinds(settings: Settings, world: World) -> dict[str, Callable[[], object]]:
    """A step of each kind on this worker."""
    criterion = nn.CrossEntropyLoss()
    images, labels = torch.randn(settings.batch_size, 3, 32, 32), torch.randint(10, (settings.batch_size,))
    images = images.contiguous(memory_format=torch.channels_last)

    def ours(of: World, penalty: PenaltySettings | None) -> Callable[[], object]:
        model = build(settings.model, 10, 32)
        model, optimizer = of.distribute(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
        batch = images, labels
        return partial(train_step, model, criterion, optimizer, of, batch, loss_scale=1.0, penalty=penalty)

    def usual() -> Callable[[], object]:
        model: nn.Module = build(settings.model, 10, 32)
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        if world.engine == "horovod":
            import horovod.torch as hvd

            optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        else:
            model = nn.parallel.DistributedDataParallel(model)

        def step() -> None:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()

        return step

    regularized = PenaltySettings(alpha=1e-4, beta=10.0, sub_batch_size=settings.sub_batch_size)
    return {
        "plain": ours(world, None),
        "usual loop": usual(),
        "regularized": ours(world, regularized),
        "two processes": ours(SingleProcess(), None),
        "one process": ours(SingleProcess(), None),
    }


def worker(settings: Settings) -> None:
    """Take a round whenever a line comes on the pipe, and write its seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    world = connect()
    calls = kinds(settings, world)

    def take_round(number: int) -> dict[str, float]:
        seconds = {}
        calls["plain"]()  # this process was stopped: its caches are cold
        for name in random.Random(number).sample(list(calls), len(calls)):
            world.barrier()
            began = time.perf_counter()
            if name != "one process" or world.rank == 0:
                calls[name]()
            world.barrier()
            seconds[name] = time.perf_counter() - began
        return seconds

    serve(world, take_round)


def main(settings: Settings, arguments: list[str]) -> None:
    """Run both jobs in turns and print the table."""
    rounds: list[dict[tuple[str, str], float]] = []
    with ExitStack() as resources:
        jobs = {engine: Job(resources, engine, arguments, {"OMP_NUM_THREADS": "1"}) for engine in LAUNCHERS}
        for number in range(settings.rounds + 1):
            seconds = {}
            for engine, job in sorted(jobs.items(), reverse=number % 2 == 1):
                for name, value in job.round(number).items():
                    seconds[engine, name] = value
            if number:  # the first is a warm-up
                rounds.append(seconds)

    size = f"{settings.batch_size} images a worker, sub-batches of {settings.sub_batch_size}"
    what = f"{settings.model}, {WORKERS} workers of one thread, {size}"
    print(f"{what}, {settings.rounds} rounds, torch {torch.__version__}")
    print("\n| engine | step | ms | x Horovod's plain step |\n|---|---|---|---|")
    for engine, name in sorted(rounds[0]):
        times = [seconds[engine, name] for seconds in rounds]
        ratio = spread([seconds[engine, name] / seconds["horovod", "plain"] for seconds in rounds])
        print(f"| {engine} | {name} | {1000 * statistics.median(times):.0f} | {ratio} |")
    print()
    for engine in LAUNCHERS:
        beside = spread([seconds[engine, "two processes"] / seconds[engine, "plain"] for seconds in rounds])
        alone = spread([seconds[engine, "one process"] / seconds[engine, "plain"] for seconds in rounds])
        print(f"{engine}: efficiency of 2 workers {beside} of two processes side by side, {alone} of one alone")
    for name in ("plain", "usual loop", "regularized"):
        print(f"torch / horovod, {name}: {spread([s['torch', name] / s['horovod', name] for s in rounds])}")


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["worker"]:
            worker(load(Settings, None, sys.argv[2:]))
        else:
            main(load(Settings, None, sys.argv[1:]), sys.argv[1:])
    except ValueError as error:
        sys.exit(f"engines: {error}")
