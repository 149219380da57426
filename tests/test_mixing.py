"""mixup, CutMix and random erasing: against a pixel by pixel version, against scipy's Beta, at any world size."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist import checkpoint
from infomcr_dist.config import Config
from infomcr_dist.experiment import open_experiment, plan_steps
from infomcr_dist.first_order import FirstOrder
from infomcr_dist.first_order import Penalty as FirstOrderPenalty
from infomcr_dist.regularizer import plain_backward, regularized_backward
from infomcr_dist.train import main
from infomcr_dist.world import SingleProcess
from pipelines import Batch, LocalBatch, Sampler, mixing, open_dataset
from pipelines.augment import uniform
from pipelines.mixing import MixedLoader, Mixing
from pipelines.options import load
from pipelines.random_streams import Stream

CLASSES, SIZE = 5, 8


def settings(**given: Any) -> Mixing:
    return Mixing(**{"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "seed": 3, "classes": CLASSES, "unit": 4} | given)


def batch(count: int, first: int = 0, epoch: int = 0, global_size: int | None = None) -> LocalBatch:
    positions = np.arange(first, first + count)
    return LocalBatch(epoch, 0, positions, positions, global_size or count)


def pixels(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, SIZE, SIZE + 3, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def slow(m: Mixing, local: LocalBatch, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The papers' recipes, one pixel at a time, in float64 but for the images."""
    height, width = images.shape[2:]
    images = images.clone()
    for i, position in enumerate(local.positions.tolist()):
        (u,) = uniform(m.seed, local.epoch, np.array([position]), Stream.MIXING)
        if m.erasing and u[0] < m.erasing:
            for area, ratio in zip(u[4:14], u[14:24], strict=True):
                aim = height * width * (0.02 + (1 / 3 - 0.02) * area)
                aspect = math.exp(math.log(0.3) + (math.log(10 / 3) - math.log(0.3)) * ratio)
                h, w = round(math.sqrt(aim / aspect)), round(math.sqrt(aim * aspect))
                if 0 < h <= height and 0 < w <= width:
                    break
            else:
                raise AssertionError("none of ten boxes fits")
            top, left = int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1))
            images[i, :, top : top + h, left : left + w] = 0
    if not (m.mixup or m.cutmix):
        return images, labels
    soft = F.one_hot(labels, CLASSES).double()
    if local.global_size % m.unit:
        return images, soft
    mixed, targets = images.clone(), soft.clone()
    for i, position in enumerate(local.positions.tolist()):
        j = i + 1 if position % 2 == 0 else i - 1
        (u,) = uniform(m.seed, local.epoch, np.array([position - position % 2]), Stream.MIXING)
        cut = bool(m.cutmix) if not (m.mixup and m.cutmix) else u[24] < 0.5
        alpha = m.cutmix if cut else m.mixup
        cosine = math.cos(2 * math.pi * u[26])
        q = ((1 - u[25]) ** (-1 / alpha) - 1) * cosine**2
        share = 0.5 + math.copysign(0.5 * math.sqrt(q / (1 + q)), cosine)
        if cut:
            ratio = math.sqrt(1 - share)
            y, x, h, w = int(u[27] * height), int(u[28] * width), int(height * ratio) // 2, int(width * ratio) // 2
            taken = 0
            for a in range(max(y - h, 0), min(y + h, height)):
                for b in range(max(x - w, 0), min(x + w, width)):
                    mixed[i, :, a, b] = images[j, :, a, b]
                    taken += 1
            share = 1 - taken / (height * width)
        else:
            mixed[i] = share * images[i] + (1 - share) * images[j]
        targets[i] = share * soft[i] + (1 - share) * soft[j]
    return mixed, targets


@pytest.mark.parametrize(
    "m",
    [
        settings(mixup=0.2),
        settings(cutmix=1.0),
        settings(erasing=0.5),
        settings(mixup=1.0, cutmix=0.3, erasing=0.25, seed=9),
    ],
    ids=["mixup", "cutmix", "erasing", "all"],
)
def test_a_batch_is_that_of_a_pixel_by_pixel_version(m: Mixing) -> None:
    images, labels = pixels(40)
    before = images.clone(), labels.clone()
    local = batch(40, first=80, epoch=2)
    found, targets = m(local, images, labels)
    expected, expected_targets = slow(m, local, images, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(targets, expected_targets.to(targets.dtype), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, images)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1]), "the caller's tensors stay as they are"
    if m.mixup or m.cutmix:
        assert targets.dtype == torch.float32
        counts = F.one_hot(labels, CLASSES).float()
        torch.testing.assert_close(targets.sum(1), torch.ones(40))
        pairs = [tensor.unflatten(0, (20, 2)).sum(1) for tensor in (targets, counts)]
        torch.testing.assert_close(*pairs), "what one gives, the other takes"
    else:
        assert targets is labels


def test_any_world_size_and_any_start_see_the_same_batches() -> None:
    m = settings(mixup=0.4, cutmix=1.0, erasing=0.3)
    sampler = Sampler(54, 16, seed=0, unit=4)  # the last global batch has 6, no multiple of 4
    images, labels = pixels(54)

    class Stored:
        skipped: dict[int, str] = {}  # noqa: RUF012

        def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
            for local in local_batches:
                yield local, images[local.samples], labels[local.samples]

        def close(self) -> None: ...

    def epoch(world_size: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
        loaders = [
            MixedLoader(Stored(), m).batches(sampler.local_batches(1, rank, world_size, start))
            for rank in range(world_size)
        ]
        steps = zip(*loaders, strict=True)
        return [(torch.cat([b[1] for b in step]), torch.cat([b[2] for b in step])) for step in steps]

    whole = epoch(1)
    assert len(whole) == 4
    for other in (epoch(2), epoch(3), epoch(5), [*whole[:2], *epoch(2, start=2)]):
        for (a, b), (c, d) in zip(whole, other, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, d)
    assert set(whole[3][1].unique().tolist()) == {0.0, 1.0}, "a batch that does not split is not mixed"
    # A sub-batch of 4 depends on its own images alone.
    local = next(sampler.local_batches(1, 0, 1))
    changed = images[local.samples].clone()
    changed[4:8] += 1
    found, _ = m(local, changed, labels[local.samples])
    assert torch.equal(found[:4], whole[0][0][:4])
    assert torch.equal(found[8:], whole[0][0][8:])
    assert not torch.equal(found[4:8], whole[0][0][4:8])


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0])
def test_shares_have_the_beta_distribution(alpha: float) -> None:
    draws = uniform(0, 0, np.arange(20_000), Stream.MIXING)
    found = mixing._beta(alpha, draws[:, 25:27])
    assert ((found >= 0) & (found <= 1)).all()
    # Small α: most of the mass is within rounding of 0 and 1, where a comparison of quantiles has ties.
    inner = found[(found > 0.01) & (found < 0.99)]
    law = stats.beta(alpha, alpha)
    low, high = law.cdf([0.01, 0.99])
    assert stats.kstest(inner, lambda x: (law.cdf(x) - low) / (high - low)).pvalue > 0.01
    assert len(inner) / len(found) == pytest.approx(high - low, abs=0.01)
    assert np.mean(found) == pytest.approx(0.5, abs=0.01)
    edge = mixing._beta(alpha, np.array([[0.0, 0.1], [1 - 2**-53, 0.0], [1 - 2**-53, 0.5]]))
    assert np.isfinite(edge).all()


def test_erasing_takes_the_share_and_the_areas_it_is_given() -> None:
    images = torch.ones(4000, 3, 16, 16)
    found, _ = settings(erasing=0.3)(batch(4000), images, torch.zeros(4000, dtype=torch.int64))
    areas = (found[:, 0] == 0).float().mean((1, 2))
    assert float((areas > 0).float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(areas[areas > 0].min()) > 0.01
    assert float(areas.max()) < 0.36
    assert float(areas[areas > 0].mean()) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)


def test_a_worker_without_images_has_soft_labels_too() -> None:
    images, labels = settings(mixup=1.0, erasing=0.5)(batch(0, global_size=4), *pixels(0))
    assert images.shape == (0, 3, SIZE, SIZE + 3)
    assert labels.shape == (0, CLASSES)


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * (SIZE - 2) * (SIZE + 1), CLASSES),
    )
    return nn.Sequential(*layers)


def test_the_penalty_of_a_mixed_batch_is_that_of_its_sub_batches() -> None:
    """Equation by equation in float64, with label smoothing, which torch and this formula apply to probabilities."""
    images, labels = settings(mixup=0.3, cutmix=1.0)(batch(12), *pixels(12))
    alpha, beta, smoothing = 1e-3, 0.7, 0.1
    images, labels = images.double(), labels.double()

    def loss(model: nn.Module, some: slice) -> Tensor:
        smoothed = (1 - smoothing) * labels[some] + smoothing / CLASSES
        return -(smoothed * model(images[some]).log_softmax(1)).sum(1).mean()

    expected = []
    for i in range(3):
        some = slice(4 * i, 4 * i + 4)
        model = net().double().train()
        g = torch.autograd.grad(loss(model, some), list(model.parameters()))
        with torch.no_grad():
            for p, step in zip(model.parameters(), g, strict=True):
                p -= alpha * step
        h = torch.autograd.grad(loss(model, some), list(model.parameters()))
        expected.append([a + beta * (a - b) for a, b in zip(g, h, strict=True)])
    model = net().double().train()
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    regularized_backward(
        model, criterion, images, labels, alpha=alpha, beta=beta, sub_batch_size=4, derivative="finite_difference"
    )
    for j, parameter in enumerate(model.parameters()):
        torch.testing.assert_close(parameter.grad, sum(one[j] for one in expected) / 3, rtol=1e-9, atol=1e-12)
    # A plain step, whole and in pieces, and the passes that a GPU records.
    for size in (12, 4):
        model, other = net().double().train(), net().double().train()
        pieces = [slice(start, start + size) for start in range(0, 12, size)]
        expected_gradient = torch.autograd.grad(
            sum(loss(model, some) for some in pieces) / len(pieces), list(model.parameters())
        )
        plain_backward(other, criterion, images, labels, max_batch_size=size)
        for parameter, gradient in zip(other.parameters(), expected_gradient, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    model, other = net().train(), net().train()
    few = images.float(), labels.float()
    regularized_backward(model, criterion, *few, alpha=alpha, beta=beta, sub_batch_size=4)
    passes = FirstOrder(other, criterion, *few, bf16=False)
    passes.backward(*few, FirstOrderPenalty(alpha, None, 3, 3), torch.tensor(beta), 1.0)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


RECIPE = """
model: test_mixing:tiny
threads: 1
epochs: 2
data: {path: DATA, backend: BACKEND, augmentation: flip, global_batch_size: 64, mixup: 0.4, cutmix: 1.0,
  random_erasing: 0.3}
schedule: {kind: constant}
optimizer: {learning_rate: 0.01, label_smoothing: 0.1}
regularizer: {when: always, sub_batch_size: 8, finite_difference_error_every_steps: 2}
metric: {trials: 0}
telemetry: {port: null}
"""


def tiny(classes: int, image_size: int) -> nn.Module:
    features = 4 * (image_size - 2) ** 2
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(features, classes))


def test_a_run_is_resumed_to_the_bit_whichever_backend_decodes(tmp_path: Path, small_data: Path) -> None:
    final = []
    for backend in ("resident", "torch"):
        recipe = tmp_path / f"{backend}.yaml"
        recipe.write_text(RECIPE.replace("DATA", str(small_data)).replace("BACKEND", backend))
        directory = f"run_dir={tmp_path / backend}"
        if backend == "torch":
            assert main([str(recipe), directory, "epochs=1"]) == 0
            directory += f"\nresume={tmp_path / backend}"
        assert main([str(recipe), *directory.splitlines()]) == 0
        final.append(checkpoint.load_newest(tmp_path / backend, print)[1]["model"])
    for name, tensor in final[0].items():
        assert torch.equal(tensor, final[1][name]), name


def test_the_runs_loader_mixes_and_that_of_evaluation_does_not(small_data: Path) -> None:
    texts = [f"data.path={small_data}", "data.backend=torch", "data.augmentation=none", "data.mixup=1"]
    config = load(Config, None, [*texts, "data.global_batch_size=32"])
    experiment = open_experiment(config, 1)
    local = experiment.sampler.local_batch(0, 0, 0, 1)
    mixed = experiment.open_train_loader(SingleProcess())
    ((_, images, labels),) = mixed.batches([local])
    mixed.close()
    assert labels.shape == (32, 6)
    assert ((labels > 0) & (labels < 1)).any()
    assert images.shape == (32, 3, 16, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.mixup=-1"], "data.mixup must be at least 0, got -1.0"),
        (["data.random_erasing=2"], r"data.random_erasing must be in \[0, 1\], got 2.0"),
        (["data.cutmix=1", "regularizer.sub_batch_size=5"], "regularizer.sub_batch_size must be even, got 5"),
        (
            ["data.cutmix=1", "regularizer.when=never", "data.global_batch_size=35"],
            "data.mixup and data.cutmix need an even global batch, got 35 images",
        ),
    ],
)
def test_a_mistake_is_named_with_its_remedy(overrides: list[str], message: str, small_data: Path) -> None:
    split = open_dataset(small_data).splits["train"]
    with pytest.raises(ValueError, match=message) as caught:
        plan_steps(load(Config, None, ["data.global_batch_size=40", *overrides]), split, 2)
    assert "\n" not in str(caught.value)


def test_pairs_stay_on_one_rank_without_a_regularizer(small_data: Path) -> None:
    split = open_dataset(small_data).splits["train"]
    for mixup, unit in ((0.0, 1), (0.2, 2)):
        texts = ["regularizer.when=never", "data.global_batch_size=22", f"data.mixup={mixup}"]
        assert plan_steps(load(Config, None, texts), split, 3)[0].unit == unit
