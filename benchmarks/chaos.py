"""A training run under random faults, next to the same run left alone: what was lost, repeated, changed.

    python benchmarks/chaos.py
    python benchmarks/chaos.py faults=60 seed=3

Three workers of an elastic run (launch/elastic.sh, three names of this machine) train ResNet-20 on a part of
Fashion-MNIST. At random steps, and at a random instant within them, one of these faults occurs: a worker gets SIGKILL,
SIGTERM or SIGSTOP; a host leaves and returns; the launcher is killed, or killed with the newest checkpoint cut in half.
Whenever the whole job has ended it is started again, as a cluster would do. At the end the samples of every step that
is in the final weights, which each worker logged after the step, are compared with the sampler's, and the loss with
that of undisturbed runs on three and on two workers; the difference between these two is the noise.
Exit code 1 if a sample was lost or repeated, or if the training loss is off by more than the noise allows.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infomcr_dist import checkpoint, train
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
from infomcr_dist.run import Run
from pipelines import Sampler
from pipelines.options import load

ROOT = Path(__file__).parent.parent
NAMES = ["localhost", "127.0.0.1", os.uname().nodename]
KINDS = (
    "SIGKILL",
    "SIGTERM",
    "SIGSTOP",
    "host leaves and returns",
    "launcher killed",
    "checkpoint cut, launcher killed",
)
WEIGHTS = (8, 6, 4, 6, 4, 2)
LOG = "INFOMCR_CHAOS_LOG"


@dataclass(frozen=True)
class Settings:
    """What is run."""

    faults: int = 30
    epochs: int = 12
    images: int = 2400
    seed: int = 0
    folder: str | None = None
    """Where the runs are kept; null: a temporary directory"""


def worker(arguments: list[str]) -> int:
    """The trainer; each worker logs the samples of a step after it."""
    commit = Run.commit

    def commit_and_log(self: Run) -> checkpoint.State:
        step, sampler = self.state.step, self.experiment.sampler
        if step > 0:
            rank, size = self.world.rank, self.world.size
            samples = sampler.local_batch((step - 1) // sampler.steps, (step - 1) % sampler.steps, rank, size).samples
            line = {"step": step, "rank": rank, "size": size, "samples": samples.tolist()}
            with open(os.environ[LOG], "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")  # one write: lines of several workers do not mix
        return commit(self)

    Run.commit = commit_and_log  # type: ignore[method-assign]
    return train.main(arguments)


class Job:
    """The elastic job, started again when it has ended too early."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self.run, self._folder, self._arguments = folder / "chaos", folder, arguments
        self._hosts = folder / "hosts"
        self.starts = 0
        self.set_hosts(NAMES)
        script = folder / "discover.sh"
        script.write_text(f"#!/bin/sh\ncat {self._hosts}\n")
        script.chmod(0o755)
        self._command = [
            str(ROOT / "launch" / "elastic.sh"), "--min-np", "1", "--max-np", "3", "--network-interface", "lo",
            "--blacklist-cooldown-range", "1", "4", "--host-discovery-script", str(script),
            sys.executable, __file__, "worker", *arguments, f"run_dir={self.run}", "resume=auto",
            "hang_timeout_seconds=6",
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self.starts += 1
        environment = os.environ | {LOG: str(self._folder / "taken.jsonl"), "PYTHONPATH": str(ROOT)}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with open(self._folder / "chaos.log", "ab") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def set_hosts(self, names: list[str]) -> None:
        beside = self._hosts.with_suffix(".new")
        beside.write_text("".join(f"{name}:1\n" for name in names))
        beside.replace(self._hosts)

    def workers(self) -> list[int]:
        """Process ids of the trainers."""
        found = []
        for process in (p for p in os.listdir("/proc") if p.isdigit()):
            try:
                words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if words[0] == sys.executable and f"run_dir={self.run}" in words and "-c" not in words:
                found.append(int(process))
        return [
            p for p in found if p != self.process.pid and "horovodrun" not in Path(f"/proc/{p}/cmdline").read_text()
        ]

    def strike(self, kind: str, chance: random.Random) -> None:
        """Cause one kind of fault."""
        if kind.startswith("SIG"):
            for process in chance.sample(self.workers(), k=1):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, getattr(signal, kind))
        elif kind.startswith("host"):
            gone = chance.choice(NAMES)
            self.set_hosts([name for name in NAMES if name != gone])
            time.sleep(6)
            self.set_hosts(NAMES)
        else:
            self.process.kill()
            self.process.wait()
            end = time.monotonic() + 90
            while self.workers() and time.monotonic() < end:  # they notice, save and exit
                time.sleep(0.2)
            newest = checkpoint.newest_first(self.run / "checkpoints")
            if kind.startswith("checkpoint") and len(newest) > 1:
                os.truncate(newest[0], newest[0].stat().st_size // 2)


def records(run: Path, kind: type[R]) -> list[R]:
    """A run's records of one kind."""
    return [record for record in read_records(run / FILE, (kind,)) if isinstance(record, kind)]


def train_alone(workers: int, run: Path, arguments: list[str]) -> None:
    """The same run on so many workers, undisturbed."""
    launcher = Path(sys.executable).with_name("horovodrun")
    command = [str(launcher), "-np", str(workers), sys.executable, "-m", "infomcr_dist.train", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, f"run_dir={run}"], env=environment, check=True, stdout=subprocess.DEVNULL)


def count_samples(run: Path, log: Path, sampler: Sampler) -> tuple[int, int, int]:
    """Samples lost and repeated in the final weights, and steps that were repeated after a worker was lost."""
    taken: dict[tuple[int, int], list[dict[int, list[int]]]] = {}
    for line in map(json.loads, log.read_text().splitlines()):
        worlds = taken.setdefault((line["step"], line["size"]), [])
        for world in worlds:
            if line["rank"] not in world:
                world[line["rank"]] = line["samples"]
                break
        else:
            worlds.append({line["rank"]: line["samples"]})
    steps = records(run, StepRecord)
    counts = np.zeros((len({record.epoch for record in steps}), sampler.samples), int)
    for record in steps:
        world = taken.get((record.step, record.world_size), [{}])[-1]
        for samples in world.values():
            np.add.at(counts[record.epoch - 1], samples, 1)
    again = sum(len(worlds) for worlds in taken.values()) - len(steps)
    return int((counts == 0).sum()), int((counts > 1).sum()), again


def main(settings: Settings) -> int:
    """Run everything and print the table."""
    chance = random.Random(settings.seed)
    folder = Path(settings.folder or tempfile.mkdtemp(prefix="chaos-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [
        "demo", f"epochs={settings.epochs}", "metric.trials=0", "telemetry.port=null",
        f"schedule.milestones=[{settings.epochs // 2}]", f"data.train_images={settings.images}", "threads=1",
        "data.batch_size=null", "data.global_batch_size=96", "checkpoint.keep=3", "checkpoint.every_steps=7",
    ]  # fmt: skip
    os.chdir(ROOT)
    train_alone(3, folder / "alone-3", arguments)
    train_alone(2, folder / "alone-2", arguments)
    sampler = Sampler(settings.images, 96, seed=0, unit=16)
    total = sampler.steps * settings.epochs
    began, tally = time.monotonic(), Counter[str]()
    job = Job(folder, arguments)
    try:
        for at in sorted(chance.sample(range(total // 30, total * 9 // 10), settings.faults)):
            wait(job, at)
            time.sleep(chance.uniform(0, 0.5))
            kind = chance.choices(KINDS, WEIGHTS)[0]
            while not job.workers():
                if job.process.poll() is not None:
                    job.start()
                time.sleep(0.2)
            job.strike(kind, chance)
            tally[kind] += 1
            print(f"{time.monotonic() - began:5.0f} s, step {at}: {kind}", flush=True)
        wait(job, total)
        job.process.wait(60)
    finally:
        if job.process.poll() is None:
            job.process.kill()
    return report(settings, folder, job, sampler, tally, time.monotonic() - began)


def wait(job: Job, step: int) -> None:
    """Wait until the run has done a step; a job that has ended is started again."""
    end = time.monotonic() + 600
    while last_step(job.run / FILE) < step:
        if job.process.poll() is not None:
            job.start()
        if time.monotonic() > end:
            raise RuntimeError(f"no step {step} within 600 s; see chaos.log")
        time.sleep(0.1)


def report(settings: Settings, folder: Path, job: Job, sampler: Sampler, tally: Counter[str], seconds: float) -> int:
    """Print what the run went through and how it compares; returns the exit code."""
    lost, repeated, again = count_samples(job.run, folder / "taken.jsonl", sampler)
    restarts = len(records(job.run, RestartRecord))
    print(f"\n{settings.faults} faults in {seconds:.0f} s, {job.starts} starts of the job, {restarts} elastic restarts")
    print("\n| fault | times |\n|---|---|")
    for kind in KINDS:
        print(f"| {kind} | {tally[kind]} |")
    loss, error = {}, {}
    for name in ("chaos", "alone-3", "alone-2"):
        loss[name] = np.array([record.training_loss for record in records(folder / name, EpochRecord)])
        evaluations = records(folder / name, EvaluationRecord)
        error[name] = [record.top1_error_ratio for record in evaluations if record.split == "test"][-1]
    noise = np.abs(loss["alone-2"] - loss["alone-3"])
    off = np.abs(loss["chaos"] - loss["alone-3"])
    print("\n| | under faults | 3 workers, undisturbed | 2 workers, undisturbed |\n|---|---|---|---|")
    print("| final training loss |", " | ".join(f"{loss[n][-1]:.4f}" for n in loss), "|")
    print("| final test error |", " | ".join(f"{error[n]:.2%}" for n in error), "|")
    print(f"\nsamples lost: {lost}, repeated: {repeated}; steps repeated after a loss: {again}")
    print(
        f"largest difference of an epoch's training loss from 3 workers: {off.max():.4f} (2 workers: {noise.max():.4f})"
    )
    steps = [record.step for record in records(job.run, StepRecord)]
    complete = steps == list(range(1, sampler.steps * settings.epochs + 1))
    print(f"every step once in the records: {complete}")
    return int(lost > 0 or repeated > 0 or not complete or off.max() > 3 * noise.max() + 0.01)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        sys.exit(worker(sys.argv[2:]))
    try:
        sys.exit(main(load(Settings, None, sys.argv[1:])))
    except ValueError as problem:
        sys.exit(f"chaos: {problem}")
