"""A network that the regularizer or the metric cannot handle is refused before the first epoch, in one line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infomcr_dist.config import Config, MetricSettings, RegularizerSettings
from infomcr_dist.preflight import check_run
from infomcr_dist.train import main

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        return self.head(x.mean((2, 3)))

class BatchStatistics(Net):
    def __init__(self, classes):
        super().__init__(classes)
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x):
        return super().forward(self.norm(x))

class NoSubBatches(Net):
    def forward(self, x):
        if self.training and torch.is_grad_enabled() and len(x) == 4:
            raise IndexError("index 4 is\\n out of range")
        return super().forward(x)

def good(classes, image_size): return Net(classes)
def batch_statistics(classes, image_size): return BatchStatistics(classes)
def no_sub_batches(classes, image_size): return NoSubBatches(classes)
"""
CONFIG = replace(Config(), regularizer=RegularizerSettings(sub_batch_size=4), metric=MetricSettings(trials=2))


@pytest.fixture(autouse=True)
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checked.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)


def checked(network: str, config: Config = CONFIG) -> str:
    size = config.regularizer.sub_batch_size if config.regularizer.when != "never" else None
    return check_run(replace(config, model=network), 6, 16, size, torch.device("cpu"))


@pytest.mark.parametrize("network", ["checked:good", "cnn"])
@pytest.mark.parametrize("estimator", ["fused", "sampled", "reference"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_works_changes_no_random_number(network: str, estimator: str, precision: str) -> None:
    sampled = 1 if estimator == "sampled" else None
    regularizer = replace(CONFIG.regularizer, estimator=estimator, num_sampled=sampled)
    before = torch.get_rng_state()
    found = checked(network, replace(CONFIG, regularizer=regularizer, precision=precision))
    assert found == f"a plain step, a regularized step, γ̂ of {network}"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("network", "message", "remedy"),
    [
        (
            "checked:batch_statistics",
            "the Gram matrix of gamma_hat does not work with this model: BatchNorm",
            replace(CONFIG, metric=MetricSettings(trials=0)),
        ),
        (
            "checked:no_sub_batches",
            "the regularized step does not work with this model: IndexError: index 4 is out of range",
            replace(CONFIG, regularizer=RegularizerSettings(when="never")),
        ),
    ],
    ids=["metric", "regularizer"],
)
def test_what_does_not_work_is_one_line_with_the_remedy(network: str, message: str, remedy: Config) -> None:
    with pytest.raises(ValueError, match=rf"model={network}: {message}") as refused:
        checked(network)
    assert "\n" not in str(refused.value)
    assert str(refused.value).endswith("do without (regularizer.when=never, metric.trials=0)")
    assert network in checked(network, remedy), "the remedy helps"


def test_training_is_refused_before_anything_is_written(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [f"data.path={small_data}", "telemetry.port=null", "model=checked:batch_statistics", "run_dir=run"]
    threads = torch.get_num_threads()
    assert main(settings) == 2
    torch.set_num_threads(threads)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        "error: model=checked:batch_statistics: the Gram matrix of gamma_hat does not work with this model"
    )
    assert not (tmp_path / "run").exists()


def test_tf32_without_a_gpu_is_refused() -> None:
    message = r"^precision=tf32 needs a GPU of compute capability 8\.0 or later, this worker computes on cpu: use fp32$"
    with pytest.raises(ValueError, match=message):
        checked("checked:good", replace(CONFIG, precision="tf32"))
