"""A run with a profile and a log: what they hold, and that the run is the same without them."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infomcr_dist import checkpoint
from infomcr_dist.config import ProfileSettings
from infomcr_dist.profiler import StepProfiler
from infomcr_dist.records import StepRecord, read_records
from infomcr_dist.train import main

CPU = torch.device("cpu")
RECIPE = """
model: cnn
epochs: 2
data: {path: DATA, augmentation: flip, backend: synthetic, train_images: 40, holdout_images: 8, global_batch_size: 8}
regularizer: {sub_batch_size: 4, beta: 5, when: from_epoch, epoch: 1}
metric: {trials: 0}
telemetry: {port: null}
threads: 1
"""
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


@pytest.fixture(scope="module")
def runs(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The runs plain and watched, of five steps an epoch, in one directory."""
    root = tmp_path_factory.mktemp("watched")
    (root / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    threads = torch.get_num_threads()
    watch = ["profile.steps=[3,7]", *(["telemetry.logger=tensorboard"] if TENSORBOARD else [])]
    for name, settings in (("plain", []), ("watched", watch)):
        assert main([str(root / "recipe.yaml"), f"run_dir={root / name}", *settings]) == 0
    torch.set_num_threads(threads)
    return root


def events(directory: Path, name: str) -> list[dict[str, Any]]:
    """Those of a trace whose names begin so, by their beginning."""
    found = json.loads((directory / "trace.json").read_text())["traceEvents"]
    return sorted((e for e in found if e["name"].startswith(name) and e["ph"] == "X"), key=lambda e: e["ts"])


def test_the_trace_has_exactly_these_steps(runs: Path) -> None:
    steps = events(runs / "watched", "step ")
    assert [step["name"] for step in steps] == ["step 4", "step 5", "step 6", "step 7"], "as the records number them"
    updates = events(runs / "watched", "Optimizer.step#SGD")
    assert len(updates) == len(steps)
    for step, update in zip(steps, updates, strict=True):
        assert step["ts"] <= update["ts"]
        assert update["ts"] + update["dur"] <= step["ts"] + step["dur"]
    table = (runs / "watched" / "operators.txt").read_text()
    assert "aten::convolution_backward" in table
    assert "Self CPU" in table
    assert not (runs / "plain" / "trace.json").exists()


def test_the_weights_are_those_of_a_run_that_nothing_watches(runs: Path) -> None:
    states = [checkpoint.load_newest(runs / name, print)[1] for name in ("plain", "watched")]
    plain, watched = (state["model"] for state in states)
    assert plain.keys() == watched.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, watched[name]), name


@pytest.mark.skipif(not TENSORBOARD, reason="tensorboard is not installed")
def test_the_log_has_every_step(runs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(runs / "watched" / "tensorboard"), size_guidance={"scalars": 0})
    log.Reload()
    losses = [(r.step, r.loss) for r in read_records(runs / "watched" / "records.jsonl", (StepRecord,))]
    assert len(losses) == 10
    assert [(event.step, event.value) for event in log.Scalars("step/loss")] == [
        (step, torch.tensor(loss).item()) for step, loss in losses
    ]


def test_a_run_that_ends_within_the_steps_leaves_what_it_has(tmp_path: Path) -> None:
    """And one that resumes there profiles the rest."""
    for begins, ends, expected in ((0, 4, [3, 4]), (4, 9, [5]), (6, 9, [])):
        for file in tmp_path.iterdir():
            file.unlink()
        profiler = StepProfiler((2, 5), tmp_path, CPU, pytest.fail)
        for done in range(begins, ends):
            profiler.begin_step(done)
            torch.ones(3).sum()
            profiler.end_step(done + 1)
        profiler.begin_step(ends)  # and an error in it
        profiler.close()
        found = events(tmp_path, "step ") if (tmp_path / "trace.json").exists() else []
        names = [f"step {number}" for number in ([*expected, 5] if ends == 4 else expected)]
        assert [event["name"] for event in found] == names


def test_a_profile_after_the_run_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs / "recipe.yaml"), f"run_dir={runs / 'after'}", "profile.steps=[10,12]"]) == 2
    assert "must begin before the last of the run's 10 updates, got [10, 12]" in capsys.readouterr().err


def test_a_profile_that_cannot_be_written_costs_a_line(tmp_path: Path) -> None:
    lines: list[str] = []
    profiler = StepProfiler((0, 1), tmp_path / "gone", CPU, lines.append)
    profiler.begin_step(0)
    profiler.end_step(1)
    profiler.close()
    (line,) = lines
    assert line.startswith("profile.steps: the profile is not written (")


@pytest.mark.parametrize("steps", [(1,), (1, 2, 3), (2, 2), (3, 2), (-1, 2)])
def test_steps_are_two_increasing_numbers(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"profile\.steps must be two increasing numbers, .* got \["):
        ProfileSettings(steps)
    ProfileSettings((0, 1))
