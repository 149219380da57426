"""The measure command on a real checkpoint: against its definition, and the same at any number of workers."""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import launch
from torch.nn import functional as F

from infomcr_dist import checkpoint, models
from infomcr_dist.config import Config
from infomcr_dist.measure import main, penalty_share
from infomcr_dist.train import main as train
from infomcr_dist.world import SingleProcess
from pipelines import LoaderConfig, LocalBatch, evaluation_batches, open_dataset, open_loader
from pipelines.options import load
from pipelines.random_streams import Stream, generator, permutation

TRIALS, SAMPLES = 5, 12
SETTINGS = [f"trials={TRIALS}", f"samples={SAMPLES}", "images=60", "threads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_data: Path) -> Path:
    """Two trained runs: a long one and a short one."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text(
        f"data: {{path: {small_data}, global_batch_size: 32}}\n"
        "regularizer: {when: never}\nschedule: {kind: cosine}\n"
        "metric: {trials: 0}\ntelemetry: {port: null}\nthreads: 1\n"
    )
    threads = torch.get_num_threads()
    for name, epochs in (("long", 2), ("short", 1)):
        assert train([str(folder / "recipe.yaml"), f"run_dir={folder / name}", f"epochs={epochs}"]) == 0
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def measured(runs: Path) -> dict[str, Any]:
    assert main([str(runs / "short"), str(runs / "long"), *SETTINGS, f"output={runs / 'one'}"]) == 0
    results: dict[str, Any] = json.loads((runs / "one.json").read_text())
    return results


def test_checkpoints_are_ranked_by_gamma(measured: dict[str, Any], runs: Path) -> None:
    gammas = [row["curvature"]["gamma_hat"]["mean"] for row in measured["checkpoints"]]
    assert len(gammas) == 2
    assert gammas == sorted(gammas)
    assert (runs / "one.png").read_bytes().startswith(b"\x89PNG")


def test_every_checkpoint_is_opened_before_the_first_is_measured(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("infomcr_dist.measure.measure", lambda *_: pytest.fail("one was measured"))
    assert main([str(runs / "short"), str(tmp_path / "none"), *SETTINGS, f"output={tmp_path / 'one'}"]) == 2
    assert "none" in capsys.readouterr().err


def test_gamma_is_its_definition(measured: dict[str, Any], runs: Path, small_data: Path) -> None:
    """Eq. 6 with one backward a sample, in float64, on the images the trials name."""
    state = checkpoint.load_newest(runs / "long", print)[1]
    model = models.build("resnet20", classes=6, image_size=16)
    model.load_state_dict(state["model"])
    model = model.double().eval()
    dataset = open_dataset(small_data)
    settings = LoaderConfig(
        backend="torch", size=16, mean=dataset.mean, std=dataset.std, batch_size=64, device=torch.device("cpu")
    )
    loader = open_loader(dataset.splits["train"], settings)
    batches = [batch[1:] for batch in loader.batches(evaluation_batches(260, 64, 0, 1))]
    loader.close()
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    pool = permutation(Stream.METRIC_POOL, 260, 0)[:60]
    values = []
    for trial in range(TRIALS):
        chosen = pool[generator(Stream.METRIC_TRIAL, 0, trial).choice(60, SAMPLES, replace=False)]
        rows = []
        for i in chosen:
            loss = F.cross_entropy(model(images[i : i + 1].double()), labels[i : i + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        jacobian = torch.stack(rows)
        values.append(float(torch.linalg.slogdet(jacobian @ jacobian.T)[1]))
    row = next(r for r in measured["checkpoints"] if "long" in r["path"])
    got = row["curvature"]["gamma_hat"]
    # The command's gradients are float32, and DALI decodes with another JPEG decoder.
    assert got["mean"] == pytest.approx(np.mean(values), abs=0.02 * SAMPLES)
    assert got["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(TRIALS), rel=0.1)
    assert (got["trials"], got["singular"]) == (TRIALS, 0)


def test_the_numbers_do_not_depend_on_the_workers(measured: dict[str, Any], runs: Path) -> None:
    result = launch(2, sys.executable, "-m", "infomcr_dist.measure", "short", "long", *SETTINGS, "output=two", cwd=runs)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"written: two\.json", result.stdout)) == 1
    two = json.loads((runs / "two.json").read_text())
    for one_row, two_row in zip(measured["checkpoints"], two["checkpoints"], strict=True):
        for name in ("curvature", "gamma"):
            assert flat(two_row[name]) == pytest.approx(flat(one_row[name]), rel=1e-9), name
        # Here the images meet in other batches, and a float32 convolution rounds by the shape of its batch.
        for name in ("robustness", "bound", "train", "test"):
            assert flat(two_row[name]) == pytest.approx(flat(one_row[name]), rel=1e-6), name


def test_the_share_of_the_penalty_is_its_definition(small_data: Path) -> None:
    """β‖mean of α H_i g_i‖ / ‖mean of g_i‖ with Hessians, of a linear classifier, whose loss has no kinks."""
    torch.manual_seed(0)
    split = open_dataset(small_data).splits["train"]
    images = torch.randn(len(split), 3, 2, 2)
    labels = torch.from_numpy(split.labels.astype(np.int64))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 6)).eval()
    seen: list[np.ndarray] = []

    class Images:
        def batches(self, batches: Iterable[LocalBatch]) -> Iterator[tuple[LocalBatch, torch.Tensor, torch.Tensor]]:
            for batch in batches:
                seen.append(batch.samples)
                yield batch, images[batch.samples], labels[batch.samples]

    config = load(Config, None, ["regularizer.sub_batch_size=12", "regularizer.beta=7", "regularizer.alpha=0.01"])
    got = penalty_share(model, Images(), split, config, 3, SingleProcess())  # type: ignore[arg-type]
    assert got is not None
    assert not model.training
    assert [len(set(samples.tolist())) for samples in seen] == [96] * 10
    shapes = [p.shape for p in model.parameters()]
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    values = []
    for samples in seen:
        gradients, products = [], []
        for chosen in np.split(samples, 8):
            flat_images = images[chosen].double().flatten(1)

            def loss(w: torch.Tensor, x: torch.Tensor = flat_images, y: torch.Tensor = labels[chosen]) -> torch.Tensor:
                matrix, bias = w[:72].view(shapes[0]), w[72:]
                return F.cross_entropy(x @ matrix.T + bias, y)

            gradients.append(torch.func.grad(loss)(weights))
            products.append(0.01 * torch.autograd.functional.hvp(loss, weights, gradients[-1])[1])
        values.append(7 * float(sum(products).norm() / sum(gradients).norm()))  # type: ignore[union-attr]
    assert got.mean == pytest.approx(np.mean(values), rel=0.02)  # α is finite
    assert got.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(10), rel=0.1)
    config = load(Config, None, ["regularizer.sub_batches=8"])
    assert penalty_share(model, Images(), split, config, 3, SingleProcess()) is None  # type: ignore[arg-type]


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for v in value.values() for x in flat(v)]
    return [] if value is None else [value]


def test_mistakes_are_reported_in_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "give a checkpoint or a run directory"),
        (["nowhere"], "there is no checkpoint at nowhere"),
        ([str(runs / "long"), "trial=3"], "unknown setting trial: the nearest known one is trials"),
        ([str(runs / "long"), "data=nowhere"], "nowhere"),
        ([str(runs / "long"), "samples=1"], "samples must be at least 2, got 1"),
    ):
        assert main(arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert message in lines[0]
