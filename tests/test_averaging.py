"""Averaged weights: against the average of a run's own checkpoints, torch's update_bn, and an uninterrupted run."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import infomcr_dist.train
from infomcr_dist import checkpoint, measure, report
from infomcr_dist.config import Config
from infomcr_dist.evaluate import evaluate, recompute_statistics
from infomcr_dist.records import EvaluationRecord, MetricRecord
from infomcr_dist.run import Run
from infomcr_dist.state import Committed, newest_committed
from infomcr_dist.step import StepResult, train_step
from infomcr_dist.telemetry import _Prometheus
from infomcr_dist.train import main
from infomcr_dist.world import SingleProcess, UserError
from pipelines import Batch, LocalBatch, Split, open_dataset
from pipelines.options import load
from pipelines.random_streams import Stream, permutation

RECIPE = """
model: test_averaging:tiny
epochs: 3
threads: 1
data: {path: DATA, backend: synthetic, global_batch_size: 64}
schedule: {kind: constant}
regularizer: {when: never}
averaging: {start_epoch: 1, statistics_images: 120}
evaluation: {batch_size: 40, train_every_epochs: 1}
metric: {every_epochs: 1, trials: 2, samples: 20}
checkpoint: {every_steps: 1, keep: 99}
telemetry: {port: null}
"""
STEPS = 5  # an epoch
BAD = 7  # the step whose loss is not finite


def tiny(classes: int, image_size: int) -> nn.Module:
    features = 4 * (image_size - 2) ** 2
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(features, classes),
    )
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Callable[..., Path]:
    """Trains once for each list of overrides, in one process."""
    root = tmp_path_factory.mktemp("averaging")
    (root / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))

    def train(name: str, *overrides: str) -> Path:
        assert main([str(root / "recipe.yaml"), f"run_dir={root / name}", *overrides]) == 0
        return root / name

    return train


@pytest.fixture(scope="module", params=["ema", "swa"])
def run(request: pytest.FixtureRequest, runs: Callable[..., Path]) -> tuple[str, Path]:
    """A run in which one step is skipped."""

    def one_bad(*arguments: Any, **settings: Any) -> StepResult:
        nonlocal calls
        calls += 1
        *others, (images, labels) = arguments
        return train_step(*others, (images * (math.inf if calls == BAD else 1.0), labels), **settings)

    calls = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infomcr_dist.train, "train_step", one_bad)
        return request.param, runs(request.param, f"averaging.kind={request.param}", "averaging.decay=0.7")


def states(run: Path) -> dict[int, dict[str, Any]]:
    """By step."""
    found = map(checkpoint.load, reversed(checkpoint.newest_first(run / "checkpoints")))
    return {state["step"]: state for state in found}


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "records.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_the_average_is_that_of_the_runs_checkpoints(run: tuple[str, Path]) -> None:
    kind, path = run
    found = states(path)
    assert [r["step"] for r in records(path, "step") if not r["finite"]] == [BAD]
    for name in ("0.weight", "5.bias"):
        weights = {step: state["model"][name].double() for step, state in found.items()}
        if kind == "swa":
            average = (weights[2 * STEPS] + weights[3 * STEPS]) / 2
        else:
            steps = [step for step in range(STEPS + 1, 3 * STEPS + 1) if step != BAD]
            average = weights[steps[0]]
            for step in steps[1:]:
                average = 0.7 * average + 0.3 * weights[step]
        torch.testing.assert_close(
            found[3 * STEPS]["average"][f"module.{name}"].double(), average, rtol=1e-6, atol=1e-7
        )
        assert not torch.equal(weights[3 * STEPS].float(), found[3 * STEPS]["average"][f"module.{name}"])
    assert int(found[3 * STEPS]["average"]["n_averaged"]) == (2 if kind == "swa" else 2 * STEPS - 1)
    assert int(found[STEPS]["average"]["n_averaged"]) == 0


def test_it_is_evaluated_and_measured_beside_the_weights(run: tuple[str, Path], small_data: Path) -> None:
    _, path = run
    for kind, count in (("evaluation", 2), ("metric", 1)):
        for weights, epochs in (("current", [1, 2, 3]), ("averaged", [2, 3])):
            found = [r["epoch"] for r in records(path, kind) if r["weights"] == weights]
            assert found == [epoch for epoch in epochs for _ in range(count)], (kind, weights)
    losses = {r["weights"]: r["loss"] for r in records(path, "evaluation") if (r["epoch"], r["split"]) == (3, "test")}
    gammas = {r["weights"]: r["gamma_hat"] for r in records(path, "metric") if r["epoch"] == 3}
    assert losses["current"] != losses["averaged"]
    assert gammas["current"] != gammas["averaged"]
    network = tiny(6, 16)
    checkpoint.restore_weights(network, states(path)[3 * STEPS], path, averaged=True)
    config = load(Config, path / "config.yaml", [])
    world, dataset = SingleProcess(), open_dataset(small_data)
    experiment = infomcr_dist.run.open_experiment(config, 1)
    loader = infomcr_dist.run.open_loader(dataset.splits["test"], experiment.eval_loader_config(world, 40))
    assert evaluate(network, loader, dataset.splits["test"], 40, world).loss == pytest.approx(losses["averaged"])


def test_measure_takes_either(run: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, path = run
    for weights in ("current", "averaged"):
        few = ["trials=2", "samples=20", "images=40", "threads=1", "batch_size=40", f"output={tmp_path / weights}"]
        assert measure.main([str(path), f"weights={weights}", "model=test_averaging:tiny", *few]) == 0
        (row,) = json.loads((tmp_path / f"{weights}.json").read_text())["checkpoints"]
        (loss,) = [
            r["loss"]
            for r in records(path, "evaluation")
            if (r["epoch"], r["split"], r["weights"]) == (3, "test", weights)
        ]
        assert row["test"]["loss"] == pytest.approx(loss)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(kind: str, runs: Callable[..., Path]) -> None:
    """From within an epoch, from the end of its steps, before what follows them, and after it."""
    whole = runs(f"whole-{kind}", f"averaging.kind={kind}")
    final = states(whole)[3 * STEPS]
    without = runs(f"without-{kind}", "averaging.start_epoch=0", "metric.trials=0")
    assert_same(states(without)[3 * STEPS]["model"], final["model"])  # training does not see it
    for step in (STEPS + 3, 2 * STEPS):
        part = runs(
            f"part-{kind}-{step}", f"averaging.kind={kind}", "checkpoint.keep=1", f"resume={of_step(whole, step)}"
        )
        last = states(part)[3 * STEPS]
        assert_same(last["average"], final["average"])
        assert_same(last["model"], final["model"])
        for record in ("evaluation", "metric"):
            a, b = (
                [{k: v for k, v in r.items() if "seconds" not in k} for r in records(one, record) if r["epoch"] == 3]
                for one in (whole, part)
            )
            assert a == b


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_run_that_ends_between_an_epochs_steps_and_its_evaluation_is_resumed_too(
    kind: str, runs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(run: Run, *others: Any) -> None:
        if run.state.step == 2 * STEPS:
            raise UserError("ended")

    monkeypatch.setattr(infomcr_dist.train, "assess_average", ended)
    overrides = f"averaging.kind={kind}", "checkpoint.every_steps=null"
    with pytest.raises(AssertionError):
        runs(f"cut-{kind}", *overrides)
    monkeypatch.undo()
    cut = runs(f"cut-{kind}", *overrides, "resume=auto")
    assert_same(states(cut)[3 * STEPS]["average"], states(runs(f"uncut-{kind}", *overrides))[3 * STEPS]["average"])


def test_another_kind_of_average_begins_anew(runs: Callable[..., Path]) -> None:
    """Where a run is resumed with it: of one epoch's end, the mean is the weights there."""
    begun = runs("begun", "averaging.kind=ema")
    resume = f"resume={of_step(begun, 2 * STEPS)}", "allow_config_change=true"
    last = states(runs("other", "averaging.kind=swa", *resume))[3 * STEPS]
    assert last["average"]["n_averaged"] == 1
    for name, tensor in last["model"].items():
        if tensor.is_floating_point() and "running" not in name:
            assert torch.equal(last["average"][f"module.{name}"], tensor), name


def of_step(run: Path, step: int) -> Path:
    (path,) = (run / "checkpoints").glob(f"step-{step:08d}-*.pt")
    return path


def test_a_committed_state_carries_the_average(run: tuple[str, Path]) -> None:
    """What an elastic run resumes from."""
    _, path = run
    state = states(path)[3 * STEPS - 1]
    committed = newest_committed(Committed(path, state), tiny(6, 16), SingleProcess())
    assert committed is not None
    assert_same(committed.state["average"], state["average"])


class Loader:
    """Images in memory, by their ids."""

    skipped: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.read: list[np.ndarray] = []

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        for batch in local_batches:
            self.read.append(batch.samples)
            yield batch, self.images[batch.samples], torch.zeros(len(batch.samples), dtype=torch.int64)

    def close(self) -> None: ...


class OneOf(SingleProcess):
    """A worker of several, before they average."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def deep() -> nn.Module:
    torch.manual_seed(3)
    first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.Flatten(), nn.Linear(5 * 4, 2))


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_statistics_are_those_of_torch_at_any_number_of_workers(workers: int, small_data: Path) -> None:
    split: Split = open_dataset(small_data).splits["train"]
    images = torch.randn(len(split), 3, 6, 6) * 2 + 1
    expected = deep().train()
    ids = permutation(Stream.AVERAGE_STATISTICS, len(split), 7)[:90]
    update_bn([images[ids[i : i + 20]] for i in range(0, 80, 20)], expected)  # 10 of 90 make no whole batch
    found = []
    for rank in range(workers):
        model, loader = deep().train(), Loader(images)
        recompute_statistics(model, loader, split, 90, 20, 7, OneOf(rank, workers))
        assert model.training
        assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1, 0.3]
        found.append(model.state_dict())
    for name, value in expected.state_dict().items():
        if "running" in name:
            mean = torch.stack([state[name] for state in found]).mean(0)
            torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-6, msg=name)
        elif "tracked" not in name:
            assert all(torch.equal(state[name], value) for state in found), "nothing else changes"


def test_fewer_images_than_a_batch_and_networks_without_batch_norm(small_data: Path) -> None:
    split = open_dataset(small_data).splits["train"]
    images = torch.randn(len(split), 3, 6, 6)
    model, expected = deep(), deep().train()
    recompute_statistics(model, Loader(images), split, 10, 20, 0, SingleProcess())
    update_bn([images[permutation(Stream.AVERAGE_STATISTICS, len(split), 0)[:10]]], expected)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    plain, loader = nn.Linear(3, 2), Loader(images)
    before = copy.deepcopy(plain.state_dict())
    recompute_statistics(plain, loader, split, 10, 20, 0, SingleProcess())
    assert_same(plain.state_dict(), before)
    assert not loader.read


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["averaging.kind=ema", "averaging.start_epoch=10"],
            "averaging.start_epoch must be less than epochs, got 10 and",
        ),
        (["averaging.decay=1"], r"averaging.decay must be in \[0, 1\), got 1.0"),
        (["averaging.kind=mean"], "averaging.kind must be one of none, ema, swa, got 'mean'"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(Config, None, overrides)


def test_a_checkpoint_without_an_average_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="weights: x has no averaged weights: give weights=current, or train with"):
        checkpoint.restore_weights(tiny(6, 16), {"model": {}, "average": None}, Path("x"), averaged=True)


def test_the_report_and_the_endpoint_keep_the_two_apart(run: tuple[str, Path]) -> None:
    _, path = run
    one = report.read(path)
    text = report.page([one], report.draw([one]))
    telemetry = _Prometheus(1, torch.device("cpu"), {"rank": "0"}, {"model": "tiny"})
    last: dict[str, float] = {}
    for record in one.records:
        telemetry.log(record)
        if isinstance(record, EvaluationRecord | MetricRecord) and getattr(record, "split", "test") == "test":
            last[f"{record.kind} {record.weights}"] = getattr(record, "top1_error_ratio", None) or record.gamma_hat
    for name, value in (
        ("test top-1 error", f"{last['evaluation current']:.2%}"),
        ("test top-1 error, averaged", f"{last['evaluation averaged']:.2%}"),
        ("γ̂", f"{last['metric current']:.1f}"),
        ("γ̂, averaged", f"{last['metric averaged']:.1f}"),
    ):
        assert f"<td>{name}</td><td>{value}</td>" in text
    epochs = one.series(MetricRecord, "gamma_hat").epochs
    assert len(epochs) == len(set(epochs)), "one value an epoch"
    for weights, prefix in (("current", "infomcr_"), ("averaged", "infomcr_averaged_")):
        error = telemetry.registry.get_sample_value(f"{prefix}top1_error_ratio", {"split": "test"})
        assert error == last[f"evaluation {weights}"]
        assert telemetry.registry.get_sample_value(f"{prefix}gamma_hat") == last[f"metric {weights}"]
