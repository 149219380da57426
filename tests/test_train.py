"""Whole jobs: `python -m infomcr_dist.train` on two workers, watched, resumed, compared, and given bad input."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENGINES, WORKERS, launch, of_engine
from torch import nn

from benchmarks.chaos import free_ports
from infomcr_dist import checkpoint
from infomcr_dist.config import Config
from infomcr_dist.experiment import measured_images, plan_steps, select_splits
from infomcr_dist.run_lock import PidFile, lock_run
from infomcr_dist.step import PenaltySettings, train_step
from infomcr_dist.train import main
from infomcr_dist.world import SingleProcess
from pipelines import Split, open_dataset
from pipelines.options import load

RECIPE = """
model: resnet20
epochs: 4
data: {path: DATA, augmentation: crop1_flip, global_batch_size: 64}
schedule: {milestones: [2]}
optimizer: {learning_rate: 0.05, weight_decay: 5e-4, decay_norm_and_bias: false, clip_gradient_norm: 5}
regularizer: {sub_batch_size: 8, beta: 5}
metric: {trials: 4, samples: 8, every_epochs: 2}
evaluation: {train_every_epochs: 2}
checkpoint: {keep: 4}
threads: 1
"""
STEPS = 5  # an epoch: 260 images in global batches of 64, the last one of 4


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "records.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    _, state = checkpoint.load_newest(run, print)
    optimizer = {f"{name} {k}": v[name] for k, v in state["optimizer"]["state"].items() for name in v}
    return state["model"] | optimizer | {f"average {name}": v for name, v in (state["average"] or {}).items()}


def history(run: Path) -> list[tuple[Any, ...]]:
    """What the records say, without times."""
    kinds = {"step": ("loss", "penalty", "gradient_norm"), "evaluation": ("split", "loss"), "epoch": ("training_loss",)}
    return [(kind, r["step"], *(r[f] for f in fields)) for kind, fields in kinds.items() for r in records(run, kind)]


class Scraper(threading.Thread):
    """Reads the endpoints over and over, as Prometheus would, and keeps what each said last."""

    def __init__(self, ports: list[int]) -> None:
        super().__init__(daemon=True)
        self.ports, self.last, self.done = ports, dict[int, str](), threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.05):
            for port in self.ports:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=1) as answer:
                        self.last[port] = answer.read().decode()
                except OSError:
                    continue


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    root = tmp_path_factory.mktemp("jobs")
    (root / "recipe.yaml").write_text(RECIPE.replace("DATA", str(small_data)))
    return root


@pytest.fixture(scope="module")
def job(folder: Path) -> dict[str, Any]:
    """One run on two workers, scraped all along."""
    port = free_ports(2)
    scraper = Scraper([port, port + 1])
    scraper.start()
    command = [sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", "run_dir=first", f"telemetry.port={port}"]
    result = launch(2, *command, cwd=folder)
    scraper.done.set()
    scraper.join()
    assert result.returncode == 0, result.stdout + result.stderr
    return {"run": folder / "first", "output": result.stdout, "scraped": [scraper.last[port], scraper.last[port + 1]]}


def test_the_regularizer_is_switched_on_at_the_first_drop(job: dict[str, Any]) -> None:
    steps = records(job["run"], "step")
    assert [s["step"] for s in steps] == list(range(1, 4 * STEPS + 1))
    rates = [s["learning_rate"] for s in steps]
    assert rates == pytest.approx([0.05] * 2 * STEPS + [0.005] * 2 * STEPS)
    # The last global batch has 4 images, 2 a worker: no whole sub-batch of 8, so its step is plain.
    late = ["regularized"] * (STEPS - 1) + ["plain"]
    assert [s["phase"] for s in steps] == ["plain"] * 2 * STEPS + late * 2
    assert all((s["penalty"] is not None and s["penalty"] > 0) == (s["phase"] == "regularized") for s in steps)
    assert [s["samples"] for s in steps] == ([32] * (STEPS - 1) + [2]) * 4


def test_the_parts_of_a_step_make_up_the_step(job: dict[str, Any]) -> None:
    parts = ("data_wait_seconds", "gradient_seconds", "allreduce_wait_seconds", "update_seconds")
    steps = records(job["run"], "step")
    whole = sum(s["step_duration_seconds"] for s in steps)
    assert 0.95 * whole < sum(s[part] for s in steps for part in parts) < whole
    for step in steps:
        assert all(step[part] > 0 for part in parts)
        assert (step["penalty_duration_seconds"] is not None) == (step["phase"] == "regularized")
    gradients = sum(p.numel() * 4 for n, p in weights(job["run"]).items() if n.startswith("momentum_buffer"))
    assert {s["allreduce_bytes"] for s in steps} == {gradients}


def test_what_the_console_shows(job: dict[str, Any]) -> None:
    output = job["output"]
    assert re.search(
        r"regularizer on in epoch 3, at rate 0\.005: fused, α 0\.0001, β 5, 4 sub-batches of 8 images", output
    )
    for epoch in range(1, 5):
        assert len(re.findall(rf"epoch {epoch}/4: training loss \d", output)) == 1, "rank 0 alone prints"
    for row in (r"top-1 +\d+\.\d+%", r"top-5 +\d+\.\d+%", r"metric γ̂ +-?\d+\.\d ± \d", r"plain step, median +\d",
                r"regularized step, median +\d", r"regularized / plain +\d", r"run directory first/"):  # fmt: skip
        assert re.search(row, output), f"{row} in\n{output}"


def test_the_records_hold_every_evaluation(job: dict[str, Any]) -> None:
    evaluations = {(r["epoch"], r["split"]): r for r in records(job["run"], "evaluation")}
    assert evaluations.keys() == {(e, "test") for e in range(1, 5)} | {(2, "train"), (4, "train")}
    assert all(r["samples"] == (70 if split == "test" else 260) for (_, split), r in evaluations.items())
    counts = [r["top1_error_ratio"] * r["samples"] for r in evaluations.values()]
    assert counts == pytest.approx([round(c) for c in counts]), "whole images, at any number of workers"
    assert [r["epoch"] for r in records(job["run"], "metric")] == [2, 4]
    assert evaluations[4, "test"]["top1_error_ratio"] < 0.5, "chance is 0.83"


def test_every_rank_exports_its_metrics(job: dict[str, Any]) -> None:
    for text in job["scraped"]:
        value = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
        assert value["infomcr_world_size"] == 2
        assert value['infomcr_steps_total{phase="plain"}'] >= 2 * STEPS
        count = value['infomcr_step_duration_seconds_count{phase="plain"}']
        assert count == value['infomcr_steps_total{phase="plain"}']
        assert value["infomcr_data_wait_seconds_count"] >= count
        for name in (
            "samples_total",
            "loss",
            "learning_rate",
            "gradient_norm",
            "penalty",
            "gamma_hat",
            "gamma_hat_standard_error",
            "regularizer_active",
        ):
            assert f"infomcr_{name}" in value


def test_promtool_finds_nothing_to_say(job: dict[str, Any], promtool: Path) -> None:
    for text in job["scraped"]:
        result = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(job: dict[str, Any], folder: Path) -> None:
    """Also one that was begun on another engine."""
    shutil.copytree(job["run"], folder / "second")
    for late in checkpoint.newest_first(folder / "second" / "checkpoints")[:2]:
        late.unlink()
    command = [sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", "run_dir=second", "resume=auto"]
    result = launch(2, *command, "telemetry.port=null", cwd=folder, engine=ENGINES[-1])
    assert result.returncode == 0, result.stdout + result.stderr
    whole, resumed = weights(job["run"]), weights(folder / "second")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert history(folder / "first") == history(folder / "second"), "each step and event stands once in the records"


def test_one_two_and_three_workers_take_the_same_steps(folder: Path) -> None:
    """The same global batches, augmentation included, whatever the world size: losses agree to float32's rounding."""
    losses = []
    for workers in (1, 2, 3):
        run = folder / f"workers-{workers}"
        command = [
            sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", f"run_dir={run}", "telemetry.port=null",
            "epochs=3", "model=plain_net:build", "data.global_batch_size=48", "metric.trials=2",
        ]  # fmt: skip
        if workers == 1:
            path = {"PYTHONPATH": str(WORKERS)}
            result = subprocess.run(
                command, cwd=folder, env=os.environ | path, capture_output=True, text=True, check=False
            )
        else:
            engine = of_engine("torch" if workers == 2 else "horovod")
            result = launch(workers, "env", f"PYTHONPATH={WORKERS}", *command, cwd=folder, engine=engine)
        assert result.returncode == 0, result.stdout + result.stderr
        epochs = [r["training_loss"] for r in records(run, "epoch")]
        tests = [(r["loss"], r["top1_error_ratio"]) for r in records(run, "evaluation")]
        gammas = [r["gamma_hat"] for r in records(run, "metric")]
        losses.append((epochs, tests, gammas))
    for other in losses[1:]:
        assert other[0] == pytest.approx(losses[0][0], rel=1e-5)
        assert [loss for loss, _ in other[1]] == pytest.approx([loss for loss, _ in losses[0][1]], rel=1e-5)
        assert other[2] == pytest.approx(losses[0][2], rel=1e-3)


def test_an_overhead_budget_in_mixed_precision(folder: Path) -> None:
    """Workers draw the same counts and end together; what is exported is what was measured."""
    run = folder / "budget"
    result = launch(
        2, sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", f"run_dir={run}", "telemetry.port=null",
        "epochs=8", "schedule.milestones=[1]", "regularizer.estimator=sampled",
        "regularizer.overhead_budget=1.5", "precision=bf16", "metric.trials=0", cwd=folder, engine="torch",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    steps = records(run, "step")
    assert [s["num_penalized"] for s in steps[:STEPS]] == [None] * STEPS
    # 4 sub-batches a worker; the last, smaller batch of an epoch does not split.
    whole = [s["num_penalized"] for s in steps[STEPS:] if s["samples"] == 32]
    assert set(whole) <= set(range(5))
    assert len(set(whole)) > 1
    assert all((s["phase"] == "regularized") == bool(s["num_penalized"]) for s in steps)
    settings = records(run, "overhead_budget")
    assert len(settings) == 1
    assert settings[0]["overhead_ratio"] > 0


@pytest.mark.parametrize("backend", ["torch", "webdataset", "synthetic"])
def test_every_backend_trains(here: Path, backend: str) -> None:
    arguments = [
        "recipe.yaml", "telemetry.port=null", "metric.trials=2", "epochs=3", f"run_dir={backend}",
        f"data.backend={backend}", "regularizer.finite_difference_error_every_steps=2",
    ]  # fmt: skip
    if backend == "webdataset":  # leaves files open where an epoch ends before its shards do
        command = [sys.executable, "-m", "infomcr_dist.train", *arguments]
        subprocess.run(command, check=True, capture_output=True)
    else:
        assert main(arguments) == 0
    run = here / backend
    assert [s["samples"] for s in records(run, "step")] == [64, 64, 64, 64, 4] * 3
    assert len(records(run, "evaluation")) == 5
    ratios = [r["finite_difference_error"] for r in records(run, "finite_difference")]
    assert len(ratios) == 2
    assert all(ratio > 0 for ratio in ratios)


# Bad input: one process, in this one, unless it takes several.


def train(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Run with a mistake; returns the line printed."""
    before = sorted(folder.rglob("*"))
    assert main(["recipe.yaml", "telemetry.port=null", *arguments]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert sorted(folder.rglob("*")) == before, "nothing is left behind"
    return lines[0]


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of its own with the recipe, and the process's thread count restored."""
    shutil.copy(folder / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=nowhere"], "nowhere"),
        (["optimizer.momentun=0.9"], "unknown setting optimizer.momentun: the nearest known one is optimizer.momentum"),
        (["regularizer.sub_batch_size=7"], "regularizer.sub_batch_size must divide the global batch, got 7 and 64"),
        (
            ["regularizer.sub_batch_size=null", "regularizer.sub_batches=7"],
            "sub_batches must divide every worker's share of the global batch, got 7, 64 images and 1 workers",
        ),
        (
            ["regularizer.estimator=sampled", "regularizer.num_sampled=9"],
            "regularizer.num_sampled must be at most the number of sub-batch",
        ),
        (["model=resnet21"], "resnet20"),
        (["resume=nowhere"], "resume: there is no checkpoint at nowhere"),
        (["data.augmentation=flop"], "flop"),
        (["other.yaml"], "give one recipe, then key=value settings, got recipe.yaml other.yaml"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in train(here, capsys, *arguments)


def test_a_recipe_that_does_not_exist(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.yaml"]) == 2
    assert "error: recipe nowhere.yaml does not exist" in capsys.readouterr().err


def test_a_port_in_use(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Perhaps by a worker of a lost launcher, which ends soon: try again."""
    port = free_ports()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        line = train(here, capsys, f"telemetry.port={port}", code=75)
    assert f"port {port} on 127.0.0.1 is in use" in line
    line = train(here, capsys, f"telemetry.port={port}", "telemetry.address=192.0.2.1")
    assert f"port {port} on 192.0.2.1 cannot be used" in line, "which stays so"


def test_a_worker_that_is_alive(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = PidFile("ranks", 0)
    other.write()
    assert "rank-0.pid is that of a worker that is alive" in train(here, capsys, "pid_dir=ranks", code=75)
    assert (here / "ranks" / "rank-0.pid").read_text() == f"{os.getpid()}\n"
    other.remove()


def test_a_run_directory_that_holds_a_run(here: Path, capsys: pytest.CaptureFixture[str], job: dict[str, Any]) -> None:
    assert "holds a run already: resume it with resume=auto" in train(here, capsys, f"run_dir={job['run']}")


def test_a_run_directory_in_use(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine").mkdir()
    held = lock_run(here / "mine")
    assert f"run_dir mine is in use by process {os.getpid()} on" in train(here, capsys, "run_dir=mine", code=75)
    os.close(held)


def test_a_finished_run_ends_well(here: Path, capsys: pytest.CaptureFixture[str], job: dict[str, Any]) -> None:
    """A Job restarts its launcher whatever it did before: with resume=auto that must end."""
    assert main(["recipe.yaml", "telemetry.port=null", f"run_dir={job['run']}", "resume=auto"]) == 0
    assert "has completed all of its 4 epochs: nothing is left to do" in capsys.readouterr().err


def test_resume_with_other_settings(here: Path, capsys: pytest.CaptureFixture[str], job: dict[str, Any]) -> None:
    line = train(here, capsys, f"resume={job['run']}", "run_dir=other", "epochs=6", "model=wrn_18_1_5", "seed=3")
    assert "was trained with other settings: model=wrn_18_1_5 (checkpoint: resnet20), seed=3 (checkpoint: 0)" in line
    line = train(here, capsys, f"resume={job['run']}", "run_dir=other")
    assert "has completed all of its 4 epochs" in line


def test_a_checkpoint_of_before_there_was_a_setting(
    here: Path, capsys: pytest.CaptureFixture[str], job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was trained with the setting's default."""
    load_newest = checkpoint.load_newest

    def load_older(*arguments: Any) -> tuple[Path, dict[str, Any]]:
        path, state = load_newest(*arguments)
        for name in ("regularizer.method", "optimizer.kind", "averaging.kind", "frozen"):
            del state["settings"][name]
        del state["average"]
        return path, state

    monkeypatch.setattr(checkpoint, "load_newest", load_older)
    line = train(here, capsys, f"resume={job['run']}", "run_dir=other", "epochs=6", "optimizer.kind=adamw")
    assert "was trained with other settings: optimizer.kind=adamw (checkpoint: sgd): give" in line
    line = train(here, capsys, f"resume={job['run']}", "run_dir=other")
    assert "has completed all of its 4 epochs" in line


def test_broken_shards(here: Path, capsys: pytest.CaptureFixture[str], small_data: Path) -> None:
    def broken(name: str) -> Path:
        shutil.copytree(small_data, here / name)
        return here / name

    shard = next(iter(sorted((broken("gone") / "train").glob("*.tar"))))
    shard.unlink()
    assert shard.name in train(here, capsys, "data.path=gone")
    shard = next(iter(sorted((broken("empty") / "train").glob("*.tar"))))
    shard.write_bytes(b"")
    assert shard.name in train(here, capsys, "data.path=empty")
    shard = next(iter(sorted((broken("text") / "train").glob("*.tar"))))
    shard.write_bytes(b"not a tar " * (shard.stat().st_size // 10) + b"x" * (shard.stat().st_size % 10))
    (here / "text" / "manifest.json").unlink()
    assert shard.name in train(here, capsys, "data.path=text")
    (here / "bare").mkdir()
    assert "bare" in train(here, capsys, "data.path=bare")


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["telemetry.port=null", "metric.trials=0", "epochs=3", "run_dir=run", "max_nonfinite_steps=4"]
    assert main(["recipe.yaml", *settings, "optimizer.learning_rate=1e38", "optimizer.clip_gradient_norm=null"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert re.match(
        r"error: step \d+ was skipped: not finite: loss of rank 0; so were the 3 before it \(rate 1e\+38\)", lines[0]
    )
    steps = records(here / "run", "step")
    assert [s["finite"] for s in steps[-5:]] == [True, False, False, False, False]


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = torch.randn(8, 3, 6, 6), torch.randint(3, (8,))
    images[0, 0, 0, 0] = math.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    penalty = PenaltySettings(alpha=1e-4, beta=1.0, sub_batch_size=4)
    for settings in (None, penalty):
        result = train_step(
            model, nn.CrossEntropyLoss(), optimizer, SingleProcess(), (images, labels), loss_scale=1.0, penalty=settings
        )
        assert not result.finite
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name


def test_more_workers_than_images(small_data: Path) -> None:
    split = open_dataset(small_data).splits["train"]
    config = load(Config, None, ["data.batch_size=4", "regularizer.sub_batches=2"])
    with pytest.raises(ValueError, match="has 260 training images, fewer than the 300 workers"):
        plan_steps(config, split, workers=300)
    config = load(Config, None, ["data.global_batch_size=8", "regularizer.sub_batches=2"])
    with pytest.raises(ValueError, match="sub_batches must divide every worker's share of the global batch"):
        plan_steps(config, split, workers=3)
    with pytest.raises(ValueError, match="global_batch_size must be at least the number of workers, got 8 and 16"):
        plan_steps(config, split, workers=16)


def test_a_held_out_part_shares_no_image_with_the_rest(small_data: Path) -> None:
    dataset = open_dataset(small_data)

    def places(*overrides: str) -> dict[str, set[tuple[int, int]]]:
        config = load(Config, None, ["data.batch_size=4", *overrides])
        splits = select_splits(config, dataset)
        return {
            name: set(zip(s.index["shard"].tolist(), s.index["offset"].tolist(), strict=True))
            for name, s in splits.items()
        }

    some = places("data.holdout_images=60", "data.train_images=150")
    assert (len(some["train"]), len(some["test"])) == (150, 60)
    assert not some["train"] & some["test"]
    assert places("data.holdout_images=60", "data.train_images=150") == some
    assert places("data.holdout_images=60", "data.train_images=150", "seed=1") != some
    assert places("data.holdout_images=60")["train"] > some["train"]
    with pytest.raises(ValueError, match="at most the 260 training images together, got 201, 0 and 60"):
        places("data.holdout_images=60", "data.train_images=201")


def test_the_confusion_set_is_beside_the_training_images_with_random_labels(small_data: Path) -> None:
    dataset = open_dataset(small_data)

    def train(*overrides: str) -> tuple[Split, Config]:
        config = load(Config, None, ["data.batch_size=4", "data.train_images=100", *overrides])
        return select_splits(config, dataset)["train"], config

    whole = {(int(e["shard"]), int(e["offset"])): int(e["label"]) for e in dataset.splits["train"].index}
    alone, _ = train()
    both, config = train("data.confusion_images=120")
    assert (both.index[:100] == alone.index).all()
    places = list(zip(both.index["shard"].tolist(), both.index["offset"].tolist(), strict=True))
    assert len(set(places)) == 220
    own = np.array([whole[place] for place in places])
    assert (both.labels[:100] == own[:100]).all()
    assert 5 < (both.labels[100:] == own[100:]).sum() < 40  # a sixth of 120 by chance
    assert (measured_images(config, both).index == alone.index).all()
    assert (train("data.confusion_images=120")[0].index == both.index).all()
    assert (train("data.confusion_images=120", "seed=1")[0].labels != both.labels).any()
    with pytest.raises(ValueError, match="together, got 100, 161 and 0"):
        train("data.confusion_images=161")
    with pytest.raises(ValueError, match=r"confusion_images needs data\.train_images"):
        train("data.confusion_images=10", "data.train_images=null")


def test_a_mistake_on_two_workers_is_reported_once(folder: Path) -> None:
    result = launch(2, sys.executable, "-m", "infomcr_dist.train", "recipe.yaml", "epoch=3", cwd=folder)
    output = result.stdout + result.stderr
    assert result.returncode == 2
    assert output.count("error: unknown setting epoch: the nearest known one is epochs") == 1
    assert "[0]<stderr>:Traceback" not in output
    assert "[1]<stderr>:Traceback" not in output
