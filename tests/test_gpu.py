"""What only a GPU can show. torch, numpy, pytest and this package are enough; what needs more skips without it."""

import importlib
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist import models
from infomcr_dist.checkpoint import copied
from infomcr_dist.config import OptimizerSettings
from infomcr_dist.curvature import spectrum
from infomcr_dist.evaluate import evaluate
from infomcr_dist.first_order import FirstOrder
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.graphs import Graphs
from infomcr_dist.optimizers import build_optimizer
from infomcr_dist.precision import full_precision, set_deterministic, set_float32_precision
from infomcr_dist.step import PenaltySettings, train_step
from infomcr_dist.world import SingleProcess
from pipelines import Batch, LocalBatch, evaluation_batches

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: run it on a machine that has one"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def flags_of_a_run() -> Iterator[None]:
    """Those of `infomcr train`. An operation without a deterministic form warns, and a warning is an error here."""
    set_float32_precision()
    set_deterministic(True)
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def images_and_labels(count: int, size: int = 32, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return models.build("resnet20", classes=10, image_size=32)


def test_convolutions_and_products_are_in_ieee_float32_inside_and_outside_of_full_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    images, kernels = (torch.randn(n, 64, s, s, generator=generator).to(GPU) for n, s in ((16, 32), (64, 3)))
    exact = F.conv2d(images.double(), kernels.double(), padding=1)
    exact_product = images.double().flatten(1) @ images.double().flatten(1).T

    def errors() -> tuple[float, float]:
        convolved, product = F.conv2d(images, kernels, padding=1), images.flatten(1) @ images.flatten(1).T
        return float((convolved - exact).norm() / exact.norm()), float((product - exact_product).norm() / exact.norm())

    plain = errors()
    with full_precision(GPU):
        inside = errors()
        assert not torch.backends.cudnn.allow_tf32, "it can be read"
        with torch.backends.cudnn.flags(enabled=True):
            pass
    assert plain == inside
    assert max(plain) < 3e-5
    set_float32_precision(tf32=True)  # which the next test's fixture takes back
    assert min(errors()) > 1e-4, "precision=tf32"
    with full_precision(GPU):
        assert errors() == inside


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "penalty",
    [
        None,
        PenaltySettings(alpha=1e-4, beta=10.0, sub_batch_size=16),
        PenaltySettings(alpha=1e-4, beta=1.0, sub_batch_size=16, method="asam", rho=0.5),
    ],
    ids=["plain", "infomcr", "asam"],
)
def test_steps_give_the_same_bits_again_and_after_a_resume(penalty: PenaltySettings | None, bf16: bool) -> None:
    world, criterion = SingleProcess(), nn.CrossEntropyLoss()
    images, labels = (tensor.to(GPU) for tensor in images_and_labels(48))

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = resnet().to(GPU).train()
        return model, build_optimizer(OptimizerSettings(), model)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> dict[str, Any]:
        for _ in range(count):
            train_step(model, criterion, optimizer, world, (images, labels), loss_scale=1.0, penalty=penalty, bf16=bf16)
        return {"model": copied(model.state_dict()), "optimizer": copied(optimizer.state_dict())}

    whole, again = (steps(*begin(), 4)["model"] for _ in range(2))
    half = steps(*begin(), 2)
    model, optimizer = begin()
    model.load_state_dict(half["model"])
    optimizer.load_state_dict(half["optimizer"])
    resumed = steps(model, optimizer, 2)["model"]
    assert any(not torch.equal(tensor, half["model"][name]) for name, tensor in whole.items()), "steps were taken"
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_graph_takes_the_steps_of_every_fused_optimizer(kind: str) -> None:
    criterion, world = nn.CrossEntropyLoss(), SingleProcess()
    images, labels = (tensor.to(GPU) for tensor in images_and_labels(16))
    found = []
    for graphed in (False, True):
        model = resnet().to(GPU).train()
        optimizer = build_optimizer(OptimizerSettings(kind=kind, learning_rate=1e-3), model)
        passes = FirstOrder(model, criterion, images, labels, bf16=False)
        graphs = Graphs(passes, model, optimizer, world, None) if graphed else None
        for step in range(6):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (1 + step)
            batch = images * (math.inf if step == 3 else 1.0), labels
            result = train_step(model, criterion, optimizer, world, batch, loss_scale=1.0, penalty=None, graphs=graphs)
            assert result.finite == (step != 3)
        found.append(copied(model.state_dict()))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)


class Unsynchronized:
    """Prepared batches; between the first and the last of them, waiting for the GPU is an error."""

    skipped: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self.parts = list(zip(images.to(GPU).split(batch_size), labels.to(GPU).split(batch_size), strict=True))
        self.size = len(labels)

    def __len__(self) -> int:
        return self.size

    def batches(self, local_batches: Iterable[LocalBatch]) -> Iterator[Batch]:
        for local_batch, part in zip(local_batches, self.parts, strict=True):
            yield local_batch, *part
            torch.cuda.set_sync_debug_mode("error")  # the first batch may have loaded kernels
        torch.cuda.set_sync_debug_mode("default")

    def close(self) -> None: ...


@pytest.mark.parametrize("bf16", [False, True])
def test_an_evaluation_waits_once_and_has_the_errors_of_a_cpu(bf16: bool) -> None:
    images, labels = images_and_labels(90)
    model, world = resnet(), SingleProcess()
    with torch.no_grad():
        logits = model.eval()(images)
    data = Unsynchronized(images, labels, 20)
    found = evaluate(model.to(GPU), data, data, 20, world, bf16=bf16)  # type: ignore[arg-type]
    wrong = float((logits.argmax(1) != labels).double().mean())
    assert found.samples == 90
    assert found.loss == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=3e-2 if bf16 else 1e-5)
    assert found.top1_error_ratio == pytest.approx(wrong, abs=0.1 if bf16 else 1e-9)


def test_a_gram_matrix_waits_for_nothing_and_is_that_of_float64() -> None:
    images, labels = images_and_labels(24)
    model = resnet().eval()
    exact_model = resnet().eval().double()
    exact = gradient_gram(
        functional_loss(exact_model), trainable_parameters(exact_model), (images.double(), labels)
    )  # on the CPU
    model.to(GPU)
    loss_fn, params, batch = functional_loss(model), trainable_parameters(model), (images.to(GPU), labels.to(GPU))
    first = gradient_gram(loss_fn, params, batch)  # which finds the routes out
    torch.cuda.set_sync_debug_mode("error")
    second = gradient_gram(loss_fn, params, batch)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)
    assert float((second.cpu() - exact).norm() / exact.norm()) < 1e-4
    found, expected = spectrum(second), spectrum(exact)
    assert found.log_determinant == pytest.approx(expected.log_determinant, abs=0.1)
    assert found.trace == pytest.approx(expected.trace, rel=1e-4)


def test_bytes_normalized_on_the_gpu_are_those_of_a_cpu_to_the_bit() -> None:
    pytest.importorskip("PIL")
    from pipelines.loaders.base import normalized

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    levels = np.arange(256) / 255
    tables = np.stack([((levels - m) / s).astype(np.float32) for m, s in ((0.4, 0.2), (0.5, 0.3), (0.6, 0.25))], axis=1)
    sent = torch.from_numpy(pixels).pin_memory().to(GPU, non_blocking=True)
    found = normalized(sent, torch.from_numpy(tables).to(GPU)).cpu().numpy()
    for channel in range(3):
        np.testing.assert_array_equal(found[:, channel], tables[pixels[..., channel], channel])


@pytest.mark.parametrize("backend", ["torch", "dali"])
@pytest.mark.parametrize("augmentation", ["none", "crop4_flip", "random_resized_crop"])
def test_loaders_give_a_busy_gpu_what_they_give_an_idle_one(tmp_path: Path, backend: str, augmentation: str) -> None:
    """Bits of the `torch` backend are those of a CPU as well; DALI has another decoder on a GPU."""
    for module in ("PIL", "yaml", "simplejpeg", "cv2", *(["nvidia.dali"] if backend == "dali" else [])):
        pytest.importorskip(module)
    make_data_set: Any = importlib.import_module("data_sets").make_data_set
    from pipelines import LoaderConfig, open_loader

    dataset = make_data_set(tmp_path)

    def epoch(device: torch.device, busy: bool) -> list[Tensor]:
        config: dict[str, Any] = {"size": 32, "mean": dataset.mean, "std": dataset.std, "batch_size": 4, "seed": 5}
        config |= {"backend": backend, "augmentation": augmentation, "device": device}
        loader = open_loader(dataset.splits["train"], LoaderConfig(**config))
        batches = []
        for _, images, labels in loader.batches(evaluation_batches(27, 4, 0, 1)):
            if busy:
                torch.cuda._sleep(50_000_000)  # a few hundredths of a second, in which the host runs ahead
            batches.append((images.clone(), labels.clone()))
        loader.close()
        return [tensor.cpu() for batch in batches for tensor in batch]

    busy = epoch(GPU, True)
    for other in [epoch(GPU, False)] + ([epoch(torch.device("cpu"), False)] if backend == "torch" else []):
        assert all(map(torch.equal, busy, other))


def test_a_worker_that_waits_for_a_kernel_is_killed_and_reported() -> None:
    code = """
import torch
from infomcr_dist.watchdog import Watchdog
from infomcr_dist.world import SingleProcess
world = SingleProcess()
torch.ones(1, device=world.device).sum().item()
watchdog = Watchdog(world, 3.0)
world.location, world.patience = "step 3", 1.0
torch.cuda._sleep(2**45)  # for hours
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert re.search(r"error: rank 0 has made no progress for \d+ s in step 3: killed", done.stderr), done.stderr
    assert done.returncode == -signal.SIGKILL


def test_the_memory_of_a_rank_is_that_of_its_gpu() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    pytest.importorskip("tqdm")
    from infomcr_dist.config import TelemetrySettings
    from infomcr_dist.telemetry import Telemetry

    held = torch.ones(2**20, device=GPU)
    settings: Any = TelemetrySettings(port=None)
    run = Telemetry(settings, rank=0, local_rank=0, world_size=1, device=GPU, info={"model": "cnn"})
    text = prometheus.generate_latest(run._prometheus.registry).decode()
    found = re.search(r"^infomcr_gpu_memory_bytes (\S+)$", text, flags=re.MULTILINE)
    assert found
    assert float(found[1]) == torch.cuda.memory_reserved(GPU) >= held.nbytes
