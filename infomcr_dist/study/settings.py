"""The settings of a study: a YAML file, then ``key=value``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from infomcr_dist.study.columns import COLUMNS, MEASURED, METRICS
from pipelines.options import convert, from_dict, layered, read_yaml

_LABEL = re.compile(r"[\w+.,-]+")


@dataclass(frozen=True)
class StudySettings:
    """What varies, how often each run is repeated, what is measured of it, and what is written.

    A study file may have one more section, ``scaled``: what ``scaled=true`` changes. It holds settings as here; an axis
    of its grid replaces the one of the same name.
    """

    title: str = ""
    """Heading of the table and of the figure."""
    base: dict[str, Any] = field(default_factory=dict)
    """Settings of every run, as in a recipe."""
    grid: dict[str, Any] = field(default_factory=dict)
    """What varies: axis → label → settings; every combination of labels is a cell."""
    seeds: int = 5
    """Runs per cell."""
    paired: bool = True
    """Whether the runs of all cells have the same seeds, 0, 1 …; otherwise each run has its own."""
    measure: dict[str, Any] | None = field(default_factory=dict)
    """Settings of infomcr_dist.measure for every trained run; null: none is measured."""
    columns: tuple[str, ...] = ("test_error", "train_error", "train_loss", *METRICS, "penalty_share")
    """Of the table, in order; the first three are drawn. An unknown name gets the list of all."""
    figure: Literal["metrics", "bars"] = "bars"
    """metrics: as Figures 2-4, and Kendall's τ of each metric with the test error; bars: the means, or with ``compare``
    the differences from its first label."""
    compare: str | None = None
    """Axis whose labels are compared with its first one, seed by seed; needs paired seeds."""
    choose: str | None = None
    """Axis of which the label with the lowest error is reported; needs base.data.holdout_images."""
    output: str | None = None
    """Directory; null: studies/NAME, or studies/NAME-scaled."""
    runs: str | None = None
    """Directory of the runs, which studies with the same axes may share; null: OUTPUT/runs."""
    scaled: bool = False
    """Take the sizes of the file's section ``scaled``."""
    parallel: int = 1
    """Runs at the same time; on a machine with GPUs each has its own, as far as there are enough."""
    workers: int = 1
    """Workers per run on this machine, under horovodrun, or torchrun where Horovod is not installed; 1: without."""
    plan: bool = False
    """Print the runs and the state of each; run none."""
    run: int | None = None
    """Make this run alone, by its number in the plan, and the table if it was the last that was missing."""

    def __post_init__(self) -> None:
        for name in ("seeds", "parallel", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        _check_grid(self.grid)
        for name in ("seed", "run_dir", "resume"):
            if name in self.base:
                raise ValueError(f"base.{name} is set by the study for each run, got {self.base[name]}: remove it")
        for name in ("compare", "choose"):
            axis = getattr(self, name)
            if axis is not None and axis not in self.grid:
                raise ValueError(f"{name} must be an axis of the grid ({', '.join(self.grid)}), got {axis}")
        if self.compare is not None and not self.paired:
            raise ValueError(f"compare={self.compare} needs the same seeds in all cells, got paired=false")
        for column in self.columns:
            if column not in COLUMNS:
                raise ValueError(f"columns must be out of {', '.join(COLUMNS)}, got {column}")
            if self.measure is None and column in MEASURED:
                raise ValueError(f"columns: {column} is measured, got measure=null")
        needed = ("test_error", *METRICS) if self.figure == "metrics" else ("test_error",) if self.choose else ()
        if missing := [name for name in needed if name not in self.columns]:
            raise ValueError(f"columns must hold {', '.join(missing)} for figure={self.figure}, choose={self.choose}")


def _check_grid(grid: dict[str, Any]) -> None:
    if not grid:
        raise ValueError("grid must have an axis, got none: axis → label → settings")
    for axis, labels in grid.items():
        if not isinstance(labels, dict) or not labels:
            raise ValueError(f"grid.{axis} must map labels to settings, got {labels}")
        for label, settings in labels.items():
            if not isinstance(label, str) or not _LABEL.fullmatch(label):
                raise ValueError(
                    f"grid.{axis}: a label is a text of letters, digits and any of + . , - _, got {label!r}: "
                    "give it another, in quotes if it is a number"
                )
            if not isinstance(settings, dict):
                raise ValueError(f"grid.{axis}.{label} must be a section of settings, got {settings}")


def load_study(path: Path, overrides: list[str]) -> StudySettings:
    """Read a study file, scaled or not, and apply ``key=value`` overrides.

    Raises:
        ValueError: the file or an override has a mistake, or ``scaled=true`` finds no section of that name.
    """
    file, given = read_yaml(path), layered([], overrides)
    section = file.pop("scaled", None)
    if convert(bool, given.get("scaled", False), "scaled"):
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
