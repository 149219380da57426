"""A study: a grid of ordinary training runs, a measurement of each, one table, one figure.

    python -m infomcr_dist.study STUDY.yaml [key=value …]
    python -m infomcr_dist.study STUDY.yaml scaled=true parallel=2 plan=true

The grid is what varies × seeds. Runs what is missing, goes on with what was interrupted, marks what failed and goes on
with the rest; then writes into the output directory table.md (means ± standard deviations, and the statistics),
table.csv, runs.csv, figure.png and figure.svg. ``plan=true`` prints the runs and how long they will take, and runs
none. ``run=K`` makes the K-th of them alone, so that the tasks of a cluster's job array make one each; the last of them
writes the table. Exit code 0: all runs are there; 1: some failed; 75: stopped, repeat to go on; 2: a mistake in the
study, named in one line.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from matplotlib import rc_context
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from infomcr_dist import checkpoint, models, results
from infomcr_dist.checkpoint import write_atomically
from infomcr_dist.config import Config, MeasureSettings
from infomcr_dist.options import from_dict, layered, load_config, read_recipe, to_dict, to_yaml
from infomcr_dist.results import COLUMNS, METRICS, Results
from infomcr_dist.run import EMBEDDED, plan_steps, select_splits, stored_size
from infomcr_dist.world import Solo
from pipelines import Dataset, open_dataset

_LABEL = re.compile(r"[\w+.,-]+")
_DEFAULTS: dict[str, Any] = {
    "evaluation": {"every_epochs": 0},
    "metric": {"trials": 0},  # measured once, at the end
    "checkpoint": {"keep": 1},
    "telemetry": {"port": None},  # runs at the same time would want the same one
}
"""What a study's runs have in place of the defaults of a run."""
_MAY_DIFFER = ("run_dir", "resume", "threads", "data.threads", "data.prefetch", "output")
"""Settings that may differ between what is there and what the study asks for: numbers change by rounding at most."""
_MEASURED = (*METRICS, "trace", "penalty_share")
"""Columns that come from a measurement; the others are in a run's records."""
_STOPPED = 75


@dataclass(frozen=True)
class StudySettings:
    """A study file, then key=value. Its section ``scaled`` holds what ``scaled=true`` changes: settings as here, and
    axes of the grid that stand for those of the same name."""

    title: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    """Settings of every run, as in a recipe."""
    grid: dict[str, Any] = field(default_factory=dict)
    """What varies: axis → label → settings; every combination of labels is a cell."""
    seeds: int = 5
    """Runs a cell."""
    paired: bool = True
    """Whether the runs of all cells have the same seeds, 0, 1 …; otherwise each has its own: fresh draws for each."""
    measure: dict[str, Any] | None = field(default_factory=dict)
    """Settings of infomcr_dist.measure for every trained run; null: none is measured."""
    columns: tuple[str, ...] = ("test_error", "train_error", "train_loss", *METRICS, "penalty_share")
    """Of the table, out of results.COLUMNS; bars are drawn of the first three."""
    figure: Literal["metrics", "bars"] = "bars"
    """metrics: as Figures 2-4, and Kendall's τ of each metric with the test error."""
    compare: str | None = None
    """Axis whose labels are compared with its first one, seed by seed; needs paired seeds."""
    choose: str | None = None
    """Axis of which the label with the lowest error is named; needs base.data.holdout_images."""
    output: str | None = None
    """Directory; null: studies/NAME, or studies/NAME-scaled."""
    runs: str | None = None
    """Directory of the runs, which studies with the same axes may share; null: OUTPUT/runs."""
    scaled: bool = False
    """Take the sizes of the file's section ``scaled``."""
    parallel: int = 1
    """Runs at a time, on a machine with GPUs each on GPUs of its own, as far as there are enough."""
    workers: int = 1
    """Workers a run, under horovodrun on this machine; 1: without it."""
    plan: bool = False
    """Print the runs and the estimate of their time; run none."""
    run: int | None = None
    """Make this run alone, by its number in the plan, and the table if it was the last that was missing."""

    def __post_init__(self) -> None:
        for name in ("seeds", "parallel", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.grid:
            raise ValueError("grid must have an axis, got none: axis → label → settings")
        for axis, labels in self.grid.items():
            if not isinstance(labels, dict) or not labels:
                raise ValueError(f"grid.{axis} must map labels to settings, got {labels!r}")
            for label, settings in labels.items():
                if not isinstance(label, str) or not _LABEL.fullmatch(label):
                    raise ValueError(
                        f"grid.{axis}: a label is a text of letters, digits and any of + . , - _, got {label!r}: "
                        "give it another, in quotes if it is a number"
                    )
                if not isinstance(settings, dict):
                    raise ValueError(f"grid.{axis}.{label} must be a section of settings, got {settings!r}")
        for name in ("seed", "run_dir", "resume"):
            if name in self.base:
                raise ValueError(f"base.{name} is the study's to give each run, got {self.base[name]}: leave it out")
        for name in ("compare", "choose"):
            axis = getattr(self, name)
            if axis is not None and axis not in self.grid:
                raise ValueError(f"{name} must be an axis of the grid ({', '.join(self.grid)}), got {axis}")
        if self.compare is not None and not self.paired:
            raise ValueError(f"compare={self.compare} needs the same seeds in all cells, got paired=false")
        for column in self.columns:
            if column not in COLUMNS:
                raise ValueError(f"columns must be out of {', '.join(COLUMNS)}, got {column}")
            if self.measure is None and column in _MEASURED:
                raise ValueError(f"columns: {column} is measured, got measure=null")
        needed = ("test_error", *METRICS) if self.figure == "metrics" else ("test_error",) if self.choose else ()
        if missing := [name for name in needed if name not in self.columns]:
            raise ValueError(f"columns must hold {', '.join(missing)} for figure={self.figure}, choose={self.choose}")


@dataclass(frozen=True)
class StudyRun:
    """One run of the grid."""

    number: int
    cell: tuple[str, ...]
    """a label an axis"""
    config: Config
    directory: Path
    measure: MeasureSettings | None

    @property
    def name(self) -> str:
        return self.directory.name


def load_study(path: Path, overrides: list[str]) -> StudySettings:
    """The study of a file, scaled or not, then ``key=value``; ValueError for a mistake in it."""
    file, given = read_recipe(path), layered([], overrides)
    section = file.pop("scaled", None)
    if given.get("scaled") is True:
        if not isinstance(section, dict):
            raise ValueError(f"scaled=true: {path} has no section 'scaled'")
        grid = section.pop("grid", {})
        file = layered([file, section], [])
        file["grid"] = file.get("grid", {}) | grid
    settings = from_dict(StudySettings, layered([file], overrides))
    if settings.output is None:
        name = path.stem + ("-scaled" if settings.scaled else "")
        settings = replace(settings, output=str(Path("studies") / name))
    return settings


def expand(settings: StudySettings) -> list[StudyRun]:
    """The runs of a study, cell by cell, seed by seed; ValueError names the cell whose settings are wrong."""
    runs: list[StudyRun] = []
    threads = max(1, len(os.sched_getaffinity(0)) // (settings.parallel * settings.workers))
    for cell in product(*settings.grid.values()):
        chosen = [settings.grid[axis][label] for axis, label in zip(settings.grid, cell, strict=True)]
        try:
            layers = [_DEFAULTS, {"threads": threads}, settings.base, *chosen]
            config = from_dict(Config, layered(layers, ["run_dir=.", "resume=auto"]))
            measure = None
            if settings.measure is not None:
                network = config.model if ":" in config.model else None
                measure = from_dict(MeasureSettings, {"model": network, "threads": config.threads, **settings.measure})
        except ValueError as error:
            raise ValueError(f"cell {', '.join(cell)}: {error}") from error
        if settings.choose is not None and not config.data.holdout_images:
            raise ValueError(
                f"choose={settings.choose} would choose on the test images, got data.holdout_images=0 "
                f"in cell {', '.join(cell)}: give a number in base"
            )
        for number in range(settings.seeds):
            name = f"{'_'.join(cell)}_seed-{number}"
            directory = Path(settings.runs or Path(settings.output or "") / "runs") / name
            # A million seeds: train multiplies a seed by as much and by the step, within 64 bits.
            seed = number if settings.paired else zlib.crc32(name.encode()) % 1_000_000
            own = replace(config, seed=seed, run_dir=str(directory))
            measured = None if measure is None else replace(measure, output=str(directory / "measure"))
            runs.append(StudyRun(len(runs), cell, own, directory, measured))
    return runs


# What is there of a run


def state_of(run: StudyRun) -> str:
    """missing, interrupted, trained (and to be measured), done, or failed: with the reason."""
    if trained(run):
        return "done" if measured(run) else _failure(run) or "trained"
    if failure := _failure(run):
        return failure
    return "interrupted" if (run.directory / "records.jsonl").exists() else "missing"


def trained(run: StudyRun) -> bool:
    """Whether its last epoch has ended, and was saved."""
    saved = checkpoint.newest_first(run.directory / "checkpoints")
    ends = [r["step"] for r in _events(run) if r["kind"] == "epoch" and r["epochs_completed"] == run.config.epochs]
    return bool(saved and ends) and saved[0].name.startswith(f"step-{ends[-1]:08d}-")


def measured(run: StudyRun) -> bool:
    """Whether it is measured as the study asks for, or need not be."""
    if run.measure is None:
        return True
    measurement = _measurement(run)
    wanted = asdict(run.measure)
    return measurement is not None and all(
        measurement["settings"].get(name) == value for name, value in wanted.items() if name not in _MAY_DIFFER
    )


def check_settings(run: StudyRun) -> None:
    """ValueError if the run that is there was made with other settings."""
    path = run.directory / "config.yaml"
    if not path.exists():
        return
    there, wanted = _flat(to_dict(load_config(Config, path, []))), _flat(to_dict(run.config))
    different = [
        f"{name}={value} (there: {there.get(name)})"
        for name, value in wanted.items()
        if there.get(name) != value and name not in _MAY_DIFFER
    ]
    if different:
        raise ValueError(
            f"output: {run.directory} was made with other settings than the study's {', '.join(different)}: "
            "give another output=DIRECTORY, or remove the run"
        )


def values_of(run: StudyRun) -> dict[str, float]:
    """The numbers of a run that is done, by column; NaN for what it has not."""
    last = {r["split"]: r for r in _events(run) if r["kind"] == "evaluation"}
    values = {}
    for split in ("test", "train"):
        values[f"{split}_error"] = last[split]["top1_error_ratio"]
        values[f"{split}_top5_error"] = last[split]["top5_error_ratio"]
        values[f"{split}_loss"] = last[split]["loss"]
    values["gap"] = values["test_error"] - values["train_error"]
    values["top5_gap"] = values["test_top5_error"] - values["train_top5_error"]
    end = next((r for r in _events(run) if r["kind"] == "end"), {})
    plain, regularized = (end.get(f"{phase}_step_seconds") for phase in ("plain", "regularized"))
    values["plain_step"], values["regularized_step"] = plain, regularized
    values["step_ratio"] = regularized / plain if plain and regularized else None
    measurement = _measurement(run) if run.measure is not None else None
    if measurement is not None:
        row = measurement["checkpoints"][0]
        for name in ("gamma_hat", "frobenius", "spectral_radius", "trace"):
            values[name] = row["curvature"][name]["mean"]
        values["robustness"] = row["robustness"]["mean"]
        values["penalty_share"] = row["penalty"] and row["penalty"]["mean"]
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _events(run: StudyRun) -> list[dict[str, Any]]:
    """Records of a run, without those of its steps."""
    path = run.directory / "records.jsonl"
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n") and not line.startswith('{"kind": "step"')]


def _measurement(run: StudyRun) -> dict[str, Any] | None:
    path = run.directory / "measure.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _failure(run: StudyRun) -> str | None:
    path = run.directory / "failure.txt"
    return f"failed: {path.read_text(encoding='utf-8')}" if path.exists() else None


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


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
                return _STOPPED
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
    code = processes.call([*_launcher(settings.workers), *command], log, held, gpus)
    if code not in (0, _STOPPED) and not processes.stopping:
        reason = f"{kind} ended with {code}: {_last_words(log)}"
        write_atomically(run.directory / "failure.txt", lambda file: file.write(reason.encode()))


def _launcher(workers: int) -> list[str]:
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
            say(f"{run.name}: {state}" + (f" in {_time(time.perf_counter() - began)}" if state == "done" else ""))

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


# What it shows


def collect(runs: list[StudyRun], settings: StudySettings) -> Results:
    """The numbers of the runs that are done."""
    axes = {axis: list(labels) for axis, labels in settings.grid.items()}
    values = np.full((len(runs), len(settings.columns)), np.nan)
    for run in runs:
        if state_of(run) == "done":
            found = values_of(run)
            values[run.number] = [found.get(name, math.nan) for name in settings.columns]
    return Results(axes, list(settings.columns), values.reshape(-1, settings.seeds, len(settings.columns)))


def report(runs: list[StudyRun], settings: StudySettings, command: str) -> str:
    """Write table.md, table.csv, runs.csv and the figure; returns the text of table.md."""
    found = collect(runs, settings)
    test = "validation" if all(run.config.data.holdout_images for run in runs) else "test"
    states = [state_of(run) for run in runs]
    parts = [f"# {settings.title}" if settings.title else "", f"`{command}`", results.markdown(found, test)]
    parts.append(f"mean ± standard deviation; {settings.seeds} seeds a cell")
    if settings.compare is not None:
        parts.append(results.differences(found, settings.compare, test))
    if settings.choose is not None:
        parts.append(results.choice(found, settings.choose, test))
    if settings.figure == "metrics":
        parts.append(results.correlations(found, test))
    missing = [f"- {run.name}: {state}" for run, state in zip(runs, states, strict=True) if state != "done"]
    if missing:
        parts.append("Not in the table:\n\n" + "\n".join(missing))
    text = "\n\n".join(part for part in parts if part) + "\n"
    n = settings.seeds
    seeds = [[run.config.seed for run in runs[i : i + n]] for i in range(0, len(runs), n)]
    table = results.runs_csv(found, seeds, [states[i : i + n] for i in range(0, len(runs), n)])
    output = Path(settings.output or "")
    output.mkdir(parents=True, exist_ok=True)  # where the runs are another study's, nothing has made it yet
    for name, content in (("table.md", text), ("table.csv", results.to_csv(found)), ("runs.csv", table)):
        _write(output / name, content)
    if np.isfinite(found.values).any():
        if settings.figure == "metrics":
            figure = results.draw_metrics(found, settings.title, test)
        else:
            figure = results.draw_bars(found, settings.columns[:3], settings.title, test)
        with rc_context({"svg.hashsalt": "infomcr_dist"}):  # the same runs, the same file
            write_atomically(
                output / "figure.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None})
            )
        write_atomically(output / "figure.png", lambda file: figure.savefig(file, format="png", dpi=120))
    return text


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def plan_text(runs: list[StudyRun], settings: StudySettings, path: Path, arguments: list[str]) -> str:
    """The runs, what is there of each, and how long the rest will take."""
    states = [state_of(run) for run in runs]
    lines = [f"{run.number:4}  {run.name}  {state}" for run, state in zip(runs, states, strict=True)]
    axes = " × ".join(f"{len(labels)} {axis}" for axis, labels in settings.grid.items())
    left = [run for run, state in zip(runs, states, strict=True) if state != "done"]
    lines.append(
        f"{len(runs)} runs ({axes} × {settings.seeds} seeds), {len(left)} of them to make, in {settings.output}"
    )
    try:
        seconds = sum(work.training + work.measuring for work in works(left, settings)) / settings.parallel
        lines.append(f"about {_time(seconds)} on this machine, {settings.parallel} at a time")
    except ValueError as error:
        lines.append(f"no estimate of the time: {error}")
    given = shlex.join([str(path), *(a for a in arguments if not a.startswith("plan="))])
    study, last = f"python -m infomcr_dist.study {given}", len(runs) - 1
    lines.append(f"as a Slurm array: sbatch --array=0-{last} --wrap='{study} run=$SLURM_ARRAY_TASK_ID'")
    lines.append(f"as a Kubernetes Job: k8s/study, with completions: {len(runs)} and these arguments")
    lines.append("the last run of such an array writes the table; with runs that failed, repeat without run=")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    try:
        paths = [Path(a) for a in arguments if "=" not in a]
        if len(paths) != 1:
            raise ValueError("give one study: python -m infomcr_dist.study STUDY.yaml [key=value …]")
        settings = load_study(paths[0], [a for a in arguments if "=" in a])
        runs = expand(settings)
        for run in runs:
            check_settings(run)
        if settings.plan:
            print(plan_text(runs, settings, paths[0], [a for a in arguments if "=" in a]))
            return 0
        selected = runs
        if settings.run is not None:
            if not 0 <= settings.run < len(runs):
                raise ValueError(f"run must be from 0 to {len(runs) - 1}, got {settings.run}: plan=true lists them")
            selected = [runs[settings.run]]
        _launcher(settings.workers)
        began = time.perf_counter()
        left = [run for run in selected if state_of(run) != "done"]
        stopped = bool(left) and make_all(selected, works(selected, settings), settings)
        if settings.run is None or all(state_of(run) == "done" for run in runs):
            command = "python -m infomcr_dist.study " + shlex.join(a for a in arguments if not a.startswith("run="))
            print("\n" + report(runs, settings, command))
            print(f"written: table.md, table.csv, runs.csv, figure.png, figure.svg in {settings.output}")
        took = f"{len(left)} runs in {_time(time.perf_counter() - began)}"
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if stopped:
        print("stopped: repeat the command to go on", file=sys.stderr)
        return _STOPPED
    print(took)
    return 1 if any(state_of(run) != "done" for run in selected) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
