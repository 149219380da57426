"""A training run under random faults, next to the same run left alone: what was lost, repeated, changed.

    python benchmarks/chaos.py
    python benchmarks/chaos.py engine=torch faults=60 seed=3

Three workers train a small network on a part of Fashion-MNIST: with Horovod those of an elastic run
(launch/elastic.sh, three names of this machine), with torch those of one torchrun, which starts them again. At random
steps, and at a random instant within them, a fault of `FAULTS` occurs. Whenever the whole job has ended it is started
again, as a cluster would do.

Each worker logs every step it takes, with the labels it takes and a hash of its weights before and after. So the steps
that are in the final weights are known, back to the first: each begins with the weights that the one before left.
Their labels are compared with those of the samples that the sampler gives to each worker. With torch the weights after
every step have to be, to the bit, those of the same run left alone. With Horovod, whose number of workers varies, the
training loss may differ as it does between undisturbed runs on three and on two workers.

Exit code 1 if a sample was lost or repeated, if weights are wrong, or if the loss is off by more than that allows. A
full disk needs root, for a small file system of its own; without, that fault is not tried.
"""

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from infomcr_dist import assess, checkpoint, train
from infomcr_dist.config import Config
from infomcr_dist.experiment import open_experiment
from infomcr_dist.records import (
    FILE,
    EpochRecord,
    EvaluationRecord,
    R,
    RestartRecord,
    StepRecord,
    last_step,
    read_records,
)
from infomcr_dist.state import weights_digest
from infomcr_dist.world import World
from pipelines import Sampler
from pipelines.options import load

ROOT = Path(__file__).parent.parent
NAMES = ["localhost", "127.0.0.1", os.uname().nodename]
GLOBAL_BATCH = 48
LOG, FOLDER, PAUSE = "INFOMCR_CHAOS_LOG", "INFOMCR_CHAOS_FOLDER", "INFOMCR_CHAOS_PAUSE"
NO_LINKS, STRIKE = "no-links", "strike"
"""Files in the chaos folder: while the first is there, workers can make no links; the second asks one for SIGTERM."""


@dataclass(frozen=True)
class Settings:
    """What is run."""

    engine: Literal["horovod", "torch"] = "horovod"
    faults: int = 50
    epochs: int = 44
    images: int = 1200
    seed: int = 0
    folder: str | None = None
    """Where the runs are kept; null: a temporary directory"""


# The worker.


def worker(arguments: list[str]) -> int:
    """The trainer; each worker logs what it does, and some faults strike in it."""
    folder = Path(os.environ[FOLDER])
    trainer: Any = train
    assessment: Any = assess
    step, symlink, evaluate = trainer.train_step, os.symlink, assessment.evaluate

    def logged(model: torch.nn.Module, criterion: Any, optimizer: Any, world: World, batch: Any, **more: Any) -> Any:
        line: dict[str, Any] = {
            "step": int(world.location.removeprefix("step ")),
            "rank": world.rank,
            "size": world.size,
        }
        line["before"] = weights_digest(model, buffers=False)
        write(line | {"labels": batch[1].tolist()})
        time.sleep(float(os.environ.get(PAUSE, "0")))
        result = step(model, criterion, optimizer, world, batch, **more)
        write(line | {"after": weights_digest(model, buffers=False)})
        return result

    def write(line: dict[str, Any]) -> None:
        with open(os.environ[LOG], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")  # one write: lines of several workers do not mix

    def refused(*paths: Any, **more: Any) -> None:
        if (folder / NO_LINKS).exists():
            raise PermissionError(1, "this file system has no links")
        symlink(*paths, **more)

    def struck(*values: Any, **more: Any) -> Any:
        with contextlib.suppress(FileNotFoundError):
            (folder / STRIKE).unlink()
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*values, **more)

    trainer.train_step, os.symlink, assessment.evaluate = logged, refused, struck
    if (host := os.environ.get("HOROVOD_HOSTNAME")) in NAMES:  # three hosts that are one machine need three ports
        name, _, port = arguments[-1].partition("=")
        assert name == "telemetry.port"
        if port != "null":
            arguments = [*arguments[:-1], f"{name}={int(port) + NAMES.index(host)}"]
    return train.main(arguments)


# The job.


class Job:
    """The job, started again when it has ended too early."""

    def __init__(self, settings: Settings, folder: Path, arguments: list[str]) -> None:
        self._folder, self._hosts, self._full = folder, folder / "hosts", folder / "disk"
        self.has_disk = make_disk(self._full)
        self.run = (self._full if self.has_disk else folder) / "chaos"
        self.starts = 0
        self.port = free_ports(len(NAMES))
        self._read = threading.Event()
        self._read.set()
        self._console, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
        self._writer = writer
        threading.Thread(target=self._copy_console, daemon=True).start()
        self.set_hosts(NAMES)
        script = folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {self._hosts}\n")
        script.chmod(0o755)
        launcher = [str(Path(sys.executable).with_name("torchrun")), *torchrun(3), "--max-restarts", "2"]
        if settings.engine == "horovod":
            launcher = [
                str(ROOT / "launch" / "elastic.sh"), "--min-np", "1", "--max-np", "3", "--network-interface", "lo",
                "--blacklist-cooldown-range", "1", "4", "--host-discovery-script", str(script),
            ]  # fmt: skip
        else:
            launcher.append("--no-python")
        self._command = [
            *launcher, sys.executable, __file__, "worker", *arguments, f"run_dir={self.run}", "resume=auto",
            "hang_timeout_seconds=6", f"telemetry.port={self.port}",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.process = subprocess.Popen(
            self._command, stdout=self._writer, stderr=self._writer, start_new_session=True,
            env=environment(self._folder, self._folder / "chaos.jsonl") | {PAUSE: "0.2"},
        )  # fmt: skip

    def close(self) -> None:
        """End all of it."""
        self._read.set()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._kill_workers()

    def _kill_workers(self) -> None:
        for process in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def set_hosts(self, names: list[str]) -> None:
        beside = self._hosts.with_suffix(".new")
        beside.write_text("".join(f"{name}:1\n" for name in names))
        beside.replace(self._hosts)

    def workers(self) -> list[int]:
        """Process ids of the trainers."""
        found = []
        for process in (int(p) for p in os.listdir("/proc") if p.isdigit()):
            try:
                words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if words[:3] == [sys.executable, __file__, "worker"] and f"run_dir={self.run}" in words:
                found.append(process)
        return found

    # The faults. Each returns when it is over.

    def kill(self, chance: random.Random) -> None:
        self._signal(signal.SIGKILL, chance)

    def terminate(self, chance: random.Random) -> None:
        self._signal(signal.SIGTERM, chance)

    def freeze(self, chance: random.Random) -> None:
        self._signal(signal.SIGSTOP, chance)

    def _signal(self, number: int, chance: random.Random) -> None:
        for process in chance.sample(self.workers(), k=1):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def remove_host(self, chance: random.Random) -> None:
        gone = chance.choice(NAMES)
        self.set_hosts([name for name in NAMES if name != gone])
        time.sleep(5)
        self.set_hosts(NAMES)

    def kill_launcher(self, _: random.Random) -> None:
        self.process.kill()
        self.process.wait()
        end = time.monotonic() + 90
        while self.workers() and time.monotonic() < end:  # they notice, save and exit
            time.sleep(0.2)
        self._kill_workers()

    def cut_checkpoint(self, chance: random.Random) -> None:
        self.kill_launcher(chance)
        newest = checkpoint.newest_first(self.run / "checkpoints")
        if len(newest) > 1:
            os.truncate(newest[0], newest[0].stat().st_size // 2)

    def tear_records(self, chance: random.Random) -> None:
        """As a host that loses its power may leave them: a line begun, blanks, zeros."""
        self.kill_launcher(chance)
        with (self.run / FILE).open("ab") as file:
            file.write(chance.choice([b'{"kind": "step", "st', b"\n \n", b"\0" * 512, b"\0\n{}\nnone\n\xff\n"]))

    def block_console(self, _: random.Random) -> None:
        """Nobody reads the launcher's output, and its pipe is full."""
        self._read.clear()
        os.set_blocking(self._writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self._writer, b"." * 64)
        os.set_blocking(self._writer, True)
        time.sleep(4)
        self._read.set()

    def _copy_console(self) -> None:
        with (self._folder / "chaos.log").open("ab", buffering=0) as log:
            while text := os.read(self._console, 4096):
                log.write(text)
                self._read.wait()

    def fill_disk(self, _: random.Random) -> None:
        filler = self._full / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size):
                        pass
        time.sleep(3)
        filler.unlink(missing_ok=True)

    def scrape_half(self, _: random.Random) -> None:
        """Hundreds of requests to every worker that begin and never end."""
        connections = [socket.socket() for _ in range(250 * len(NAMES))]
        for number, connection in enumerate(connections):
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", self.port + number % len(NAMES)))
        for _second in range(3):
            time.sleep(1)
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.send(b"GET /metrics HTTP/1.1\r\nHost: ")
        for connection in connections:
            connection.close()

    def refuse_links(self, _: random.Random) -> None:
        """At least over the end of an epoch, where the best checkpoint gets its link."""
        (self._folder / NO_LINKS).touch()
        self._wait_for(lambda before: len(records(self.run, EpochRecord)) > before, len(records(self.run, EpochRecord)))
        time.sleep(1)
        (self._folder / NO_LINKS).unlink()

    def terminate_in_evaluation(self, _: random.Random) -> None:
        strike = self._folder / STRIKE
        strike.touch()
        self._wait_for(lambda _: not strike.exists(), 0)
        strike.unlink(missing_ok=True)

    def _wait_for(self, condition: Callable[[int], bool], before: int) -> None:
        end = time.monotonic() + 60
        while not condition(before) and time.monotonic() < end and self.process.poll() is None:
            time.sleep(0.1)


class Fault(NamedTuple):
    """A kind of fault, and how often it occurs relative to others."""

    strike: Callable[[Job, random.Random], None]
    weight: int


FAULTS = {
    "SIGKILL": Fault(Job.kill, 5),
    "SIGTERM": Fault(Job.terminate, 4),
    "SIGTERM in evaluation": Fault(Job.terminate_in_evaluation, 5),
    "SIGSTOP": Fault(Job.freeze, 3),
    "host leaves and returns": Fault(Job.remove_host, 4),
    "launcher killed": Fault(Job.kill_launcher, 3),
    "checkpoint cut, launcher killed": Fault(Job.cut_checkpoint, 3),
    "records torn, launcher killed": Fault(Job.tear_records, 4),
    "console blocked": Fault(Job.block_console, 5),
    "disk full": Fault(Job.fill_disk, 5),
    "half-open scrapes": Fault(Job.scrape_half, 4),
    "links refused": Fault(Job.refuse_links, 4),
}


def torchrun(workers: int) -> list[str]:
    return ["--standalone", "--nproc-per-node", str(workers)]


def environment(folder: Path, log: Path) -> dict[str, str]:
    """That of a launcher whose workers log there."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    more = {LOG: str(log), FOLDER: str(folder), "PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    return os.environ | more


def make_disk(path: Path) -> bool:
    """A small file system, which can be filled; whether it could be made."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def free_ports(count: int = 1) -> int:
    """The first of so many free ports in a row.

    They lie below the ports that Linux gives to connections, so none of those takes one first. They are drawn at
    random, because other processes may look at the same time.
    """
    while True:
        first = random.SystemRandom().randrange(10_000, 32_768 - count)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("", port)))
            return first


def train_alone(engine: str, workers: int, folder: Path, arguments: list[str]) -> None:
    """The same run on so many workers, undisturbed."""
    launcher = ["horovodrun", "-np", str(workers)]
    if engine == "torch":
        launcher = ["torchrun", *torchrun(workers), "--no-python"]
    launcher[0] = str(Path(sys.executable).with_name(launcher[0]))
    name = f"alone-{workers}"
    command = [*launcher, sys.executable, __file__, "worker", *arguments, f"run_dir={folder / name}"]
    with (folder / f"{name}.log").open("wb") as log:
        variables = environment(folder, folder / f"{name}.jsonl")
        subprocess.run([*command, "telemetry.port=null"], env=variables, check=True, stdout=log, stderr=log)


# The tally.


def records(run: Path, kind: type[R]) -> list[R]:
    """A run's records of one kind; none where there is no file yet."""
    if not (run / FILE).exists():
        return []
    found = read_records(run / FILE, (kind,), report=lambda _: None)
    return [record for record in found if isinstance(record, kind)]


class Step(NamedTuple):
    """A step that workers took together, as far as each has logged it."""

    number: int
    size: int
    before: str
    labels: dict[int, list[int]]
    """By rank"""
    after: str = ""


def steps_of(log: Path, final: str) -> tuple[list[Step], int]:
    """The steps that led to the final weights, first to last, and how many were taken besides.

    A missing step ends the list early.
    """
    labels: dict[tuple[int, int, str], dict[int, list[int]]] = {}
    ends: dict[tuple[int, str], list[tuple[int, int, str]]] = {}
    times = Counter[tuple[int, int]]()
    for line in map(json.loads, log.read_text().splitlines()):
        key = (line["step"], line["size"], line["before"])
        if "labels" in line:
            labels.setdefault(key, {})[line["rank"]] = line["labels"]
        else:
            ends.setdefault((line["step"], line["after"]), []).append(key)
            times[line["step"], line["rank"]] += 1
    last = max((step for step, _ in times), default=0)
    lineage: list[Step] = []
    for number in range(last, 0, -1):
        found = [Step(*key, labels[key], final) for key in ends.get((number, final), [])]
        if not found:
            break
        lineage.append(max(found, key=lambda step: len(step.labels) / step.size))
        final = lineage[-1].before
    taken = sum(max(times[step, rank] for rank in range(3)) for step in range(1, last + 1))
    return lineage[::-1], taken - len(lineage)


def count(steps: list[Step], sampler: Sampler, truth: np.ndarray[Any, Any], epochs: int) -> tuple[int, int]:
    """Samples lost and repeated in these steps, of so many epochs; one taken with another's label is lost."""
    taken = np.zeros((epochs, sampler.samples), int)
    for step in steps:
        epoch, batch = divmod(step.number - 1, sampler.steps)
        for rank, labels in step.labels.items():
            samples = sampler.local_batch(epoch, batch, rank, step.size).samples
            if len(labels) == len(samples):
                right = truth[samples] == np.asarray(labels, int)
                np.add.at(taken[epoch], samples[right], 1)
    return int((taken == 0).sum()), int((taken > 1).sum())


def final_weights(run: Path) -> str:
    """The hash of the newest checkpoint's weights."""
    path, state = checkpoint.load_newest(run, print)
    config = load(Config, run / "config.yaml", ["resume=null"])
    model = open_experiment(config, 1).build_model()
    checkpoint.restore_weights(model, state, path)
    return weights_digest(model, buffers=False)


def main(settings: Settings) -> int:
    """Run everything and print the table."""
    chance = random.Random(settings.seed)
    folder = Path(settings.folder or tempfile.mkdtemp(prefix="chaos-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        "demo", "model=chaos:network", f"epochs={settings.epochs}", "metric.trials=0", "threads=1",
        f"schedule.milestones=[{settings.epochs // 2}]", f"data.train_images={settings.images}",
        "data.batch_size=null", f"data.global_batch_size={GLOBAL_BATCH}", "data.backend=torch",
        "evaluation.every_epochs=2", "checkpoint.every_epochs=2", "checkpoint.keep=3", "checkpoint.every_steps=7",
        f"engine={settings.engine}",
    ]  # fmt: skip
    os.chdir(ROOT)
    alone = [3] if settings.engine == "torch" else [3, 2]
    for workers in alone:
        train_alone(settings.engine, workers, folder, arguments)
    config = load(Config, folder / "alone-3" / "config.yaml", [])
    experiment = open_experiment(config, 3)
    truth = np.asarray(experiment.splits["train"].labels)
    sampler = experiment.sampler
    total = sampler.steps * settings.epochs
    began, tally = time.monotonic(), Counter[str]()
    with running(settings, folder, arguments) as job:
        left_out = {"disk full"} - ({"disk full"} if job.has_disk else set())
        left_out |= {"host leaves and returns"} if settings.engine == "torch" else set()
        kinds = {kind: fault for kind, fault in FAULTS.items() if kind not in left_out}
        weights = [fault.weight for fault in kinds.values()]
        drawn = [*kinds, *chance.choices(list(kinds), weights, k=max(0, settings.faults - len(kinds)))]  # each once
        drawn = chance.sample(drawn[: settings.faults], k=min(settings.faults, len(drawn)))
        for kind in drawn:
            wait(job, last_step(job.run / FILE) + chance.randint(1, 6))
            time.sleep(chance.uniform(0, 0.5))
            while not job.workers():
                if job.process.poll() is not None:
                    job.start()
                time.sleep(0.2)
            step = last_step(job.run / FILE)
            if step > 0.95 * total:
                print(f"only {sum(tally.values())} faults had room in {total} steps: give more epochs")
                break
            print(f"{time.monotonic() - began:5.0f} s, step {step}: {kind}", flush=True)
            kinds[kind].strike(job, chance)
            tally[kind] += 1
        wait(job, total)
        while job.process.wait(120):  # a fault may have met the last epoch's end
            job.start()
        seconds = time.monotonic() - began
        return report(settings, folder, job, sampler, truth, tally, seconds)


@contextlib.contextmanager
def running(settings: Settings, folder: Path, arguments: list[str]) -> Iterator[Job]:
    """The job; at the end nothing of it is left but its files."""
    job = Job(settings, folder, arguments)
    try:
        yield job
    finally:
        job.close()
        if job.has_disk:
            subprocess.run(["umount", "--lazy", str(folder / "disk")], check=False)


def wait(job: Job, step: int) -> None:
    """Wait until the run has done a step; a job that has ended is started again."""
    end = time.monotonic() + 300
    while last_step(job.run / FILE) < step:
        if job.process.poll() is not None:
            job.start()
        if time.monotonic() > end:
            raise RuntimeError(f"no step {step} within 300 s; see chaos.log")
        time.sleep(0.1)


def report(
    settings: Settings, folder: Path, job: Job, sampler: Sampler, truth: np.ndarray[Any, Any], tally: Counter[str],
    seconds: float,
) -> int:  # fmt: skip
    """Print what the run went through and how it compares; returns the exit code."""
    total = sampler.steps * settings.epochs
    steps, others = steps_of(folder / "chaos.jsonl", final_weights(job.run))
    undisturbed, _ = steps_of(folder / "alone-3.jsonl", final_weights(folder / "alone-3"))
    lost, repeated = count(steps, sampler, truth, settings.epochs)
    if settings.engine == "torch":
        wrong = total - sum(a.after == b.after for a, b in zip(steps, undisturbed, strict=False))
    else:
        wrong = total - len(steps) + (not steps or steps[0].before != undisturbed[0].before)
    recorded = [record.step for record in records(job.run, StepRecord)]
    restarts = len(records(job.run, RestartRecord))
    print(
        f"\n{sum(tally.values())} faults in {seconds:.0f} s on {settings.engine}: {job.starts} starts of the job",
        end="",
    )
    print(f", {restarts} elastic restarts, {others} steps taken again" if restarts else f", {others} steps taken again")
    print("\n| fault | times |\n|---|---|")
    for kind in FAULTS:
        print(f"| {kind} | {tally[kind] or 'not tried'} |")
    loss, error, runs = {}, {}, {"chaos": job.run, "alone-3": folder / "alone-3", "alone-2": folder / "alone-2"}
    for name in [name for name, run in runs.items() if run.exists()]:
        loss[name] = {r.epoch: r.training_loss for r in records(runs[name], EpochRecord)}
        evaluations = records(runs[name], EvaluationRecord)
        error[name] = [record.top1_error_ratio for record in evaluations if record.split == "test"][-1]

    def off(name: str) -> float:
        return max(abs(value - loss["alone-3"][epoch]) for epoch, value in loss[name].items())

    noise = off("alone-2") if "alone-2" in loss else 0.0
    print(f"\n| {settings.epochs} epochs | {' | '.join(loss)} |\n|---|{'---|' * len(loss)}")
    print("| final training loss |", " | ".join(f"{loss[n][settings.epochs]:.4f}" for n in loss), "|")
    print("| final test error |", " | ".join(f"{error[n]:.2%}" for n in loss), "|")
    print("| largest difference of a training loss |", " | ".join(f"{off(n):.4f}" for n in loss), "|")
    ordered = recorded == sorted(set(recorded))
    print(f"\nrecords of steps: {len(recorded)} of {total}, each once and in order: {ordered}")
    print(f"samples lost {lost}, repeated {repeated}, wrong weights {wrong}")
    complete = len(recorded) == total or tally["disk full"] > 0
    return int(lost + repeated + wrong > 0 or not ordered or not complete or off("chaos") > 3 * noise + 0.01)


def network(classes: int, image_size: int) -> torch.nn.Sequential:
    """Small, so that the faults take the time and not the training; with BatchNorm, whose buffers travel too."""
    del image_size
    layers: list[torch.nn.Module] = []
    for channels, wider in ((3, 8), (8, 16), (16, 32)):
        layers += [
            torch.nn.Conv2d(channels, wider, 3, stride=2, padding=1),
            torch.nn.BatchNorm2d(wider),
            torch.nn.ReLU(),
        ]
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, classes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        sys.exit(worker(sys.argv[2:]))
    try:
        sys.exit(main(load(Settings, None, sys.argv[1:])))
    except ValueError as problem:
        sys.exit(f"chaos: {problem}")
