"""Is this machine, or this job, ready to train? A line a check: green and ok, or red, FAIL and what to do.

    python -m infomcr_dist.doctor [RECIPE.yaml] [key=value …]
    horovodrun -np 8 python -m infomcr_dist.doctor [RECIPE.yaml] [key=value …]

Give it what train would be given; under horovodrun every worker is checked, and rank 0 tells. Nothing is left behind.
Exit code 0: all ok; 1: something is not; 2: a mistake in the arguments or the recipe.
"""

from __future__ import annotations

import ipaddress
import json
import math
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from infomcr_dist import models
from infomcr_dist.config import Config, TelemetrySettings
from infomcr_dist.options import load_config
from infomcr_dist.regularizer import regularized_backward
from infomcr_dist.run import EMBEDDED, plan_steps, select_splits, stored_size
from infomcr_dist.world import Solo, connect, report_and_leave
from pipelines import open_dataset

DEMO = Path(__file__).parent.parent / "launch" / "recipes" / "demo.yaml"
CLOCK_SECONDS = 1.0
"""Clocks further than this from rank 0's are red: times in records, metrics and alerts would not line up."""
_ALLREDUCE_BYTES = 64 << 20
_ROUNDS = 5
_CONNECT_SECONDS = 5.0
_SPARE_BYTES = 64 << 20
"""Room for records, metrics and what a file system keeps for itself."""

# Asked of a process of its own: a Horovod that cannot be imported, or crashes, is then a red line.
_HOROVOD_FACTS = """
import json, pathlib, horovod, horovod.torch as hvd
path = pathlib.Path(horovod.__file__).with_name("metadata.json")
print(json.dumps({
    "version": horovod.__version__,
    "torch": json.loads(path.read_text())["pytorch"],
    "gloo": bool(hvd.gloo_built()),
    "mpi": bool(hvd.mpi_built()),
    "nccl": bool(hvd.nccl_built()),
}))
"""
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a check found on one rank; where it is not ok, the text ends with the remedy."""

    check: str
    ok: bool
    text: str


@dataclass(frozen=True)
class HorovodBuild:
    """torch: the version it was built for; gloo, mpi, nccl: whether they are built in."""

    version: str
    torch: str
    gloo: bool
    mpi: bool
    nccl: bool

    def __str__(self) -> str:
        return f"Horovod {self.version}, built for torch {self.torch}, with {'gloo' if self.gloo else 'MPI'}"


@dataclass(frozen=True)
class Plan:
    """What a recipe makes of the data and the number of workers; local_batch: images a worker a step."""

    text: str
    classes: int
    image_size: int
    local_batch: int
    sub_batch_size: int | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ModelBytes:
    """checkpoint: weights, buffers and momentum, as a checkpoint holds them."""

    name: str
    parameters: int
    checkpoint: int

    def __str__(self) -> str:
        return f"{self.name}, {self.parameters:,} parameters"


@dataclass(frozen=True)
class StepCost:
    """Of one step: its seconds, the peak of the memory it took, and the memory there is for it."""

    seconds: float
    peak_bytes: int
    room_bytes: int


@dataclass(frozen=True)
class Listener:
    """A host, and where it listens, at the address its own name resolves to."""

    host: str
    address: str
    port: int
    server: socket.socket


def attempt(results: list[Result], check: str, function: Callable[..., T], *arguments: Any) -> T | None:
    """Make a check: what it returns is ok and, as a text, said; what it raises is not. None where it raised."""
    try:
        found = function(*arguments)
    except Exception as error:  # a check takes no other one down, whatever the machine makes it raise
        reason = " ".join(str(error).split()) or type(error).__name__
        expected = isinstance(error, ValueError | OSError)
        results.append(Result(check, False, reason if expected else f"{type(error).__name__}: {reason}"))
        return None
    results.append(Result(check, True, str(found)))
    return found


def examine(config: Config, recipe: Path, world: Solo) -> list[Result]:
    """All checks of this rank, some of them together with the others. Raises as the world's collectives do."""
    results: list[Result] = []
    build = attempt(results, "horovod", horovod_build, torch.__version__)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    attempt(results, "gpus", judge_gpus, gpus, world.local_size, torch.version.cuda)
    if build is not None:
        attempt(results, "nccl", judge_nccl, build.nccl, len(gpus), torch.version.cuda)
    attempt(results, "tf32", tf32_state, bool(gpus))
    results.append(Result("recipe", True, f"{recipe}: model {config.model}, {config.epochs} epochs"))
    plan = attempt(results, "data", plan_of, config, world.size)
    model = attempt(results, "model", model_bytes, config, plan) if plan is not None else None
    if world.rank == 0:  # the run directory is rank 0's alone
        attempt(results, "run directory", check_directory, config, recipe, model)
    attempt(results, "telemetry port", check_port, config.telemetry, world.local_rank)
    _check_hosts(results, world)
    attempt(results, "clock", judge_clocks, clock_offsets(world))
    _check_allreduce(results, world)
    _check_step(results, config, plan, world)
    return results


def horovod_build(torch_version: str) -> HorovodBuild:
    """The installed Horovod. ValueError if it cannot be imported, or was built for another torch."""
    done = subprocess.run([sys.executable, "-c", _HOROVOD_FACTS], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"Horovod cannot be imported ({reason}): build it for torch {torch_version}: launch/setup.sh")
    build = HorovodBuild(**json.loads(done.stdout.splitlines()[-1]))
    if build.torch != torch_version:
        raise ValueError(
            f"Horovod {build.version} was built for torch {build.torch}, installed is {torch_version}: launch/setup.sh"
        )
    if not (build.gloo or build.mpi):
        raise ValueError(f"Horovod {build.version} has neither gloo nor MPI built in: launch/setup.sh")
    return build


def judge_gpus(names: list[str], local_ranks: int, cuda: str | None) -> str:
    """ValueError where several ranks of this host would have to share a GPU."""
    if not names:
        return "none: it trains on the CPU" + (f" (torch is built for CUDA {cuda}, but sees no GPU)" if cuda else "")
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    if len(names) < local_ranks:
        raise ValueError(
            f"{kinds}, fewer than the {local_ranks} ranks of this host: start one rank a GPU (-H HOST:GPUS)"
        )
    idle = len(names) - local_ranks
    return kinds + (f"; {idle} of them idle" if idle else "")


def judge_nccl(built: bool, gpus: int, cuda: str | None) -> str:
    """ValueError where GPUs would exchange gradients without NCCL."""
    if gpus and not built:
        raise ValueError(f"not built in, but torch is built for CUDA {cuda}: install libnccl-dev, then launch/setup.sh")
    return "built in" if built else "not built in, nor needed without GPUs"


def tf32_state(gpus: bool) -> str:
    """What torch does with float32 products on a GPU."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    state = f"{'on' if convolutions else 'off'} in cuDNN, {'on' if products else 'off'} in matrix products"
    return state + ("; the penalty's differences switch it off" if gpus else "; without effect on a CPU")


def plan_of(config: Config, workers: int) -> Plan:
    """The data set, opened: its shards there and of the sizes that their indexes tell. ValueError with the remedy."""
    if config.data.path == "fashion-mnist" and not EMBEDDED.exists():
        raise ValueError(
            f"{EMBEDDED} is not there yet: the first run prepares it, or python -m pipelines.prepare "
            f"fashion-mnist {EMBEDDED}"
        )
    dataset = open_dataset(EMBEDDED if config.data.path == "fashion-mnist" else config.data.path)
    splits = select_splits(config, dataset)
    order, sub_batch_size = plan_steps(config, splits["train"], workers)
    counts = ", ".join(f"{name} {len(split)} in {len(split.shards)} shards" for name, split in splits.items())
    local_batch = max(len(next(iter(order.parts(0, rank, workers))).samples) for rank in range(workers))
    return Plan(
        f"{dataset.path}: {len(dataset.classes)} classes, {counts}; {local_batch} images a worker a step",
        len(dataset.classes),
        config.data.image_size or stored_size(dataset),
        local_batch,
        sub_batch_size,
    )


def model_bytes(config: Config, plan: Plan) -> ModelBytes:
    """Size of the model; ValueError if there is none of that name."""
    model = models.build(config.model, classes=plan.classes, image_size=plan.image_size)
    weights = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    return ModelBytes(config.model, sum(p.numel() for p in model.parameters()), 2 * weights + buffers)


def check_directory(config: Config, recipe: Path, model: ModelBytes | None) -> str:
    """Whether the run's files can be written, and its checkpoints kept; OSError or ValueError if not."""
    wanted = Path(config.run_dir) if config.run_dir else Path("runs")
    place = next(path for path in (wanted.absolute(), *wanted.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"{wanted} cannot be written ({error.strerror}): give another run_dir=DIRECTORY") from None
    if model is None:
        return f"{wanted} can be written"
    needed = judge_space(shutil.disk_usage(place).free, model.checkpoint, config.checkpoint.keep)
    return f"{wanted} can be written, {needed}"


def judge_space(free: int, checkpoint: int, keep: int) -> str:
    """ValueError unless so many bytes hold ``keep`` checkpoints and the one being written."""
    needed = checkpoint * (keep + 1) + _SPARE_BYTES
    figures = f"{_gigabytes(free)} free, {_gigabytes(needed)} needed for {keep} + 1 checkpoints"
    if free < needed:
        raise ValueError(f"{figures}: make room, or give another run_dir=DIRECTORY")
    return figures


def check_port(settings: TelemetrySettings, local_rank: int) -> str:
    """Whether this rank's endpoint can be opened; ValueError if its port is taken."""
    if settings.port is None:
        return "none wanted (telemetry.port=null)"
    port = settings.port + local_rank
    try:
        if port > 65535:
            raise OSError("ports end at 65535")
        family, _, _, _, address = socket.getaddrinfo(settings.address, port, type=socket.SOCK_STREAM)[0]
        socket.create_server((address[0], port), family=family).close()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{port} on {settings.address} (telemetry.port={settings.port} + local rank {local_rank}) cannot be used "
            f"({reason}): give another telemetry.port, or telemetry.port=null"
        ) from None
    return f"{settings.port} + local rank, on {settings.address}, is free"


def judge_name(host: str, address: str, hosts: int) -> str:
    """ValueError where a host's own name leads to itself alone, and there are others: gloo connects to that address."""
    if hosts > 1 and _is_loopback(address):
        raise ValueError(
            f"{host} calls itself {address}, which other hosts cannot reach: "
            f"let {host} resolve to its network's address in its /etc/hosts"
        )
    return f"{host} is {address}"


def listen() -> Listener:
    """Listen where gloo would, at the address that this host's own name resolves to. OSError, ValueError if none."""
    host = socket.gethostname()
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"{host}, its own name, does not resolve ({error.strerror}): add it to /etc/hosts") from None
    try:
        server = socket.create_server((address[0], 0), family=family, backlog=1024)
    except OSError as error:
        raise ValueError(
            f"{host} calls itself {address[0]}, which is not its address (errno {error.errno}): correct its /etc/hosts"
        ) from None
    return Listener(host, str(address[0]), server.getsockname()[1], server)


def reach(others: Iterable[tuple[str, str, int]]) -> str:
    """Connect to each (host, address, port); ValueError names those that do not answer."""
    failures, count = [], 0
    for host, address, port in others:
        count += 1
        try:
            socket.create_connection((address, port), timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            failures.append(f"{host} at {address} ({error.strerror or error})")
    if failures:
        raise ValueError(f"not reached: {', '.join(failures)}: open the ports between the hosts (all of TCP)")
    return f"{count} other host{'s' * (count > 1)} reached"


def clock_offsets(world: Solo) -> list[float]:
    """Seconds by which the clock of each rank is ahead of rank 0's, to some milliseconds."""
    rounds = []
    for _ in range(_ROUNDS):
        world.barrier()
        rounds.append(world.gather(time.time()))
    return [statistics.median(times[rank] - times[0] for times in rounds) for rank in range(world.size)]


def judge_clocks(offsets: list[float]) -> str:
    """ValueError if a clock is further than CLOCK_SECONDS from rank 0's."""
    if len(offsets) == 1:
        return "one process"
    rank = max(range(len(offsets)), key=lambda i: abs(offsets[i]))
    figures = f"rank {rank}'s is {offsets[rank]:+.3f} s from rank 0's"
    if abs(offsets[rank]) > CLOCK_SECONDS:
        raise ValueError(f"{figures}, more than {CLOCK_SECONDS:g} s: set the hosts' clocks by NTP (chrony)")
    return f"{figures}, the furthest"


def reduce_once(buffers: nn.Module, world: Solo) -> float:
    """Seconds of an allreduce of the buffers of `payload`. ValueError if its result is not the mean over the ranks."""
    buffer = buffers.get_buffer("payload")
    buffer.fill_(world.rank)
    world.barrier()
    before = time.perf_counter()
    world.average_buffers(buffers)
    if buffer.is_cuda:
        torch.cuda.synchronize(buffer.device)
    seconds = time.perf_counter() - before
    expected = (world.size - 1) / 2
    if not bool((buffer == expected).all()):
        raise ValueError(
            f"the mean over {world.size} ranks is wrong ({buffer.mean():g} for {expected:g}): launch/setup.sh"
        )
    return seconds


def payload(device: torch.device) -> nn.Module:
    """A module that is 64 MB of buffers."""
    module = nn.Module()
    module.register_buffer("payload", torch.empty(_ALLREDUCE_BYTES // 4, device=device))
    return module


def step_cost(config: Config, plan: Plan, device: str, threads: int, room: int) -> StepCost:
    """One step of the recipe at the local batch, regularized where the recipe is, on random images.

    For a process of its own: what goes wrong in it, being killed for its memory included, ends that process alone.
    On the CPU it may not take more than ``room`` bytes.
    """
    if device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (room, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    else:
        torch.cuda.set_device(device)
        room = torch.cuda.mem_get_info()[0]
    torch.set_num_threads(threads)
    s, size = config.regularizer, plan.image_size
    model = models.build(config.model, classes=plan.classes, image_size=size).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=config.optimizer.momentum)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.optimizer.label_smoothing)
    images = torch.randn(plan.local_batch, 3, size, size, device=device)
    labels = torch.randint(plan.classes, (plan.local_batch,), device=device)
    before = time.perf_counter()
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16"):
        if plan.sub_batch_size is None:
            criterion(model(images), labels).backward()
        else:
            sampled = s.sampled or plan.local_batch // plan.sub_batch_size
            regularized_backward(
                model,
                criterion,
                images,
                labels,
                alpha=s.alpha,
                beta=s.beta,
                sub_batch_size=plan.sub_batch_size,
                way=s.way,
                sampled=sampled if s.way == "sampled" else None,
                derivative=s.derivative,
            )
    optimizer.step()
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - before
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return StepCost(seconds, resident if device == "cpu" else torch.cuda.max_memory_reserved(), room)


def try_step(config: Config, plan: Plan, device: str, threads: int, room: int) -> StepCost:
    """`step_cost` in a process of its own; ValueError if the batch does not fit."""
    remedy = "lower data.batch_size (or data.global_batch_size), or start fewer ranks a host"
    what = f"a step of {plan.local_batch} images of {plan.image_size} × {plan.image_size} does not fit the memory"
    place = f"{_gigabytes(room)} free a worker" if device == "cpu" else device
    with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            return pool.submit(step_cost, config, plan, device, threads, room).result()
        except BrokenProcessPool:
            raise ValueError(f"{what} ({place}; its process was killed): {remedy}") from None
        except (MemoryError, RuntimeError) as error:
            # torch has a type for this on GPUs alone.
            known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
            if not known:
                raise
            raise ValueError(f"{what} ({place}): {remedy}") from None


def free_memory() -> int:
    """Bytes that processes may still take on this host, or in this container."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except OSError:  # the root of all groups, or another version of them
        return free


def lines(results: list[list[Result]]) -> list[Result]:
    """The results of all ranks, by rank, as few lines: equal ones are one; ranks are named where they differ."""
    checks = list(dict.fromkeys(result.check for of_rank in results for result in of_rank))
    merged = []
    for check in checks:
        found = [(rank, result) for rank, of_rank in enumerate(results) for result in of_rank if result.check == check]
        for result in dict.fromkeys(result for _, result in found):
            ranks = [rank for rank, other in found if other == result]
            named = "" if len(ranks) == len(found) else f"{_ranks(ranks)}: "
            merged.append(Result(check, result.ok, named + result.text))
    return merged


def show(result: Result, coloured: bool) -> str:
    """One line of the console."""
    word = "ok  " if result.ok else "FAIL"
    if coloured:
        word = f"\033[{32 if result.ok else 31}m{word}\033[0m"
    return f"{word}  {result.check:<15} {result.text}"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    coloured = sys.stdout.isatty()
    wrong = _before_connecting()
    if wrong is not None:
        print(show(wrong, coloured), flush=True)
        return 1
    try:
        world = connect()
    except Exception as error:  # whatever a Horovod that is not for this torch makes of its import
        reason = " ".join(str(error).split())
        text = f"this worker cannot join the others ({type(error).__name__}: {reason}): launch/setup.sh"
        print(show(Result("horovod", False, text), coloured), flush=True)
        return 1
    try:
        config, recipe = Config(), DEMO
        with world.together():
            given = [a for a in arguments if "=" not in a]
            if len(given) > 1:
                raise ValueError(f"give one recipe, then key=value settings, got {' '.join(given)}")
            recipe = Path(given[0]) if given else DEMO
            config = load_config(Config, recipe, [a for a in arguments if "=" in a])
    except world.ends as error:
        return report_and_leave(world, error)
    try:
        # Plain tuples: a class of __main__ would come back from each rank as another class.
        found = world.gather([(r.check, r.ok, r.text) for r in examine(config, recipe, world)])
        merged = lines([[Result(*result) for result in of_rank] for of_rank in found])
    except world.ends as error:
        text = f"rank {world.rank} lost the others in a collective ({' '.join(str(error).split())})"
        print(show(Result("workers", False, f"{text}: the first rank that ended says why"), coloured), flush=True)
        return 1
    failed = sum(not result.ok for result in merged)
    if world.rank == 0:
        for result in merged:
            print(show(result, coloured))
        ranks = f"{world.size} rank{'s' * (world.size > 1)}"
        print(f"{ranks}: {f'{failed} FAILED' if failed else 'all ok'}", flush=True)
    world.barrier()
    world.close()
    return 1 if failed else 0


def _before_connecting() -> Result | None:
    """What is wrong with this host's name: gloo aborts where it cannot bind to what the name resolves to.

    Where it can, but no other host could connect to it, that is said and no more: all workers may be on this machine.
    """
    if "HOROVOD_RANK" not in os.environ:
        return None
    rank, made = f"rank {os.environ['HOROVOD_RANK']}: ", list[Result]()
    own = attempt(made, "host name", listen)
    if own is None:
        return Result("host name", False, rank + made[0].text)
    own.server.close()
    if os.environ.get("HOROVOD_LOCAL_SIZE") != os.environ.get("HOROVOD_SIZE") and _is_loopback(own.address):
        hint = f"{rank}{own.host} calls itself {own.address}; if Horovod does not get on from here, that is why"
        print(hint, file=sys.stderr, flush=True)
    return None


def _check_hosts(results: list[Result], world: Solo) -> None:
    """Every host's own name, and one rank of each host connecting to all others."""
    made: list[Result] = []
    own = attempt(made, "host name", listen)
    offers = world.gather((socket.gethostname(), own and own.address, own and own.port))
    hosts = [host for host, _, _ in offers]
    if own is None:
        results += made
    else:
        attempt(results, "host name", judge_name, own.host, own.address, len(set(hosts)))
    if len(set(hosts)) > 1 and hosts.index(hosts[world.rank]) == world.rank:
        first = {offer[0]: offer for offer in reversed(offers)}
        others = [o for host, o in first.items() if host != hosts[world.rank] and o[1] and not _is_loopback(o[1])]
        attempt(results, "hosts", reach, others)
    world.barrier()
    if own is not None:
        own.server.close()


def _check_allreduce(results: list[Result], world: Solo) -> None:
    made: list[Result] = []
    buffers = attempt(made, "allreduce", payload, world.device)
    if not all(world.gather(buffers is not None)):
        results += [result for result in made if not result.ok]
        return
    seconds: list[float] = []
    for _ in range(_ROUNDS):
        taken = attempt(made, "allreduce", reduce_once, buffers, world)
        seconds += [] if taken is None else [taken]
    slowest = max(world.gather(statistics.median(seconds) if seconds else math.inf))
    rate = f"64 MB in {1e3 * slowest:.3g} ms, {_ALLREDUCE_BYTES / slowest / 1e9:.2f} GB/s (median of {_ROUNDS})"
    wrong = next((result for result in made if not result.ok), None)
    results.append(wrong or Result("allreduce", True, rate if world.size > 1 else "one process"))


def _check_step(results: list[Result], config: Config, plan: Plan | None, world: Solo) -> None:
    """All ranks at once, as in the job, each with its share of its host's memory."""
    made: list[Result] = []
    room = attempt(made, "memory", lambda: free_memory() // world.local_size) if world.device.type == "cpu" else 0
    cores = len(os.sched_getaffinity(0))
    threads = config.threads or max(1, cores // world.local_size)
    world.barrier()
    cost = None
    if plan is not None and room is not None:
        cost = attempt(made, "memory", try_step, config, plan, str(world.device), threads, room)
    costs = [c for c in world.gather(cost) if c is not None]
    results += [result for result in made if not result.ok]
    if cost is not None and plan is not None:
        peak, seconds = max(c.peak_bytes for c in costs), max(c.seconds for c in costs)
        least = min(c.room_bytes for c in costs)
        kind = "plain" if plan.sub_batch_size is None else "regularized"
        text = f"a first {kind} step of {plan.local_batch} images: {_gigabytes(peak)} of {_gigabytes(least)} free"
        results.append(Result("memory", True, f"{text} a worker, {seconds:.1f} s (most over the ranks)"))


def _ranks(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' * (len(ranks) > 1)} {text}"


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
