"""The runs of a study, and what is there of each: its state, its settings, its numbers."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from infomcr_dist import checkpoint, records
from infomcr_dist.config import Config, MeasureSettings
from infomcr_dist.experiment import compute_threads
from infomcr_dist.records import EndRecord, EpochRecord, EvaluationRecord, R, read_records
from infomcr_dist.study.settings import StudySettings
from pipelines.options import flat, from_dict, layered, load, to_dict

_DEFAULTS: dict[str, Any] = {
    "evaluation": {"every_epochs": 0},
    "metric": {"trials": 0},  # measured once, at the end
    "checkpoint": {"keep": 1},
    "telemetry": {"port": None},  # runs at the same time would want the same one
}
"""What a study's runs have in place of the defaults of a run."""
_MAY_DIFFER = ("run_dir", "resume", "threads", "data.threads", "data.prefetch", "output")
"""Settings that may differ between what is there and what the study asks for: numbers change by rounding at most."""
FAILURE = "failure.txt"
"""In a run's directory: why its training or measurement failed."""


@dataclass(frozen=True)
class StudyRun:
    """One run of the grid."""

    number: int
    cell: tuple[str, ...]
    """One label per axis"""
    config: Config
    directory: Path
    measure: MeasureSettings | None

    @property
    def name(self) -> str:
        return self.directory.name


def expand(settings: StudySettings) -> list[StudyRun]:
    """The runs of a study, cell by cell, seed by seed.

    Raises:
        ValueError: the settings of a cell have a mistake; the message has the cell's labels.
    """
    runs: list[StudyRun] = []
    threads = compute_threads(None, settings.parallel * settings.workers)
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
            # A fresh seed follows from the name alone: a grid that grows leaves the runs that are there as they are.
            seed = number if settings.paired else zlib.crc32(name.encode()) % 1_000_000
            own = replace(config, seed=seed, run_dir=str(directory))
            measured = None if measure is None else replace(measure, output=str(directory / "measure"))
            runs.append(StudyRun(len(runs), cell, own, directory, measured))
    return runs


def state_of(run: StudyRun) -> str:
    """missing, interrupted, trained (but not measured yet), done, or failed, with the reason."""
    if trained(run):
        return "done" if measured(run) else _failure(run) or "trained"
    if failure := _failure(run):
        return failure
    return "interrupted" if (run.directory / records.FILE).exists() else "missing"


def trained(run: StudyRun) -> bool:
    """Whether the run's last epoch has ended and its last step is saved."""
    saved = checkpoint.newest_first(run.directory / "checkpoints")
    if not saved:
        return False
    ends = [r.step for r in _records(run, EpochRecord) if r.epochs_completed == run.config.epochs]
    return bool(ends) and saved[0].name.startswith(f"step-{ends[-1]:08d}-")


def measured(run: StudyRun) -> bool:
    """Whether the run is measured with the study's settings, or is not to be measured."""
    if run.measure is None:
        return True
    measurement = _measurement(run)
    wanted = asdict(run.measure)
    return measurement is not None and all(
        measurement["settings"].get(name) == value for name, value in wanted.items() if name not in _MAY_DIFFER
    )


def check_settings(run: StudyRun) -> None:
    """Compare the study's settings with those that the run was made with.

    Raises:
        ValueError: they differ.
    """
    path = run.directory / "config.yaml"
    if not path.exists():
        return
    remedy = "give another output=DIRECTORY, or remove the run"
    try:
        found = flat(to_dict(load(Config, path, [])))
    except ValueError as error:
        raise ValueError(f"output: {path} cannot be read ({error}): {remedy}") from error
    different = [
        f"{name}={value} (there: {found.get(name)})"
        for name, value in flat(to_dict(run.config)).items()
        if found.get(name) != value and name not in _MAY_DIFFER
    ]
    if different:
        raise ValueError(
            f"output: {run.directory} was made with other settings than the study's {', '.join(different)}: {remedy}"
        )


def values_of(run: StudyRun) -> dict[str, float]:
    """The numbers of a run that is done, by column; NaN for what it does not have."""
    last = {r.split: r for r in _records(run, EvaluationRecord) if r.weights == "current"}
    values: dict[str, float | None] = {}
    for split in ("test", "train"):
        values[f"{split}_error"] = last[split].top1_error_ratio
        values[f"{split}_top5_error"] = last[split].top5_error_ratio
        values[f"{split}_loss"] = last[split].loss
    values["gap"] = last["test"].top1_error_ratio - last["train"].top1_error_ratio
    values["top5_gap"] = last["test"].top5_error_ratio - last["train"].top5_error_ratio
    ends = _records(run, EndRecord)
    if ends:
        plain, regularized = ends[0].plain_step_seconds, ends[0].regularized_step_seconds
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


def _records(run: StudyRun, kind: type[R]) -> list[R]:
    """The records of one kind, which must not be that of the steps: there are many."""
    path = run.directory / records.FILE
    return records.of_kind(list(read_records(path, (kind,))), kind) if path.exists() else []


def _measurement(run: StudyRun) -> dict[str, Any] | None:
    path = run.directory / "measure.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _failure(run: StudyRun) -> str | None:
    path = run.directory / FAILURE
    return f"failed: {path.read_text(encoding='utf-8')}" if path.exists() else None
