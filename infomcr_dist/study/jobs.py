"""Makes the runs of a study: trains and measures them, one by one or several at a time, stopped together."""

from __future__ import annotations

import fcntl
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
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue

import torch
from tqdm import tqdm

from infomcr_dist import records
from infomcr_dist.checkpoint import make_directory, write_atomically
from infomcr_dist.config import Config
from infomcr_dist.experiment import open_experiment
from infomcr_dist.study.grid import FAILURE, StudyRun, measured, state_of, trained
from infomcr_dist.study.settings import StudySettings
from pipelines.command import termination_signals
from pipelines.options import to_yaml

STOPPED = 75
"""Exit code of a command that was stopped and resumes when repeated."""


def count_steps(runs: list[StudyRun], workers: int) -> list[int]:
    """The steps of each run's training.

    Args:
        runs: the runs.
        workers: per run.

    Raises:
        ValueError: a run's data set is missing, or its settings do not fit it, or there is no such network.
    """
    known: dict[Config, int] = {}
    for run in runs:
        config = _without_seed(run.config)
        if config not in known:
            experiment = open_experiment(config, workers)
            experiment.build_model()
            known[config] = experiment.sampler.steps * config.epochs
    return [known[_without_seed(run.config)] for run in runs]


def _without_seed(config: Config) -> Config:
    """Equal for all runs of a cell."""
    return replace(config, seed=0, run_dir=".")


class Processes:
    """Commands that run at the same time, and are stopped together."""

    def __init__(self) -> None:
        self.stopping = False
        self._lock = threading.RLock()  # a signal may come while the main thread stops them
        self._running: set[subprocess.Popen[bytes]] = set()

    def call(self, command: list[str], log: Path, held: int, gpus: str | None) -> int:
        """Run a command to its end.

        Its output is a pipe to this process: a training whose reader was killed notices, saves and ends.

        Args:
            command: program and arguments.
            log: file that its output is appended to.
            held: descriptor of a file that it keeps open.
            gpus: what it gets as CUDA_VISIBLE_DEVICES; None: what this process has.

        Returns:
            Its exit code; `STOPPED` if the commands were stopped before it began.
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
        """Terminate every command, and start none any more."""
        with self._lock:
            self.stopping = True
            for process in self._running:
                process.terminate()


def make(
    run: StudyRun, settings: StudySettings, processes: Processes, message: Callable[[str], None], gpus: str | None
) -> None:
    """Train and measure a run as far as it is not; where that fails, leave the reason in its directory.

    Args:
        run: the run.
        settings: of the study.
        processes: starts the commands.
        message: prints a line.
        gpus: as `Processes.call` takes them.
    """
    make_directory(run.directory, "output")
    with _locked(run, processes, message) as held:
        if held is None:
            return
        (run.directory / FAILURE).unlink(missing_ok=True)
        recipe = run.directory / "recipe.yaml"
        write_atomically(recipe, lambda file: file.write(to_yaml(run.config).encode()))
        start = [*launcher(settings.workers), sys.executable, "-m"]
        if not trained(run):
            _call(run, "train", [*start, "infomcr_dist.train", str(recipe)], processes, held, gpus)
        if not measured(run) and trained(run):
            assert run.measure is not None
            given = [f"{name}={'null' if value is None else value}" for name, value in asdict(run.measure).items()]
            _call(run, "measure", [*start, "infomcr_dist.measure", str(run.directory), *given], processes, held, gpus)


def _call(run: StudyRun, kind: str, command: list[str], processes: Processes, held: int, gpus: str | None) -> None:
    log = run.directory / f"{kind}.log"
    code = processes.call(command, log, held, gpus)
    if code not in (0, STOPPED) and not processes.stopping:
        reason = f"{kind} ended with {code}: {_last_error(log)}"
        write_atomically(run.directory / FAILURE, lambda file: file.write(reason.encode()))


def launcher(workers: int) -> list[str]:
    """The beginning of a command that runs on so many workers of this machine.

    Raises:
        ValueError: a launcher is needed and none is installed.
    """
    if workers == 1:
        return []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    options = {"horovodrun": ["-np"], "torchrun": ["--standalone", "--no-python", "--nproc-per-node"]}
    for name, words in options.items():
        place = shutil.which(name, path=path)
        if place is not None:
            return [place, *words, str(workers)]
    raise ValueError(f"workers={workers} needs horovodrun or torchrun in the PATH: make setup installs both")


def _last_error(log: Path) -> str:
    """The last error in a log, ours before a launcher's, or its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(encoding="utf-8", errors="replace"))]
    lines = [line for line in lines if line] or ["it printed nothing"]
    for pattern in (r"(^|>:)error: ", r"(?i)error:", ""):
        found = [line for line in lines if re.search(pattern, line)]
        if found:
            break
    return found[-1][:500]


@contextmanager
def _locked(run: StudyRun, processes: Processes, message: Callable[[str], None]) -> Iterator[int | None]:
    """Hold the run's lock; yields its descriptor, or None if the study is stopped before it has the lock."""
    # flock and not the package filelock: the commands inherit this descriptor, and with it the lock, so that what a
    # killed study leaves running holds the lock until it has ended. filelock keeps its descriptor to itself.
    descriptor, reported = os.open(run.directory / "lock", os.O_RDWR | os.O_CREAT, 0o644), False
    try:
        while not processes.stopping:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not reported:
                    message(f"{run.name}: waiting for another study, or what a killed one left running, to finish it")
                reported = True
                time.sleep(0.5)
            else:
                yield descriptor
                return
        yield None
    finally:
        os.close(descriptor)


def gpus_of(settings: StudySettings) -> list[str | None]:
    """What each of the runs at a time gets as CUDA_VISIBLE_DEVICES.

    As many GPUs as the run has workers, dealt out in turn; None on a machine without.
    """
    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if count == 0:
        return [None] * settings.parallel
    names = given.split(",") if given else [str(number) for number in range(count)]
    dealt = [names[number % count] for number in range(settings.parallel * settings.workers)]
    shares = [dealt[i : i + settings.workers] for i in range(0, len(dealt), settings.workers)]
    return [",".join(dict.fromkeys(share)) for share in shares]  # a name that comes twice ends CUDA's reading


class RunCounter:
    """A bar that counts a study's runs, and the steps of those that are to be made.

    Args:
        runs: all runs of the study.
        left: those to be made, and their steps.
    """

    def __init__(self, runs: int, left: list[tuple[StudyRun, int]]) -> None:
        self._left, self._finished, self._failed = left, set[int](), 0
        self._steps = sum(steps for _, steps in left)
        self._bar = tqdm(
            total=runs,
            initial=runs - len(left),
            file=sys.stdout,
            ncols=120,
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} runs{postfix} [{elapsed}]",
        )

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def finish(self, run: StudyRun, failed: bool) -> None:
        """Count a run that was made, or failed."""
        self._finished.add(run.number)
        self._failed += failed
        self._bar.n += 1

    def show(self) -> None:
        """Draw the bar, with the steps that the runs' records have by now."""
        done = sum(
            steps if run.number in self._finished else min(steps, records.last_step(run.directory / records.FILE))
            for run, steps in self._left
        )
        failed = f", {self._failed} of them failed" if self._failed else ""
        self._bar.set_postfix_str(f"{failed}, step {done}/{self._steps}"[2:], refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()


def make_all(runs: list[StudyRun], settings: StudySettings) -> bool:
    """Make the runs that are not done, ``settings.parallel`` at a time, under a bar that counts them.

    Args:
        runs: of one study.
        settings: of the study.

    Returns:
        Whether it was stopped by a signal.

    Raises:
        ValueError: what `count_steps` finds wrong.
    """
    left = [run for run in runs if state_of(run) != "done"]
    steps = count_steps(left, settings.workers)
    processes = Processes()
    before = {n: signal.signal(n, lambda *_: processes.stop()) for n in (signal.SIGINT, *termination_signals())}
    progress = RunCounter(len(runs), list(zip(left, steps, strict=True)))
    free: SimpleQueue[str | None] = SimpleQueue()
    for gpus in gpus_of(settings):
        free.put(gpus)
    interval_seconds = 1 if sys.stdout.isatty() else 30

    def task(run: StudyRun) -> bool:
        """Make one run; returns whether it failed."""
        if processes.stopping:
            return False
        progress.message(f"{run.name}: {'resumes' if state_of(run) in ('interrupted', 'trained') else 'begins'}")
        began = time.perf_counter()
        gpus = free.get()  # there are as many as there are tasks at a time
        try:
            make(run, settings, processes, progress.message, gpus)
        finally:
            free.put(gpus)
        if processes.stopping:
            return False
        state = state_of(run)
        took = f" in {duration_text(time.perf_counter() - began)}" if state == "done" else ""
        progress.message(f"{run.name}: {state}{took}")
        return state != "done"

    with ThreadPoolExecutor(settings.parallel) as pool:
        try:
            futures = {pool.submit(task, run): run for run in left}
            pending = set(futures)
            while pending:
                ended, pending = wait(pending, timeout=interval_seconds, return_when=FIRST_COMPLETED)
                for future in ended:
                    failed = future.result()
                    if not processes.stopping:
                        progress.finish(futures[future], failed)
                progress.show()
        except BaseException:
            processes.stop()
            raise
        finally:
            progress.close()
            for number, handler in before.items():
                signal.signal(number, handler)
    return processes.stopping


def duration_text(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"
