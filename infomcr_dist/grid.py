"""A study's file and grid: its settings, its runs, what is there of each."""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from infomcr_dist import checkpoint
from infomcr_dist.config import Config, MeasureSettings
from infomcr_dist.options import from_dict, layered, load_config, read_recipe, to_dict
from infomcr_dist.results import COLUMNS, METRICS

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
