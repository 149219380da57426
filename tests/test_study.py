"""Studies: their grids and files, what is made of missing, interrupted and failed runs, tables against numpy."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infomcr_dist import records
from infomcr_dist.records import (
    EndRecord,
    EpochRecord,
    EvaluationRecord,
    RecordWriter,
    RegularizerOnRecord,
    last_step,
    read_records,
)
from infomcr_dist.study import results, statistics
from infomcr_dist.study.__main__ import main
from infomcr_dist.study.grid import StudyRun, expand, state_of
from infomcr_dist.study.jobs import Processes, RunCounter, count_steps, gpus_of
from infomcr_dist.study.results import Results
from infomcr_dist.study.settings import load_study

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "infomcr_dist" / "studies").glob("*.yaml"))

STUDY = """
title: two rates
base:
  epochs: 10
  data: {{path: {data}, backend: torch, global_batch_size: 64, train_images: 200}}
  optimizer: {{weight_decay: 0}}
  schedule: {{kind: constant}}
  regularizer: {{when: from_epoch, epoch: 8, sub_batch_size: 16}}
  checkpoint: {{every_steps: 2}}
  max_nonfinite_steps: 1
  threads: 1
grid:
  rate:
    slow: {{optimizer: {{learning_rate: 0.01}}}}
    fast: {{optimizer: {{learning_rate: 0.02}}}}
seeds: 2
measure: {{trials: 3, samples: 8, images: 20}}
figure: metrics
compare: rate
parallel: 2
output: {output}
"""


def table_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def write_study(folder: Path, data: Path) -> Path:
    path = folder / "study.yaml"
    path.write_text(STUDY.format(data=data, output=folder / "out"))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """The folder of a study that was made in one go."""
    folder = tmp_path_factory.mktemp("study")
    assert main([str(write_study(folder, small_data))]) == 0
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path, small_data: Path) -> Path:
    """A copy of it for a test to change."""
    study = write_study(tmp_path, small_data)
    shutil.copytree(made / "out", tmp_path / "out")
    return study


@pytest.mark.parametrize("scaled", ["true", "false"])
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_plans(path: Path, scaled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "plan=true", f"scaled={scaled}", f"output={tmp_path}", f"runs={tmp_path}"]) == 0
    settings = load_study(path, [f"scaled={scaled}"])
    runs = expand(settings)
    assert len(runs) == settings.seeds * np.prod([len(labels) for labels in settings.grid.values()])
    text = capsys.readouterr().out
    assert all(f"{run.number}  {run.name}  missing" in text for run in runs)
    assert f"--array=0-{len(runs) - 1} " in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scaled", ["true", "false"])
@pytest.mark.parametrize("study", ["table_3", "batch_norm"])
def test_studies_share_the_runs_of_table_1(study: str, scaled: str) -> None:
    table_1, other = (expand(load_study(ROOT / "infomcr_dist" / "studies" / f"{name}.yaml", [f"scaled={scaled}"]))
                      for name in ("table_1", study))  # fmt: skip
    known = {run.directory: run for run in table_1}
    for run in other:
        if run.cell[-1] != "beta-0":
            assert run.config == known[run.directory].config
            assert run.measure == known[run.directory].measure


def test_the_control_differs_from_the_regularized_runs_in_beta_alone() -> None:
    runs = expand(load_study(ROOT / "infomcr_dist" / "studies" / "batch_norm.yaml", ["scaled=true"]))
    beta_0, regularized = ([run.config for run in runs if run.cell[-1] == label] for label in ("beta-0", "+reg"))
    for control, config in zip(beta_0, regularized, strict=True):
        assert control.regularizer.beta == 0
        assert control == replace(
            config, run_dir=control.run_dir, regularizer=replace(config.regularizer, beta=control.regularizer.beta)
        )


@pytest.mark.parametrize("scaled", ["true", "false"])
def test_the_compared_strengths_are_of_as_many_candidates(scaled: str) -> None:
    compared, candidates = (expand(load_study(ROOT / "infomcr_dist" / "studies" / f"{name}.yaml", [f"scaled={scaled}"]))
                            for name in ("compare", "compare_strength"))  # fmt: skip
    tried = {(run.cell[1], run.config.regularizer) for run in candidates}
    for run in compared:
        of_method = [regularizer for method, regularizer in tried if method == run.cell[0]]
        assert len(of_method) == (0 if run.cell[0] in ("plain", "sub_batches") else 3)
        strengths = [replace(r, beta=r.weight, rho=r.radius or 1.0) for r in of_method]
        own = run.config.regularizer
        assert not of_method or replace(own, beta=own.weight, rho=own.radius or 1.0) in strengths
    data = replace(candidates[0].config.data, holdout_images=0)
    assert all((run.config.data, run.config.schedule) == (data, candidates[0].config.schedule) for run in compared)


def test_the_grid_is_expanded_with_paired_or_with_fresh_seeds(tmp_path: Path, small_data: Path) -> None:
    path = write_study(tmp_path, small_data)
    grid = ["grid.size.small.data.train_images=100", "grid.size.large.data.train_images=150"]
    runs = expand(load_study(path, grid))
    cells = [("slow", "small"), ("slow", "large"), ("fast", "small"), ("fast", "large")]
    assert [run.cell for run in runs] == [cell for cell in cells for _ in range(2)]
    assert [run.number for run in runs] == list(range(8))
    assert [run.config.seed for run in runs] == [0, 1] * 4
    assert [run.config.data.train_images for run in runs] == [100, 100, 150, 150] * 2
    assert [run.config.optimizer.learning_rate for run in runs] == [0.01] * 4 + [0.02] * 4
    assert len({run.directory for run in runs}) == 8
    fresh = expand(load_study(path, [*grid, "paired=false", "compare=null"]))
    assert len({run.config.seed for run in fresh}) == 8
    longer = expand(load_study(path, [*grid, "paired=false", "compare=null", "seeds=3"]))
    assert {run.config.seed for run in longer} > {run.config.seed for run in fresh}


def test_scaled_takes_the_sizes_of_its_section(tmp_path: Path, small_data: Path) -> None:
    path = write_study(tmp_path, small_data)
    with path.open("a") as file:
        file.write("scaled: {base: {epochs: 9}, grid: {rate: {fast: {optimizer: {learning_rate: 0.1}}}}}\n")
    assert [run.config.epochs for run in expand(load_study(path, []))] == [10] * 4
    runs = expand(load_study(path, ["scaled=true"]))
    assert [run.cell for run in runs] == [("fast",)] * 2
    assert [(run.config.epochs, run.config.data.train_images) for run in runs] == [(9, 200)] * 2
    assert expand(load_study(path, ["scaled=true", "base.epochs=12"]))[0].config.epochs == 12


def test_the_table_is_of_the_records(made: Path) -> None:
    """Means and standard deviations by hand, from the files of the runs."""
    out = made / "out"
    rows = table_of(out / "table.csv")
    assert [row["rate"] for row in rows] == ["slow", "fast"]
    markdown = (out / "table.md").read_text()
    for row in rows:
        errors, gammas = [], []
        for seed in range(2):
            run = out / "runs" / f"{row['rate']}_seed-{seed}"
            lines = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
            evaluations = [r for r in lines if r["kind"] == "evaluation" and r["split"] == "test"]
            assert [r["epoch"] for r in evaluations] == [10]
            errors.append(evaluations[0]["top1_error_ratio"])
            measurement = json.loads((run / "measure.json").read_text())
            assert measurement["settings"]["trials"] == 3
            gammas.append(measurement["checkpoints"][0]["curvature"]["gamma_hat"]["mean"])
        assert row["runs"] == "2"
        for name, values, factor, digits in (("test_error", errors, 100, 2), ("gamma_hat", gammas, 1, 1)):
            assert float(row[f"{name}_mean"]) == pytest.approx(sum(values) / 2)
            spread = abs(values[0] - values[1]) / 2**0.5
            assert float(row[f"{name}_std"]) == pytest.approx(spread)
            assert f"{factor * sum(values) / 2:.{digits}f} ± {factor * spread:.{digits}f}" in markdown
    runs = table_of(out / "runs.csv")
    assert [(r["rate"], r["seed"], r["state"]) for r in runs] == [
        (rate, seed, "done") for rate in ("slow", "fast") for seed in ("0", "1")
    ]
    assert all(float(r["penalty_share"]) > 0 for r in runs)


def test_the_figure_files_are_whole(made: Path) -> None:
    with Image.open(made / "out" / "figure.png") as image:
        image.load()
        assert image.size[0] > 1000
    assert ElementTree.parse(made / "out" / "figure.svg").getroot().tag.endswith("svg")
    assert not list((made / "out").glob(".*"))


def test_a_comparison_is_drawn_as_differences(copy: Path) -> None:
    figure = copy.parent / "out" / "figure.svg"
    for compare, drawn in (("rate", True), ("null", False)):
        assert main([str(copy), "figure=bars", f"compare={compare}"]) == 0
        assert ("<!-- difference from slow" in figure.read_text()) == drawn


def test_a_study_that_is_done_makes_nothing(made: Path, copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.parent.glob("out/runs/*/*")}
    assert main([str(copy)]) == 0
    assert {path: path.stat().st_mtime_ns for path in copy.parent.glob("out/runs/*/*")} == before
    assert (copy.parent / "out" / "table.csv").read_bytes() == (made / "out" / "table.csv").read_bytes()


@pytest.mark.parametrize(
    ("found", "given", "shape", "expected"),
    [
        (0, None, (2, 1), [None, None]),
        (4, None, (3, 1), ["0", "1", "2"]),
        (4, None, (2, 2), ["0,1", "2,3"]),
        (2, "5,GPU-7", (3, 1), ["5", "GPU-7", "5"]),
        (3, None, (2, 2), ["0,1", "2,0"]),
        (1, None, (1, 8), ["0"]),
    ],
)
def test_runs_at_a_time_have_gpus_of_their_own(
    found: int,
    given: str | None,
    shape: tuple[int, int],
    expected: list[str | None],
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: found)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given or "")
    settings = load_study(made / "study.yaml", [f"parallel={shape[0]}", f"workers={shape[1]}"])
    assert gpus_of(settings) == expected


def test_a_run_sees_its_gpus_alone(tmp_path: Path) -> None:
    seen = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    with (tmp_path / "lock").open("w") as lock:
        for gpus in ("2,3", None):
            assert Processes().call(seen, tmp_path / "log", lock.fileno(), gpus) == 0
    assert (tmp_path / "log").read_text().split() == ["2,3", str(os.environ.get("CUDA_VISIBLE_DEVICES"))]


def test_the_last_task_of_an_array_writes_the_table(made: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = copy.parent / "out"
    for name in ("runs/fast_seed-0/measure.json", "table.csv", "table.md"):
        (out / name).unlink()
    assert main([str(copy), "run=0"]) == 0
    assert not (out / "table.csv").exists()
    assert main([str(copy), "run=2"]) == 0
    assert (out / "table.csv").read_bytes() == (made / "out" / "table.csv").read_bytes()
    assert f"`infomcr study {copy}`" in (out / "table.md").read_text()
    assert "written: table.md" in capsys.readouterr().out


def test_a_study_of_another_ones_runs_makes_its_own_directory(copy: Path) -> None:
    mine = copy.parent / "mine"
    assert main([str(copy), f"runs={copy.parent / 'out' / 'runs'}", f"output={mine}"]) == 0
    assert (mine / "table.csv").read_bytes() == (copy.parent / "out" / "table.csv").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_and_repeated_is_as_uninterrupted(made: Path, copy: Path, number: signal.Signals) -> None:
    run = copy.parent / "out" / "runs" / "fast_seed-1"
    shutil.rmtree(run)
    assert state_of(expand(load_study(copy, []))[3]) == "missing"
    log = copy.parent / "log"
    with log.open("w") as file, subprocess.Popen(
        [sys.executable, "-m", "infomcr_dist.study", str(copy)], cwd=ROOT, stdout=file, stderr=file
    ) as study:  # fmt: skip
        deadline = time.monotonic() + 120
        while not list(run.glob("checkpoints/step-00000002-*")):
            assert time.monotonic() < deadline, log.read_text()
            assert study.poll() is None, log.read_text()
            time.sleep(0.02)
        os.kill(study.pid, number)
    if number == signal.SIGTERM:
        assert study.returncode == 75
        assert log.read_text().endswith("stopped: repeat the command to resume\n")
        assert table_of(copy.parent / "out" / "table.csv")[1]["runs"] == "1"
    # What a killed study leaves behind notices within seconds, and saves; that may be its end.
    left = ["interrupted"] if number == signal.SIGTERM else ["interrupted", "trained"]
    assert state_of(expand(load_study(copy, []))[3]) in left
    assert main([str(copy)]) == 0
    for name in ("table.csv", "runs.csv"):
        assert (copy.parent / "out" / name).read_bytes() == (made / "out" / name).read_bytes(), name


def test_a_failed_run_is_marked_and_the_rest_continues(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate that breaks the run at once, first in the grid, and a run that is still to be measured."""
    path = copy.parent / "out" / "runs" / "slow_seed-0" / "measure.json"
    before = json.loads(path.read_text())
    path.unlink()
    grid = "{broken: {optimizer: {learning_rate: 1.e+30}}, slow: {optimizer: {learning_rate: 0.01}}}"
    text = re.sub(r"grid:\n  rate:.*?(?=seeds:)", f"grid: {{rate: {grid}}}\n", copy.read_text(), flags=re.DOTALL)
    copy.write_text(text)
    assert main([str(copy), "seeds=1"]) == 1
    assert json.loads(path.read_text())["checkpoints"][0]["curvature"] == before["checkpoints"][0]["curvature"]
    output = capsys.readouterr().out
    assert "broken_seed-0: failed: train ended with 2: error: " in output
    rows = table_of(copy.parent / "out" / "table.csv")
    assert [(row["rate"], row["runs"]) for row in rows] == [("broken", "0"), ("slow", "1")]
    assert re.search(r"Not in the table:\n\n- broken_seed-0: failed: .* not finite", output)
    runs = table_of(copy.parent / "out" / "runs.csv")
    assert [run["state"].split(":")[0] for run in runs] == ["failed", "done"]
    assert main([str(copy), "seeds=1", "run=1"]) == 0  # of a job array's tasks, the one that is done
    assert main([str(copy), "seeds=1", "run=2"]) == 2


def test_other_settings_are_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copy), "base.optimizer.momentum=0.5"]) == 2
    assert "slow_seed-0 was made with other settings than the study's optimizer.momentum=0.5 (there: 0.9)" in (
        capsys.readouterr().err
    )
    assert main([str(copy), "plan=true", "base.threads=2", "measure.trials=4"]) == 0
    assert capsys.readouterr().out.count("  trained\n") == 4  # to be measured again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=3"], "unknown setting seed: the nearest known one is seeds"),
        (["base.epoch=3"], "cell slow: unknown setting epoch: the nearest known one is epochs"),
        (["measure.trial=3"], "cell slow: unknown setting trial: the nearest known one is trials"),
        (["grid.rate.slow.optimizer.rate=3"], "cell slow: unknown setting optimizer.rate: the nearest"),
        (["grid.rate.slow=3"], "grid.rate.slow must be a section of settings, got 3"),
        (["grid.rate=3"], "grid.rate must map labels to settings, got 3"),
        (["columns=[error]"], "columns must be out of test_error, "),
        (["measure=null", "figure=bars"], "columns: gamma_hat is measured, got measure=null"),
        (["columns=[test_error]"], "columns must hold gamma_hat, frobenius, spectral_radius, robustness for"),
        (["choose=rate"], "choose=rate would choose on the test images, got data.holdout_images=0 in cell slow"),
        (["compare=size"], "compare must be an axis of the grid (rate), got size"),
        (["paired=false"], "compare=rate needs the same seeds in all cells, got paired=false"),
        (["base.seed=1"], "base.seed is set by the study for each run, got 1: remove it"),
        (["parallel=0"], "parallel must be at least 1, got 0"),
        (["run=4"], "run must be from 0 to 3, got 4"),
        (["scaled=true"], "has no section 'scaled'"),
        (["base.data.path=nowhere"], "no data set at nowhere"),
        (["base.regularizer.sub_batch_size=15"], "regularizer.sub_batch_size must divide the global batch"),
        (["base.model=resnet21"], "model must be a known name"),
        (["title=${oc.env:HOME}"], "title must be written out"),
        (["other.yaml"], "give one study"),
        (["base.data.mixing=full"], "cell slow: data.mixing is now data.shuffle"),
        (["grid.rate.slow.nonfinite_steps=1"], "cell slow: nonfinite_steps is now max_nonfinite_steps"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_study(tmp_path, small_data)), *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_labels_make_safe_folders(tmp_path: Path, small_data: Path) -> None:
    path = write_study(tmp_path, small_data)
    for label in ("../up", "1", "'a b'"):
        path.write_text(STUDY.format(data=small_data, output=tmp_path).replace("slow:", f"{label}:"))
        with pytest.raises(ValueError, match=r"grid.rate: a label is a text of letters"):
            load_study(path, [])


def test_steps_are_counted_of_the_settings(tmp_path: Path, small_data: Path) -> None:
    path = write_study(tmp_path, small_data)

    def count(*overrides: str) -> list[int]:
        settings = load_study(path, list(overrides))
        return count_steps(expand(settings), settings.workers)

    assert count() == [10 * 4] * 4  # 200 images in batches of 64
    assert count("base.epochs=20", "base.data.drop_last=true") == [20 * 3] * 4
    assert count("grid.rate.fast.data.train_images=64") == [40, 40, 10, 10]
    batches = ["base.data.global_batch_size=null", "base.data.batch_size=16"]
    assert count(*batches, "workers=2") == [10 * 7] * 4  # 32 images over both


def test_finished_runs_and_their_steps_are_counted(
    tmp_path: Path, small_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = expand(load_study(write_study(tmp_path, small_data), []))
    counter = RunCounter(4, [(run, 40) for run in runs[1:]])
    log_epochs(runs[1], 8, 12)
    log_epochs(runs[3], 4)
    counter.show()
    assert "| 1/4 runs, step 16/120 [" in last_line(capsys)
    log_epochs(runs[1], 40)
    counter.finish(runs[1], failed=False)
    counter.finish(runs[2], failed=True)
    counter.show()
    assert "75%|" in (line := last_line(capsys))
    assert "| 3/4 runs, 1 of them failed, step 84/120 [" in line
    counter.close()


def log_epochs(run: StudyRun, *steps: int) -> None:
    """Records of epochs that ended after these steps."""
    run.directory.mkdir(parents=True, exist_ok=True)
    writer = RecordWriter(run.directory / records.FILE)
    for step in steps:
        writer.log(EpochRecord(step, 1, 1, 0.5))
    writer.close()


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.split("\r")[-1]


def test_the_plan_counts_what_is_done_and_opens_no_data(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy.parent / "out" / "runs" / "fast_seed-1")
    arguments = [str(copy), "plan=true", "seeds=3"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert [line.split()[2] for line in text.splitlines()[:6]] == ["done", "done", "missing"] + ["done"] + [
        "missing"
    ] * 2
    assert f"3/6 runs are done (2 rate × 3 seeds), in {copy.parent / 'out'}\n" in text
    assert f"'infomcr study {copy} seeds=3 run=$SLURM_ARRAY_TASK_ID'" in text
    assert not re.search(r"about|estimate|\d (s|min|h)\b", text), "nothing is said of the time"


def test_a_shipped_study_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["beta", "plan=true", "--scaled", "true"]) == 0
    text = capsys.readouterr().out
    assert "in studies/beta-scaled\n" in text
    assert "'infomcr study beta scaled=true run=$SLURM_ARRAY_TASK_ID'" in text
    assert main(["gamma"]) == 2
    names = ", ".join(path.stem for path in STUDIES)
    assert capsys.readouterr().err == f"error: study gamma does not exist: give a YAML file, or one of {names}\n"


def test_a_run_of_another_release_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy.parent / "out" / "runs" / "slow_seed-1" / "config.yaml"
    path.write_text(path.read_text().replace("shuffle: full", "mixing: full"))
    assert main([str(copy)]) == 2
    assert capsys.readouterr().err == (
        f"error: output: {path} cannot be read (data.mixing is now data.shuffle): give another output=DIRECTORY, "
        "or remove the run\n"
    )


# Records, as a study reads them


def test_records_of_some_kinds_are_those_of_all(made: Path) -> None:
    for path in sorted(made.glob("out/runs/*/records.jsonl")):
        everything = list(read_records(path))
        for kinds in ((EndRecord,), (EpochRecord, EvaluationRecord), (RegularizerOnRecord,)):
            wanted = [record for record in everything if isinstance(record, kinds)]
            assert wanted
            assert list(map(repr, read_records(path, kinds))) == list(map(repr, wanted))


def test_the_last_step_is_that_of_all_records(made: Path, tmp_path: Path) -> None:
    (path, *_) = sorted(made.glob("out/runs/*/records.jsonl"))
    assert last_step(path) == list(read_records(path))[-1].step == 40
    content = path.read_bytes()
    cut = tmp_path / "records.jsonl"
    assert last_step(cut) == 0
    # Wherever a killed process has cut the file.
    for length in (*range(0, 2000, 37), *range(2000, len(content), 1009)):
        cut.write_bytes(content[:length])
        found = [] if length == 0 or b"\n" not in content[:length] else list(read_records(cut))
        assert last_step(cut) == (found[-1].step if found else 0)


# Statistics, against numpy or published tables


def results_of(test_error: list[list[float]], **columns: list[list[float]]) -> Results:
    values = np.stack([np.array(test_error), *(np.array(v) for v in columns.values())], axis=2)
    return Results({"cell": [f"c{i}" for i in range(len(test_error))]}, ["test_error", *columns], values)


def test_paired_differences_against_a_published_example() -> None:
    """Student's sleep data (1908): mean difference 1.58, 95 % interval 0.70 to 2.46."""
    first = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
    second = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])
    d = statistics.paired_difference(second, first)
    assert (round(d.mean, 2), round(d.low, 2), round(d.high, 2), d.pairs) == (1.58, 0.70, 2.46, 10)
    assert d.deviation == pytest.approx(np.std(second - first, ddof=1))
    with_gap = statistics.paired_difference(np.append(second, np.nan), np.append(first, 1.0))
    assert with_gap == d


def test_seeds_needed_is_what_simulation_shows() -> None:
    n = statistics.seeds_needed(deviation=0.7, effect=0.6)
    assert n is not None
    draws = np.random.default_rng(0)

    def power(pairs: int) -> float:
        differences = draws.normal(0.6, 0.7, (40_000, pairs))
        t = differences.mean(1) / differences.std(1, ddof=1) * pairs**0.5
        null = draws.normal(0, 1, (200_000, pairs))
        critical = np.quantile(np.abs(null.mean(1) / null.std(1, ddof=1) * pairs**0.5), 0.95)
        return float((np.abs(t) > critical).mean())

    assert power(n) > 0.79
    assert power(n - 1) < 0.80
    assert statistics.seeds_needed(0.0, 0.5) == 2
    assert statistics.seeds_needed(100.0, 0.3) is None


def test_a_larger_effect_never_needs_more_seeds() -> None:
    for deviation in (0.03, 0.11, 0.17, 0.7):
        needed = [statistics.seeds_needed(deviation, effect / 10) or math.inf for effect in range(3, 31)]
        assert needed == sorted(needed, reverse=True)


def test_kendall_counts_pairs() -> None:
    random = np.random.default_rng(1)
    left, right = random.normal(size=(2, 30))
    pairs = [(i, j) for i in range(30) for j in range(i)]
    agreement = np.mean([np.sign((left[i] - left[j]) * (right[i] - right[j])) for i, j in pairs])
    assert statistics.kendall(left, right) == pytest.approx(agreement)
    assert statistics.kendall(left, np.append(right[:29], np.nan)) == pytest.approx(
        statistics.kendall(left[:29], right[:29])
    )


def test_partial_kendall_is_the_partial_correlation_of_the_pairs_orders() -> None:
    random = np.random.default_rng(2)
    fixed = random.normal(size=25)
    left, right = fixed + random.normal(size=(2, 25))
    signs = [np.sign(np.subtract.outer(values, values)).ravel() for values in (left, right, fixed)]
    # What regression on the third leaves of the other two.
    rest = [s - signs[2] * (s @ signs[2]) / (signs[2] @ signs[2]) for s in signs[:2]]
    expected = np.corrcoef(*rest)[0, 1]
    assert statistics.partial_kendall(left, right, fixed) == pytest.approx(expected)
    missing = [np.append(values, nan) for values, nan in ((left, 1.0), (right, np.nan), (fixed, 1.0))]
    assert statistics.partial_kendall(*missing) == pytest.approx(expected)
    assert math.isnan(statistics.partial_kendall(left, right, np.exp(left)))
    assert math.isnan(statistics.partial_kendall(left, right, np.zeros(25)))


def test_correlations_and_choice() -> None:
    error = [[0.1, 0.12], [0.2, 0.21], [0.3, 0.32]]
    metric = {"gamma_hat": [[1.0, 1.5], [2.0, 2.5], [3.0, 3.5]], "robustness": [[3.0, 3.2], [2.0, 2.2], [1.0, 1.2]]}
    metric["train_loss"] = metric["gamma_hat"]
    found = results_of(error, **metric)
    text = results.correlations(found, "test")
    assert "| γ̂ | +1.00 | +1.00 (+1.00 … +1.00) | – |" in text  # it has the order of the loss
    assert "| train loss | +1.00 | +1.00 (+1.00 … +1.00) |  |" in text
    assert "| robustness | -1.00 | -0.60 (" in text  # 12 of 15 pairs the other way
    del metric["train_loss"]
    assert "| γ̂ | +1.00 | +1.00 (+1.00 … +1.00) |\n" in results.correlations(results_of(error, **metric), "test")
    assert results.choice(found, "cell", "validation") == (
        "chosen: cell c0, by the lowest mean validation error (11.00 %)"
    )


def test_tables_with_missing_runs() -> None:
    nan = float("nan")
    found = results_of([[0.1, 0.2, nan], [nan, nan, nan], [0.15, nan, nan]])
    assert results.markdown(found, "validation").splitlines() == [
        "| cell | runs | validation error, % |", "|---|---|---|",
        "| c0 | 2 | 15.00 ± 7.07 |", "| c1 | 0 | – |", "| c2 | 1 | 15.00 |",
    ]  # fmt: skip
    differences = results.differences(found, "cell", "test")
    assert "| c1 | – |" in differences
    assert "| c2 | +5.00 |" in differences
