"""The command plan: its figures against the run itself, and its arithmetic on given costs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from infomcr_dist import checkpoint, plan, train
from infomcr_dist.config.plan import PlanSettings
from infomcr_dist.doctor.memory import StepCost, Trial
from infomcr_dist.experiment import open_experiment
from infomcr_dist.records import StepRecord, read_records
from infomcr_dist.schedules import LearningRate, PenaltyWeight
from pipelines.options import load

RECIPE = """
model: cnn
epochs: 3
data: {path: DATA, augmentation: flip, backend: synthetic, train_images: 37, holdout_images: 8, global_batch_size: 8}
regularizer: {sub_batch_size: 4, beta: 5}
schedule: {milestones: [1.5]}
metric: {trials: 0}
telemetry: {port: null}
threads: 1
"""
BUDGET = ["regularizer.estimator=sampled", "regularizer.overhead_budget=1.5"]


@pytest.fixture
def recipe(small_data: Path, tmp_path: Path) -> str:
    """37 images: an epoch has four steps of 8, and one of 5, which does not split into sub-batches."""
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    return str(tmp_path / "tiny.yaml")


def test_the_figures_are_those_of_the_run(recipe: str, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert train.main([recipe, f"run_dir={tmp_path / 'run'}"]) == 0
    torch.set_num_threads(threads)
    assert plan.main([recipe, f"output={tmp_path / 'plan'}"]) == 0
    planned = json.loads((tmp_path / "plan.json").read_text())
    steps = list(read_records(tmp_path / "run" / "records.jsonl", (StepRecord,)))
    assert isinstance(steps[0], StepRecord)
    for phase in planned["phases"]:
        of_phase = [step for step in steps if step.phase == phase["phase"]]  # type: ignore[attr-defined]
        assert phase["steps"] == len(of_phase)
        assert phase["images"] == sum(step.global_samples for step in of_phase)  # type: ignore[attr-defined]
        assert phase["step_seconds"] > 0
        assert 10**8 < phase["memory_bytes"] < 10**10, "a process that has imported torch, and a small network"
    assert {phase["phase"] for phase in planned["phases"]} == {"plain", "regularized"}
    assert planned["steps"] == 15
    for path in checkpoint.newest_first(tmp_path / "run" / "checkpoints"):
        assert planned["checkpoint_bytes"] == pytest.approx(path.stat().st_size, rel=0.02)
    assert planned["checkpoints"] >= len(checkpoint.newest_first(tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["data.drop_last=true"],
        ["data.global_batch_size=20", "regularizer.sub_batch_size=5"],
        ["data.global_batch_size=64"],
        ["regularizer.when=always"],
        ["regularizer.when=never"],
        ["regularizer.when=from_epoch", "regularizer.epoch=2.9"],
        ["regularizer.when=from_epoch", "regularizer.epoch=1"],
        ["schedule.kind=cosine", "schedule.warmup_epochs=1", "schedule.milestones=[]"],
        ["schedule.kind=plateau", "schedule.patience=1", "schedule.milestones=[]"],
        ["schedule.kind=constant", "schedule.milestones=[]"],
        BUDGET,
    ],
    ids=str,
)
def test_the_steps_are_those_that_the_schedules_make(recipe: str, settings: list[str], gpus: int) -> None:
    """Counted one by one, as the trainer takes them."""
    config = load(PlanSettings, Path(recipe), settings)
    experiment = open_experiment(config, gpus)
    steps = experiment.sampler.steps
    rate = LearningRate(config.schedule, 1.0, config.epochs, steps)
    weight = PenaltyWeight(config.regularizer, config.schedule.warmup_epochs)
    expected: dict[bool, list[int]] = {}
    for epoch in range(config.epochs):
        for step in range(steps):
            batch = experiment.sampler.local_batch(epoch, step, 0, gpus)
            beta = weight.at(epoch + step / steps, rate.at(epoch + step / steps))
            on = beta is not None and experiment.num_penalized(batch, epoch * steps + step, None) is not None
            count = expected.setdefault(on, [0, 0])
            count[0], count[1] = count[0] + 1, count[1] + batch.global_size
        rate.end_epoch(epoch, training_loss=1.0)
    found = plan.count_steps(experiment)
    assert {phase: list(count) for phase, count in found.items()} == expected


def planned_with(recipe: str, monkeypatch: pytest.MonkeyPatch, *settings: str) -> plan.RunPlan:
    """A plan where a plain image takes a worker 0.5 s, and a regularized one 1 s."""

    def costs(trial: Trial, *_: Any) -> StepCost:
        return StepCost(trial.images * (0.5 if trial.penalty is None else 1.0), 10**9, 2 * 10**9)

    monkeypatch.setattr(plan, "try_step", costs)
    monkeypatch.setattr(plan, "checkpoint_bytes", lambda _: 10**6)
    config = load(PlanSettings, Path(recipe), list(settings))
    return plan.plan(open_experiment(config, config.gpus), "tiny")


def test_the_hours_are_those_of_all_steps(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, regularized = planned_with(recipe, monkeypatch, "gpus=2").phases
    # The rate drops in the middle of the second of three epochs: after 8 of 15 steps.
    assert (plain.steps, plain.images) == (8 + 2, 8 * 7 + 5 + 5 + 5)
    assert (regularized.steps, regularized.images) == (5, 40)
    assert (plain.step_seconds, plain.images_per_second) == (2.0, 4.0), "two workers of 4 images"
    assert (regularized.step_seconds, regularized.images_per_second) == (4.0, 2.0)
    assert plain.hours == pytest.approx(plain.images / 4 / 3600)
    assert regularized.hours == pytest.approx(40 / 2 / 3600)
    whole = planned_with(recipe, monkeypatch, *BUDGET)
    assert whole.phases[1].images_per_second == pytest.approx(2 / 1.5), "one worker, at the budget"
    assert whole.hours == pytest.approx(sum(phase.hours for phase in whole.phases))
    assert any("overhead_budget=1.5" in note for note in whole.notes)


def test_the_table_shows_what_it_does_not_count(
    recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned_with(recipe, monkeypatch)  # the costs stay in place
    assert plan.main([recipe, "gpus=2", "schedule.kind=plateau", "schedule.patience=1", "schedule.milestones=[]"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("tiny: cnn, 3 epochs of 5 steps of 8 images; 2 × ")
    assert "not counted: reading images, exchanging gradients" in output
    assert "plateau as early as it can" in output
    assert "a checkpoint has 1.0 MB; at most 4 at once, 0.00 GB" in output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["gpus=0"], "gpus must be at least 1, got 0"),
        (["gpus=16"], "data.global_batch_size must be at least the number of workers, got 8 and 16"),
        (["gpu=2"], "unknown setting gpu: the nearest known one is gpus"),
        (["data.path=nowhere"], "nowhere"),
        ([], "a plain step of 8 images does not fit"),
    ],
)
def test_a_mistake_is_one_line(
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    message: str,
) -> None:
    def does_not_fit(trial: Trial, *_: Any) -> StepCost:
        raise ValueError(f"{trial} does not fit the memory")

    monkeypatch.setattr(plan, "try_step", does_not_fit)
    assert plan.main([recipe, *settings]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
