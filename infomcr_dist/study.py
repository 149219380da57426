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

import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib import rc_context

from infomcr_dist import results
from infomcr_dist.checkpoint import write_atomically
from infomcr_dist.grid import StudyRun, StudySettings, check_settings, expand, load_study, state_of, values_of
from infomcr_dist.jobs import STOPPED, in_words, launcher, make_all, works
from infomcr_dist.results import Results


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
        lines.append(f"about {in_words(seconds)} on this machine, {settings.parallel} at a time")
    except ValueError as error:
        lines.append(f"no estimate of the time: {error}")
    given = shlex.join([str(path), *(a for a in arguments if not a.startswith("plan="))])
    study, last = f"python -m infomcr_dist.study {given}", len(runs) - 1
    lines.append(f"as a Slurm array: sbatch --array=0-{last} --wrap='{study} run=$SLURM_ARRAY_TASK_ID'")
    lines.append(f"as a Kubernetes Job: k8s/study, with completions: {len(runs)} and these arguments")
    lines.append("the last run of such an array writes the table; with runs that failed, repeat without run=")
    return "\n".join(lines)


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
        launcher(settings.workers)
        began = time.perf_counter()
        left = [run for run in selected if state_of(run) != "done"]
        stopped = bool(left) and make_all(selected, works(selected, settings), settings)
        if settings.run is None or all(state_of(run) == "done" for run in runs):
            command = "python -m infomcr_dist.study " + shlex.join(a for a in arguments if not a.startswith("run="))
            print("\n" + report(runs, settings, command))
            print(f"written: table.md, table.csv, runs.csv, figure.png, figure.svg in {settings.output}")
        took = f"{len(left)} runs in {in_words(time.perf_counter() - began)}"
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if stopped:
        print("stopped: repeat the command to go on", file=sys.stderr)
        return STOPPED
    print(took)
    return 1 if any(state_of(run) != "done" for run in selected) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
