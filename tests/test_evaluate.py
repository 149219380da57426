"""Evaluation and metric: the numbers, and splits with damaged samples."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from data_sets import make_data_set
from host_reads import HostReads
from torch import Tensor, nn

from infomcr_dist.config import MetricSettings
from infomcr_dist.evaluate import Errors, estimate_curvature, estimate_robustness, evaluate
from infomcr_dist.world import SingleProcess, Stopped, UserError
from pipelines import (
    Batch,
    Dataset,
    Loader,
    LoaderConfig,
    LocalBatch,
    OnError,
    evaluation_batches,
    open_loader,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Of its nine test images the fifth is cut, of its 27 training images the third and the fourth are."""
    dataset = make_data_set(tmp_path_factory.mktemp("damaged"), size=8)
    for split, samples in (("test", [4]), ("train", [2, 3])):
        for sample in samples:
            entry = dataset.splits[split].index[sample]
            with dataset.splits[split].shards[entry["shard"]].path.open("r+b") as file:
                file.seek(int(entry["offset"]) + 200)
                file.write(bytes(int(entry["size"]) - 200))
    return dataset


def loader(dataset: Dataset, split: str, backend: str, on_error: OnError) -> Loader:
    config = LoaderConfig(
        backend=backend,  # type: ignore[arg-type]
        size=8,
        mean=dataset.mean,
        std=dataset.std,
        batch_size=32,
        device=torch.device("cpu"),
        on_error=on_error,
    )
    return open_loader(dataset.splits[split], config)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_damaged_sample_is_reported_in_one_line(dataset: Dataset, backend: str) -> None:
    model, world, settings = network(), SingleProcess(), MetricSettings(trials=2, samples=27, images=27)
    test, train = (loader(dataset, split, backend, "stop") for split in ("test", "train"))
    place = dataset.splits["test"].where(4)
    with pytest.raises(UserError, match=f"^data: cannot decode {place}: .+") as caught:
        evaluate(model, test, dataset.splits["test"], 4, world)
    assert "\n" not in str(caught.value)
    for measure in (
        lambda: estimate_curvature(model, train, dataset.splits["train"], settings, 0, world),
        lambda: estimate_robustness(model, train, dataset.splits["train"], 27, 0, world),
    ):
        with pytest.raises(UserError, match=r"^data: cannot decode .*train.*, sample [23] at byte"):
            measure()
    assert model.training, "its mode is as before"
    test.close()
    train.close()


def test_a_damaged_sample_is_skipped_alike_by_both_backends(dataset: Dataset) -> None:
    results: list[tuple[Errors, float, float]] = []
    for backend in ("dali", "torch"):
        model, world, settings = network(), SingleProcess(), MetricSettings(trials=2, samples=27, images=27)
        test, train = (loader(dataset, split, backend, "skip") for split in ("test", "train"))
        errors = evaluate(model, test, dataset.splits["test"], 4, world)
        curvature = estimate_curvature(model, train, dataset.splits["train"], settings, 0, world)
        robustness = estimate_robustness(model, train, dataset.splits["train"], 27, 0, world)
        assert list(test.skipped) == [4]
        assert sorted(train.skipped) == [2, 3]
        results.append((errors, curvature.trace.mean, robustness.mean))
        test.close()
        train.close()
    (dali, dali_trace, dali_robustness), (other, trace, other_robustness) = results
    assert dali.samples == other.samples == 9
    np.testing.assert_allclose(
        (dali.loss, dali_trace, dali_robustness), (other.loss, trace, other_robustness), rtol=1e-3
    )


class Images:
    """A split and its loader: random images in memory."""

    skipped: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.labels = torch.randint(7, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        for batch in local_batches:
            yield batch, self.images[batch.samples], self.labels[batch.samples]

    def close(self) -> None: ...


def errors_by_numpy(logits: Tensor, labels: Tensor) -> Errors:
    values, truth = logits.double().numpy(), labels.numpy()
    log_sums = np.log(np.exp(values - values.max(1, keepdims=True)).sum(1)) + values.max(1)
    losses = log_sums - values[np.arange(len(truth)), truth]
    better = (values > values[np.arange(len(truth)), truth][:, None]).sum(1)
    return Errors(losses.mean(), (better > 0).mean(), (better > 4).mean(), len(truth))


@pytest.mark.parametrize("bf16", [False, True])
def test_errors_in_the_precision_of_training(bf16: bool) -> None:
    torch.manual_seed(0)
    model, data, world = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 7)),
        Images(45),
        SingleProcess(),
    )
    found = evaluate(model, data, data, 10, world, bf16=bf16)  # type: ignore[arg-type]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = torch.cat([model(images) for images in data.images.split(10)])
    assert logits.dtype == (torch.bfloat16 if bf16 else torch.float32)
    expected = errors_by_numpy(logits, data.labels)
    assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert vars(found) | {"loss": 0} == vars(expected) | {"loss": 0}
    assert world.progress == 5, "each batch is progress"


def test_an_evaluation_does_not_wait_for_a_batch() -> None:
    torch.manual_seed(0)
    model, data, world = nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), Images(45), SingleProcess()
    with HostReads() as found:
        evaluate(model, data, data, 10, world)  # type: ignore[arg-type]
    assert found.operators["addmm"] == 5
    assert found.reads == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("rounds", [1, 2])
def test_workers_stop_after_the_same_round(dataset: Dataset, rank: int, rounds: int) -> None:
    """Of two workers one has a batch less, or a trial; a poll comes after every round of both."""
    world = SingleProcess()
    world.rank, world.size = rank, 2
    polls = 0

    def poll() -> None:
        nonlocal polls
        polls += 1
        if polls == rounds:
            raise Stopped("")

    model, settings = network(), MetricSettings(trials=3, samples=4, images=27)
    splits = dataset.splits
    test, train = (loader(dataset, split, "torch", "skip") for split in ("test", "train"))
    for measure in (  # of 9 test images the second worker has 5
        lambda: evaluate(model, test, splits["test"], 4, world, poll),
        lambda: estimate_curvature(model, train, splits["train"], settings, 0, world, poll=poll),
    ):
        polls = 0
        with pytest.raises(Stopped):
            measure()
        assert (polls, model.training) == (rounds, True)
    assert sum(len(labels) for _, _, labels in test.batches(evaluation_batches(9, 32, 0, 1))) == 9, "it still reads"
    test.close()
    train.close()
