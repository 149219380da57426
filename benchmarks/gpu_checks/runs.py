"""Runs of the trainer: repeated, resumed, on a rank of an engine, stopped, hanging; the demo; and the loaders."""

import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gpu_checks import Context, Row, interpreter, synchronize
from gpu_checks.data import cifar, fashion_mnist, photographs
from infomcr_dist import checkpoint
from infomcr_dist.config import Config
from infomcr_dist.models import build
from infomcr_dist.records import FILE, StepRecord, of_kind, read_records
from pipelines import LoaderConfig, Sampler, open_dataset, open_loader
from pipelines.cores import available_cores
from pipelines.loaders import Backend

TRAIN = interpreter("infomcr_dist", "train")
SETTINGS = (
    "telemetry.port=null",
    "metric.trials=0",
    "evaluation.every_epochs=0",
    "schedule.kind=constant",
    "schedule.milestones=[]",
    "schedule.warmup_epochs=0",
    "data.batch_size=128",
)
"""For runs that show something else than how well they train."""
DETERMINISTIC = tuple(f"{field.name}=true" for field in fields(Config) if field.name == "deterministic")
HANG_SECONDS = 5
_HANG_AT = "GPU_CHECKS_HANG_AT"


class Job:
    """A command that runs, with its output in a file."""

    def __init__(self, command: list[str], directory: Path, environment: Mapping[str, str] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.log, self._began = directory, directory / "log", time.perf_counter()
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=directory, stdout=file, stderr=subprocess.STDOUT, env=os.environ | dict(environment or {})
            )

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code; None if it has none after so long. The process that runs longer stays."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def finish(self) -> float:
        """Seconds until it has ended; RuntimeError with its last line if that was in failure."""
        if self.process.wait():
            raise RuntimeError(f"exit code {self.process.returncode}: {self.last_line()}")
        return time.perf_counter() - self._began

    def text(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        """The last one that is not empty."""
        return next((text for text in reversed(self.text().splitlines()) if text.strip()), "no output")

    def wait_for_steps(self) -> None:
        """Until it has logged steps."""
        records = self.directory / "run" / FILE
        while self.process.poll() is None and not (records.exists() and b'"step"' in records.read_bytes()):
            time.sleep(0.05)
        if self.process.poll() is not None:
            raise RuntimeError(f"exit code {self.process.returncode} before a step: {self.last_line()}")


def small(context: Context) -> list[str]:
    """Settings of runs on a small data set; no images are read while it trains."""
    data = cifar(context, 40 if context.tiny else 2560, 20 if context.tiny else 640)
    sizes = ["data.batch_size=16", "regularizer.sub_batch_size=8"] if context.tiny else []
    return [f"data.path={data}", "data.backend=synthetic", "run_dir=run", *SETTINGS, *sizes]


def bitwise(context: Context) -> Iterator[Row]:
    """A run repeated, and stopped and resumed, against the same run; they run side by side."""
    settings = [*small(context), *DETERMINISTIC, "regularizer.when=from_epoch", "regularizer.epoch=1"]
    precisions = ["bf16"] if context.tiny else ["fp32", "bf16"]
    runs: dict[str, Job] = {}
    for precision in precisions:
        for name, epochs in (("first", 3), ("second", 3), ("resumed", 2)):
            arguments = [*TRAIN, *settings, f"precision={precision}", f"epochs={epochs}"]
            runs[f"{precision} {name}"] = Job(arguments, context.work / "bitwise" / f"{precision}-{name}")
    for job in runs.values():
        job.finish()
    for precision in precisions:
        again = [*TRAIN, *settings, f"precision={precision}", "epochs=3", "resume=auto"]
        runs[f"{precision} resumed"] = Job(again, runs[f"{precision} resumed"].directory)
    for precision in precisions:
        runs[f"{precision} resumed"].finish()
        first, *others = (_state(runs[f"{precision} {name}"]) for name in ("first", "second", "resumed"))
        mode = "deterministic mode" if DETERMINISTIC else "there is no deterministic mode yet"
        for name, other in zip(("run twice", "resumed"), others, strict=True):
            different = sum(int((first[key] != value).sum()) for key, value in other.items())
            count = sum(value.numel() for value in other.values())
            largest = max(float((first[key] - value).abs().max()) for key, value in other.items())
            text = f"{different} of {count} values differ, by {largest:.1e} at most; {mode}"
            yield Row(f"{precision}, {name}", text, "bitwise equal", not different, {"different": different})


def _state(job: Job) -> dict[str, Tensor]:
    """Weights, buffers and momentum of a run's last checkpoint, in float64."""
    state = checkpoint.load_newest(job.directory / "run", print)[1]
    tensors: dict[str, Any] = dict(state["model"])
    for number, entry in state["optimizer"]["state"].items():
        tensors |= {f"{number}.{name}": value for name, value in entry.items() if isinstance(value, Tensor)}
    return {name: tensor.double() for name, tensor in tensors.items()}


def epoch(context: Context) -> Iterator[Row]:
    """ResNet-20 on 50 000 images: seconds of an epoch, by backend."""
    data = cifar(context, 40 if context.tiny else 50_000, 20 if context.tiny else 10_000)
    for backend in ("resident", "torch"):
        if backend not in get_args(Backend):
            yield Row(f"backend {backend}", "not there")
            continue
        arguments = [f"data.path={data}", f"data.backend={backend}", "run_dir=run", *SETTINGS, "precision=bf16"]
        arguments += ["data.augmentation=crop4_flip", "epochs=4", "regularizer.when=from_epoch", "regularizer.epoch=2"]
        arguments += [f"data.threads={max(1, available_cores() - 2)}"]
        if context.tiny:
            arguments += ["data.batch_size=16", "regularizer.sub_batch_size=8", "data.threads=1"]
        job = Job([*TRAIN, *arguments], context.work / f"epoch-{backend}")
        took = job.finish()
        steps = of_kind(list(read_records(job.directory / "run" / FILE)), StepRecord)
        for name, number in (("plain", 2), ("regularized", 4)):
            timed = [step for step in steps if step.epoch == number]
            seconds = sum(step.step_duration_seconds for step in timed)
            waits = sum(step.data_wait_seconds for step in timed) / seconds
            text = (
                f"{seconds:.2f} s an epoch, {200 * seconds / 60:.1f} minutes 200 of them, {waits:.0%} waiting for data"
            )
            wanted = name == "plain" and backend == "resident" and not context.tiny
            goal, met = ("200 epochs ≤ 2 minutes", 200 * seconds <= 120) if wanted else ("", None)
            yield Row(f"backend {backend}, bf16, {name}", text, goal, met, {"seconds": seconds})
        yield Row(f"backend {backend}, the run of 4 epochs", f"{took:.1f} s with its start and evaluations")


def torchrun(context: Context) -> Iterator[Row]:
    """One rank of the torch engine; on a GPU with NCCL."""
    launcher = interpreter("torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    command = [*launcher, "-m", "infomcr_dist", "train", *small(context), "regularizer.when=always", "epochs=2"]
    job = Job(command, context.work / "torchrun")
    took = job.finish()
    steps = of_kind(list(read_records(job.directory / "run" / FILE)), StepRecord)
    median = statistics.median(1000 * step.step_duration_seconds for step in steps if step.epoch == 2)
    yield Row("torch engine, one rank", f"trained in {took:.1f} s, {median:.1f} ms a regularized step", "trains", True)


def stopped(context: Context) -> Iterator[Row]:
    """A process that gets SIGSTOP is reported and killed."""
    command = [*TRAIN, *small(context), "epochs=100000", f"hang_timeout_seconds={HANG_SECONDS}"]
    job = Job(command, context.work / "stopped")
    job.wait_for_steps()
    job.process.send_signal(signal.SIGSTOP)
    yield reported("a process stopped by SIGSTOP", job)


def hang(context: Context) -> Iterator[Row]:
    """A kernel that never ends is reported, and its process killed."""
    trigger = context.work / "hang-now"
    command = [*TRAIN, *small(context), "epochs=100000", f"hang_timeout_seconds={HANG_SECONDS}"]
    job = Job([*command, "model=gpu_checks.runs:hanging"], context.work / "hang", {_HANG_AT: str(trigger)})
    job.wait_for_steps()
    trigger.touch()
    yield reported("a kernel that hangs", job)


def reported(what: str, job: Job) -> Row:
    """Whether the hang of a job is reported, and ends it."""
    began = time.perf_counter()
    code = job.wait(4 * HANG_SECONDS)
    took = time.perf_counter() - began
    goal = f"reported and killed, with hang_timeout_seconds={HANG_SECONDS}"
    if code is None:
        job.process.kill()
        job.process.wait()
        return Row(what, f"not reported within {took:.0f} s", goal, False)
    lines = [text.strip() for text in job.text().splitlines() if "hung" in text or "hang" in text]
    return Row(
        what, f"after {took:.1f} s, exit code {code}: {lines[-1] if lines else job.last_line()}", goal, bool(lines)
    )


class _Hanging(nn.Module):
    """ResNet-20, whose forward pass launches a kernel of 20 s once a file exists. It draws random numbers, and is not
    recorded therefore: a graph would not look for the file."""

    def __init__(self, classes: int, image_size: int) -> None:
        super().__init__()
        self.network = build("resnet20", classes, image_size)

    def forward(self, images: Tensor) -> Tensor:
        torch.rand(())
        if images.is_cuda and Path(os.environ[_HANG_AT]).exists():
            torch.cuda._sleep(40_000_000_000)
        output: Tensor = self.network(images)
        return output


def hanging(classes: int, image_size: int) -> nn.Module:
    """The network of the check `hang`."""
    return _Hanging(classes, image_size)


def loaders(context: Context) -> Iterator[Row]:
    """Images a second of every backend, on the device; torch and DALI on all cores."""
    sources = {"32×32": cifar(context, 40 if context.tiny else 50_000, 20 if context.tiny else 10_000)}
    sources["JPEGs of 128×128"] = photographs(context, 40 if context.tiny else 6000, 128)
    for name, path in sources.items():
        dataset = open_dataset(path)
        split = dataset.splits["train"]
        for backend in get_args(Backend):
            config = LoaderConfig(
                backend=backend,
                augmentation="crop4_flip" if name == "32×32" else "random_resized_crop",
                size=32 if name == "32×32" else 112,
                mean=dataset.mean,
                std=dataset.std,
                batch_size=16 if context.tiny else 128,
                device=torch.device(context.device),
                threads=max(1, available_cores() - 1),
            )
            label = f"{backend}, {name}"
            try:
                yield Row(label, *_images_per_second(split, config, context))
            except (ValueError, RuntimeError, ImportError) as error:
                yield Row(label, f"{type(error).__name__}: {error}")


def _images_per_second(split: Any, config: LoaderConfig, context: Context) -> tuple[str]:
    """Over what comes within three seconds, and an epoch at most, after eight batches."""
    loader = open_loader(split, config)
    sampler = Sampler(len(split), config.batch_size, 0, shard_sizes=split.shard_sizes)
    count, began = 0, time.perf_counter()
    first = began
    for number, (_, images, _) in enumerate(loader.batches(sampler.local_batches(0, 0, 1))):
        if number == 0:
            synchronize(context.device)
            first = time.perf_counter()
        if number == 8 or (context.tiny and number == 0):
            synchronize(context.device)
            count, began = 0, time.perf_counter()
            continue
        count += len(images)
        if time.perf_counter() - began > 3 and number > 8:
            break
    synchronize(context.device)
    rate, waited = count / (time.perf_counter() - began), first
    loader.close()
    return (f"{rate:,.0f} images/s".replace(",", " "),) if waited else ("",)


def recipe(context: Context) -> Iterator[Row]:
    """The demo of `make train`, on one process with the batch of its two."""
    folder = fashion_mnist(context, 128 if context.tiny else 60_000, 40 if context.tiny else 10_000)
    backend = "torch"
    arguments = [f"data.backend={backend}", "telemetry.port=null", "run_dir=run", "data.batch_size=128"]
    arguments += [f"data.threads={max(1, available_cores() - 2)}"]
    if context.tiny:
        arguments += ["metric.trials=1", "metric.samples=4", "metric.images=8", "model=resnet20", "data.threads=1"]
    job = Job([*TRAIN, *arguments], folder)
    took = job.finish()
    steps = of_kind(list(read_records(folder / "run" / FILE)), StepRecord)
    training = sum(step.step_duration_seconds for step in steps)
    yield Row("the demo's recipe", f"{took:.1f} s, {training:.1f} s of them steps", figures={"seconds": took})
