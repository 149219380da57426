"""Make a study: a grid of ordinary training runs, a measurement of each, one table, one figure.

    infomcr study STUDY [key=value …]
    infomcr study scenario_1 scaled=true parallel=2 plan=true

The grid is what varies × seeds. Makes the runs that are missing, resumes those that were interrupted, marks those that
fail and continues with the rest; then writes into the output directory table.md (means ± standard deviations, and the
statistics), table.csv, runs.csv, figure.png and figure.svg. ``plan=true`` prints the runs and the state of each, and
makes none. ``run=K`` makes the K-th of them alone, so that the tasks of a cluster's job array make one each; the last
of them writes the table.

Exit code 0: all runs are done; 1: some failed; 75: stopped, repeat the command to resume; 2: a mistake in the study,
reported in one line.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from infomcr_dist.cli import STUDY
from infomcr_dist.experiment import prepare_demo_data
from infomcr_dist.study.grid import StudyRun, check_settings, expand, state_of
from infomcr_dist.study.jobs import STOPPED, duration_text, launcher, make_all
from infomcr_dist.study.settings import StudySettings, load_study
from infomcr_dist.study.summary import FILES, command_line, plan_text, write_summary


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""

    def body(positionals: list[str], overrides: list[str]) -> int:
        path = positionals[0]
        study = path if path in arguments else Path(path).stem  # a shipped study was given by its name
        return _study(study, Path(path), overrides)

    return STUDY.run(arguments, body)


def _study(study: str, path: Path, overrides: list[str]) -> int:
    settings = load_study(path, overrides)
    runs = expand(settings)
    for run in runs:
        check_settings(run)
    if settings.plan:
        print(plan_text(runs, settings, study, overrides))
        return 0
    selected = _selected(runs, settings)
    launcher(settings.workers)  # a missing launcher is found before the first run
    began = time.perf_counter()
    left = [run for run in selected if state_of(run) != "done"]
    for data in sorted({run.config.data.path for run in left}):
        prepare_demo_data(data)
    stopped = bool(left) and make_all(selected, settings)
    if settings.run is None or all(state_of(run) == "done" for run in runs):
        print("\n" + write_summary(runs, settings, command_line(study, overrides, "run")))
        print(f"written: {', '.join(FILES)} in {settings.output}")
    if stopped:
        print("stopped: repeat the command to resume", file=sys.stderr)
        return STOPPED
    states = [state_of(run) for run in selected]
    print(f"{states.count('done')}/{len(selected)} runs done, {len(left)} of them made in "
          f"{duration_text(time.perf_counter() - began)}")  # fmt: skip
    return 1 if any(state != "done" for state in states) else 0


def _selected(runs: list[StudyRun], settings: StudySettings) -> list[StudyRun]:
    """All runs, or the one of the setting ``run``."""
    if settings.run is None:
        return runs
    if not 0 <= settings.run < len(runs):
        raise ValueError(f"run must be from 0 to {len(runs) - 1}, got {settings.run}: plan=true lists them")
    return [runs[settings.run]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
