"""Makes the runs of a study: how long they take, one by one or several at a time, stopped together."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from queue import SimpleQueue

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from infomcr_dist import models
from infomcr_dist.checkpoint import write_atomically
from infomcr_dist.config import Config
from infomcr_dist.grid import StudyRun, StudySettings, measured, state_of, trained
from infomcr_dist.options import to_yaml
from infomcr_dist.run import EMBEDDED, plan_steps, select_splits, stored_size
from infomcr_dist.world import Solo
from pipelines import Dataset, open_dataset

STOPPED = 75
"""Exit code of a command that was stopped and goes on when repeated."""


# How long it takes


@dataclass(frozen=True)
class Work:
    """Of one run: its steps, and seconds of its training and measurement on this machine."""

    steps: int
    training: float
    measuring: float


def works(runs: list[StudyRun], settings: StudySettings) -> list[Work]:
    """What each run will take, from a few passes of its network; ValueError if its data set is not there."""
    return [_work(run, settings.workers) for run in runs]


def _work(run: StudyRun, workers: int) -> Work:
    config = run.config
    dataset = _dataset(config.data.path)
    splits = select_splits(config, dataset)
    order, _ = plan_steps(config, splits["train"], workers)
    size = config.data.image_size or stored_size(dataset)
    classes = len(dataset.classes)
    seconds = _pass_seconds(config.model, classes, size, config.threads or 1) / workers
    images = len(splits["train"])
    training = seconds * images * config.epochs * (1 + (_cost(config) - 1) * _regularized_share(config))
    evaluated = seconds / 3 * (images + len(splits["test"]))
    measuring = 0.0
    if run.measure is not None:
        of_gram = 2 * run.measure.trials * run.measure.samples
        # Robustness: two derivatives a step of its iteration, which has at most 20 and one a class.
        of_robustness = 2 * min(20, classes) * min(run.measure.images, images)
        measuring = _START_SECONDS + evaluated + seconds * (of_gram + of_robustness)
    return Work(order.steps * config.epochs, _START_SECONDS + training + evaluated, measuring)


_START_SECONDS = 6.0
"""Until a command has imported what it needs."""


def _cost(config: Config) -> float:
    """A regularized step in plain ones."""
    settings = config.regularizer
    if settings.way == "sampled":
        if settings.budget is not None:
            return settings.budget
        count = settings.sub_batches or (config.data.global_batch_size or 0) / (settings.sub_batch_size or 1) or 8
        return 1 + (settings.sampled or 0) / count
    return 2.0 if settings.way == "fused" else 3.0


def _regularized_share(config: Config) -> float:
    """Of the epochs; half, where only training will show when the rate drops."""
    settings, schedule = config.regularizer, config.schedule
    if settings.when == "from_epoch":
        return max(0.0, 1 - (settings.epoch or 0) / config.epochs)
    if settings.when == "after_drop":
        if schedule.kind == "milestones":
            return 1 - schedule.milestones[0] / config.epochs if schedule.milestones else 0.0
        return 0.0 if schedule.kind == "constant" else 0.5
    return 1.0 if settings.when == "always" else 0.0


@cache
def _dataset(path: str) -> Dataset:
    return open_dataset(EMBEDDED if path == "fashion-mnist" else path)


@cache
def _pass_seconds(model: str, classes: int, size: int, threads: int) -> float:
    """Seconds an image takes forward and backward: the best of three passes over 32 random ones."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        device = Solo().device
        network = models.build(model, classes, size).to(device)
        images, labels = torch.randn(32, 3, size, size, device=device), torch.arange(32, device=device) % classes
        times = []
        for _ in range(3):
            began = time.perf_counter()
            cross_entropy(network(images), labels).backward()
            if images.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times) / len(images)
    finally:
        torch.set_num_threads(before)


def in_words(seconds: float) -> str:
    """A duration, as a person would say it."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


# Making them


class Processes:
    """Commands that run at the same time, and are stopped together."""

    def __init__(self) -> None:
        self.stopping = False
        self._lock = threading.RLock()  # a signal may come while the main thread stops them
        self._running: set[subprocess.Popen[bytes]] = set()

    def call(self, command: list[str], log: Path, held: int, gpus: str | None) -> int:
        """Run a command, what it prints appended to ``log``; its exit code. It keeps the file ``held`` open, and sees
        the ``gpus`` alone.

        Its output is a pipe to here: a training whose reader was killed notices, saves and ends.
        """
        with self._lock:
            if self.stopping:
                return STOPPED
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(held,),
                env=None if gpus is None else os.environ | {"CUDA_VISIBLE_DEVICES": gpus},
            )
            self._running.add(process)
        assert process.stdout is not None
        with process, open(log, "ab", buffering=0) as file:
            for chunk in iter(lambda: os.read(process.stdout.fileno(), 1 << 16), b""):  # type: ignore[union-attr]
                file.write(chunk)
        with self._lock:
            self._running.discard(process)
        return process.returncode

    def stop(self) -> None:
        """Have every command end, and start none any more."""
        with self._lock:
            self.stopping = True
            for process in self._running:
                process.terminate()


def make(
    run: StudyRun, settings: StudySettings, processes: Processes, say: Callable[[str], None], gpus: str | None
) -> None:
    """Train and measure a run as far as it is not; where that fails, leave the reason in its directory."""
    run.directory.mkdir(parents=True, exist_ok=True)
    with _alone(run, processes, say) as held:
        if held is None:
            return
        (run.directory / "failure.txt").unlink(missing_ok=True)
        recipe = run.directory / "recipe.yaml"
        write_atomically(recipe, lambda file: file.write(to_yaml(run.config).encode()))
        if not trained(run):
            arguments = [sys.executable, "-m", "infomcr_dist.train", str(recipe)]
            _call(run, "train", arguments, settings, processes, held, gpus)
        if not measured(run) and trained(run):
            assert run.measure is not None
            given = [f"{name}={'null' if value is None else value}" for name, value in asdict(run.measure).items()]
            arguments = [sys.executable, "-m", "infomcr_dist.measure", str(run.directory), *given]
            _call(run, "measure", arguments, settings, processes, held, gpus)


def _call(
    run: StudyRun,
    kind: str,
    command: list[str],
    settings: StudySettings,
    processes: Processes,
    held: int,
    gpus: str | None,
) -> None:
    log = run.directory / f"{kind}.log"
    code = processes.call([*launcher(settings.workers), *command], log, held, gpus)
    if code not in (0, STOPPED) and not processes.stopping:
        reason = f"{kind} ended with {code}: {_last_words(log)}"
        write_atomically(run.directory / "failure.txt", lambda file: file.write(reason.encode()))


def launcher(workers: int) -> list[str]:
    """What starts a command on so many workers of this machine; ValueError where it is not there."""
    if workers == 1:
        return []
    place = shutil.which("horovodrun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if place is None:
        raise ValueError(f"workers={workers} needs horovodrun, which is not in the PATH: make setup builds it")
    return [place, "-np", str(workers)]


def _last_words(log: Path) -> str:
    """The last error that a log tells, or its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))]
    lines = [line for line in lines if line] or ["it printed nothing"]
    return next((line for line in reversed(lines) if "error:" in line.lower()), lines[-1])[:500]


@contextmanager
def _alone(run: StudyRun, processes: Processes, say: Callable[[str], None]) -> Iterator[int | None]:
    """Hold the run's lock; None if the study is stopped before.

    The commands inherit it: what a killed study has left behind holds it until it has ended.
    """
    descriptor, told = os.open(run.directory / "lock", os.O_RDWR | os.O_CREAT, 0o644), False
    try:
        while not processes.stopping:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    say(f"{run.name}: waiting for another study, or what one has left behind, to end it")
                told = True
                time.sleep(0.5)
            else:
                yield descriptor
                return
        yield None
    finally:
        os.close(descriptor)


def gpus_of(settings: StudySettings) -> list[str | None]:
    """What each of the runs at a time gets as CUDA_VISIBLE_DEVICES: as many GPUs as it has workers, dealt out in turn;
    None on a machine without."""
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0:
        return [None] * settings.parallel
    names = given.split(",") if given else [str(number) for number in range(count)]
    dealt = [names[number % count] for number in range(settings.parallel * settings.workers)]
    shares = [dealt[i : i + settings.workers] for i in range(0, len(dealt), settings.workers)]
    return [",".join(dict.fromkeys(share)) for share in shares]  # a name that comes twice ends CUDA's reading


def make_all(runs: list[StudyRun], estimates: list[Work], settings: StudySettings) -> bool:
    """Make what is not done, so many at a time, with a bar over all of the study; whether it was stopped."""
    processes = Processes()
    before = {number: signal.signal(number, lambda *_: processes.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    done = [state_of(run) == "done" for run in runs]
    seconds = [work.training + work.measuring for work in estimates]
    bar = tqdm(
        total=sum(seconds),
        initial=sum(s for s, d in zip(seconds, done, strict=True) if d),
        file=sys.stdout,
        ncols=120,
        smoothing=0,
        bar_format="{percentage:3.0f}%|{bar:20}|{postfix} [{elapsed}<{remaining}]",
    )

    free: SimpleQueue[str | None] = SimpleQueue()
    for gpus in gpus_of(settings):
        free.put(gpus)
    every = 1 if sys.stdout.isatty() else 30  # seconds

    def say(text: str) -> None:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def task(run: StudyRun) -> None:
        if processes.stopping:
            return
        state = state_of(run)
        say(f"{run.name}: {'goes on' if state in ('interrupted', 'trained') else 'begins'}")
        began = time.perf_counter()
        gpus = free.get()  # there are as many as there are tasks at a time
        try:
            make(run, settings, processes, say, gpus)
        finally:
            free.put(gpus)
        if not processes.stopping:
            state = state_of(run)
            say(f"{run.name}: {state}" + (f" in {in_words(time.perf_counter() - began)}" if state == "done" else ""))

    with ThreadPoolExecutor(settings.parallel) as pool:
        try:
            futures = {run.number: pool.submit(task, run) for run, d in zip(runs, done, strict=True) if not d}
            pending = set(futures.values())
            while pending:
                ended, pending = wait(pending, timeout=every, return_when=FIRST_COMPLETED)
                for future in ended:
                    future.result()
                progress = [
                    _seconds_done(run, work) if run.number in futures and not futures[run.number].done() else s
                    for run, s, work in zip(runs, seconds, estimates, strict=True)
                ]
                counts = f"{sum(p == s for p, s in zip(progress, seconds, strict=True))}/{len(runs)} runs"
                bar.set_postfix_str(counts, refresh=False)
                bar.n = sum(progress)
                bar.refresh()
        except BaseException:
            processes.stop()
            raise
        finally:
            bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    return processes.stopping


def _seconds_done(run: StudyRun, work: Work) -> float:
    """Of the estimate, by the last step that its records hold."""
    path = run.directory / "records.jsonl"
    if not path.exists():
        return 0.0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().split(b"\n")[1:-1]
    step = json.loads(lines[-1]).get("step", 0) if lines else 0
    return float(work.training * min(1.0, step / work.steps))
