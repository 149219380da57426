"""What a study shows of its runs: the plan before they are made, the table and the figure after."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import numpy as np
from matplotlib import rc_context

from infomcr_dist.checkpoint import make_directory, write_atomically
from infomcr_dist.study import results
from infomcr_dist.study.grid import StudyRun, state_of, values_of
from infomcr_dist.study.results import Results
from infomcr_dist.study.settings import StudySettings

FILES = ("table.md", "table.csv", "runs.csv", "figure.png", "figure.svg")
"""What `write_summary` writes."""


def plan_text(runs: list[StudyRun], settings: StudySettings, study: str, overrides: list[str]) -> str:
    """The runs and the state of each, and how the tasks of a cluster's job array make them.

    Args:
        runs: all runs of the study.
        settings: of the study.
        study: file or name of the study, as it was given.
        overrides: the settings of the command line.
    """
    states = [state_of(run) for run in runs]
    lines = [f"{run.number:4}  {run.name}  {state}" for run, state in zip(runs, states, strict=True)]
    axes = " × ".join(f"{len(labels)} {axis}" for axis, labels in settings.grid.items())
    lines.append(
        f"{states.count('done')}/{len(runs)} runs are done ({axes} × {settings.seeds} seeds), in {settings.output}"
    )
    command, last = command_line(study, overrides, "plan"), len(runs) - 1
    lines.append(f"as a Slurm array: sbatch --array=0-{last} --wrap='{command} run=$SLURM_ARRAY_TASK_ID'")
    lines.append(f"as a Kubernetes Job: k8s/study, with completions: {len(runs)} and these arguments")
    lines.append("the last run of such an array writes the table; with runs that failed, repeat without run=")
    return "\n".join(lines)


def write_summary(runs: list[StudyRun], settings: StudySettings, command: str) -> str:
    """Write the files of `FILES` into the output directory; the figures only where there is a number.

    Args:
        runs: all runs of the study, made or not.
        settings: of the study.
        command: what made them, for the table's head.

    Returns:
        The text of table.md.
    """
    found = collect(runs, settings)
    test = "validation" if all(run.config.data.holdout_images for run in runs) else "test"
    states = [state_of(run) for run in runs]
    parts = [f"# {settings.title}" if settings.title else "", f"`{command}`", results.markdown(found, test)]
    parts.append(f"mean ± standard deviation; {settings.seeds} seeds per cell")
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
    make_directory(output, "output")  # where the runs are another study's, nothing has made it yet
    for name, content in (("table.md", text), ("table.csv", results.to_csv(found)), ("runs.csv", table)):
        _write(output / name, content)
    if np.isfinite(found.values).any():
        if settings.figure == "metrics":
            figure = results.draw_metrics(found, settings.title, test)
        elif settings.compare is not None and len(settings.grid[settings.compare]) > 1:
            figure = results.draw_differences(found, settings.columns[:3], settings.compare, settings.title, test)
        else:
            figure = results.draw_bars(found, settings.columns[:3], settings.title, test)
        with rc_context({"svg.hashsalt": "infomcr_dist"}):  # the same runs, the same file
            write_atomically(
                output / "figure.svg", lambda file: figure.savefig(file, format="svg", metadata={"Date": None})
            )
        write_atomically(output / "figure.png", lambda file: figure.savefig(file, format="png", dpi=120))
    return text


def collect(runs: list[StudyRun], settings: StudySettings) -> Results:
    """The numbers of the runs that are done."""
    axes = {axis: list(labels) for axis, labels in settings.grid.items()}
    values = np.full((len(runs), len(settings.columns)), np.nan)
    for run in runs:
        if state_of(run) == "done":
            found = values_of(run)
            values[run.number] = [found.get(name, math.nan) for name in settings.columns]
    return Results(axes, list(settings.columns), values.reshape(-1, settings.seeds, len(settings.columns)))


def command_line(study: str, overrides: list[str], but: str) -> str:
    """The command that makes a study, without the setting ``but``."""
    given = [override for override in overrides if not override.startswith(f"{but}=")]
    return "infomcr study " + shlex.join([study, *given])


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))
