"""SAM, ASAM and the penalty on the gradient's norm, against plain autograd in float64 and another implementation."""

import copy
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist import checkpoint
from infomcr_dist.checks import Method
from infomcr_dist.first_order import FirstOrder, Penalty
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.graphs import Graphs
from infomcr_dist.records import FILE, StepRecord, of_kind, read_records
from infomcr_dist.regularizer import regularized_backward, sub_batch_penalty
from infomcr_dist.step import PenaltySettings, train_step
from infomcr_dist.train import main
from infomcr_dist.world import SingleProcess

RHO: dict[Method, float] = {"sam": 0.1, "asam": 0.7, "gradient_norm": 0.1}
BETA: dict[Method, float] = {"sam": 1.0, "asam": 1.0, "gradient_norm": 0.7}
METHODS = pytest.mark.parametrize("method", RHO)
M = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks so small are slower on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.BatchNorm2d(6, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def batch_of(size: int = 24, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator)
    return images.to(dtype), torch.randint(4, (size,), generator=generator)


def grads(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


def buffers(model: nn.Module) -> Tensor:
    return torch.cat([buffer.double().flatten() for buffer in model.buffers()])


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def one_by_one(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], method: Method
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """L, R, and g_i and h_i of each sub-batch as the papers write them: on copies, parameter by parameter."""
    rho, losses, rises, gs, hs = RHO[method], [], [], [], []
    for images, labels in batches:
        here = copy.deepcopy(model)
        loss = F.cross_entropy(here(images), labels)
        loss.backward()
        g = torch.cat([p.grad.flatten() for p in here.parameters()])  # type: ignore[union-attr]
        w = torch.cat([p.detach().flatten() for p in here.parameters()])
        if method == "asam":
            t = torch.diag(w.abs())
            epsilon = rho * (t @ t @ g) / (t @ g).norm()  # Kwon et al. 2021
        else:
            epsilon = rho * g / g.norm()  # Foret et al. 2021, p = 2; Zhao et al. 2022
        there = copy.deepcopy(model)
        nn.utils.vector_to_parameters(w + epsilon, there.parameters())
        moved = F.cross_entropy(there(images), labels)
        moved.backward()
        losses.append(loss.detach())
        rises.append((moved - loss).detach())
        gs.append(g)
        hs.append(torch.cat([p.grad.flatten() for p in there.parameters()]))  # type: ignore[union-attr]
    return torch.stack(losses).mean(), torch.stack(rises).mean(), gs, hs


def pieces(batch: tuple[Tensor, Tensor], count: int = M) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].chunk(count), batch[1].chunk(count), strict=True))


def mean(vectors: list[Tensor]) -> Tensor:
    return torch.stack(vectors).mean(0)


def step_of(model: nn.Module, batch: tuple[Tensor, Tensor], method: Method, **settings: Any) -> Any:
    settings = {"beta": BETA[method], "sub_batches": M} | settings
    torch.manual_seed(5)
    return regularized_backward(model, F.cross_entropy, *batch, method=method, rho=RHO[method], **settings)


# Against plain autograd.


@METHODS
def test_a_step_is_the_definition_s(method: Method) -> None:
    model, batch = network().double(), batch_of()
    loss, rise, gs, hs = one_by_one(model, pieces(batch), method)
    before = copy.deepcopy(model.state_dict())
    losses = step_of(model, batch, method)
    a = 1 - BETA[method]
    assert relative(grads(model), a * mean(gs) + (1 - a) * mean(hs)) < 1e-12
    assert relative(mean(hs), mean(gs)) > 0.05  # the two differ
    torch.testing.assert_close(losses.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.penalty, rise, rtol=1e-9, atol=0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@METHODS
def test_the_pure_function_gives_the_same(method: Method) -> None:
    model, batch = network().double(), batch_of()
    loss, rise, gs, hs = one_by_one(model, pieces(batch), method)
    params = trainable_parameters(model)
    for loss_fn in (functional_loss(model), lambda p, b: functional_loss(model)(p, b)):
        found = sub_batch_penalty(loss_fn, params, pieces(batch), 1e-4, method=method, rho=RHO[method])
        torch.testing.assert_close((found.loss, found.penalty), (loss, rise), rtol=1e-9, atol=0)
        penalty = torch.cat([found.penalty_gradient[name].flatten() for name in params])
        assert relative(penalty, mean(hs) - mean(gs)) < 1e-10


@METHODS
def test_sampled_is_unbiased(method: Method, monkeypatch: Any) -> None:
    """Without BatchNorm, for which the others are one batch: the mean over all choices of one is that of all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.SiLU(), nn.Linear(7, 4)).double()
    batch, found = batch_of(), []
    for first in range(M):
        order = torch.tensor([first, *(i for i in range(M) if i != first)])
        monkeypatch.setattr(torch, "randperm", lambda count, order=order: order)
        model.zero_grad()
        step_of(model, batch, method, estimator="sampled", num_sampled=1)
        found.append(grads(model))
    model.zero_grad()
    step_of(model, batch, method)
    assert relative(mean(found), grads(model)) < 1e-12
    assert relative(found[0], grads(model)) > 0.01


@METHODS
def test_a_step_in_parts_adds_up(method: Method) -> None:
    once, parts = network().double(), network().double()
    batch = batch_of()
    step_of(once, batch, method)
    for part, share in (((batch[0][:8], batch[1][:8]), 1 / 3), ((batch[0][8:], batch[1][8:]), 2 / 3)):
        step_of(parts, part, method, sub_batches=round(share * M), loss_scale=share)
    assert relative(grads(parts), grads(once)) < 1e-12


@METHODS
def test_running_statistics_are_those_of_a_step_without_penalty(method: Method) -> None:
    model, plain, kept = network().double(), network().double(), network().double()
    step_of(model, batch_of(), method)
    step_of(plain, batch_of(), method, beta=0.0)
    assert torch.equal(buffers(model), buffers(plain))
    assert not torch.equal(buffers(model), buffers(kept))
    assert model[1].num_batches_tracked == 1


@METHODS
def test_autocast_is_near_float64(method: Method) -> None:
    """As near as the definition under autocast is: no small difference of gradients is divided by a small step."""
    _, _, gs, hs = one_by_one(network().double(), pieces(batch_of()), method)
    model, batch, a = network(), batch_of(dtype=torch.float32), 1 - BETA[method]
    with torch.autocast("cpu", torch.bfloat16):
        *_, low_gs, low_hs = one_by_one(model, pieces(batch), method)
        step_of(model, batch, method)
    expected, by_hand = (a * mean(g) + (1 - a) * mean(h) for g, h in ((gs, hs), (low_gs, low_hs)))
    assert relative(grads(model), expected) < 1.5 * relative(by_hand.double(), expected)
    assert relative(grads(model), expected) < 0.1


@METHODS
def test_a_gradient_of_zeros_moves_nothing(method: Method) -> None:
    model, images, labels = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(4, 4), torch.tensor([0, 1] * 2)
    nn.init.zeros_(model[1].bias)  # then every logit is 0, and the labels are balanced
    losses = step_of(model, (images, labels), method, sub_batches=2)
    assert losses.penalty == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())  # type: ignore[union-attr]


@METHODS
def test_hooks_fire_once_with_the_whole_gradient(method: Method) -> None:
    model, fired = network().double(), {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: fired.setdefault(name, []).append(p.grad.clone())
        )
    step_of(model, batch_of(), method)
    for name, parameter in model.named_parameters():
        assert len(fired[name]) == 1
        assert torch.equal(fired[name][0], parameter.grad)


# Against an implementation of others.


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_it_is_the_step_of_pytorch_optimizer(method: Method) -> None:
    """One sub-batch, SGD with momentum, three steps. Its norm is in float32."""
    optimizers = pytest.importorskip("pytorch_optimizer", reason="a test dependency: pip install '.[dev]'")
    (batch,) = pieces(batch_of(8), 1)
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
    theirs, ours = network().double(), network().double()
    sam = optimizers.SAM(theirs.parameters(), torch.optim.SGD, rho=RHO[method], adaptive=method == "asam", **settings)
    sgd = torch.optim.SGD(ours.parameters(), **settings)
    for _ in range(3):

        def closure() -> Tensor:
            sam.zero_grad()
            loss = F.cross_entropy(theirs(batch[0]), batch[1])
            loss.backward()
            return loss

        closure()
        sam.step(closure)
        sgd.zero_grad()
        step_of(ours, batch, method, sub_batches=1)
        sgd.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative(one.detach(), other.detach()) < 1e-6
    # Its second pass moves the running statistics as well; ours are of the weights themselves.
    assert theirs[1].num_batches_tracked == 6
    assert ours[1].num_batches_tracked == 3


# The passes of a GPU, on a CPU.


@METHODS
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("num_penalized", [M, 1])
def test_the_passes_of_a_gpu_are_those_of_the_library(method: Method, bf16: bool, num_penalized: int) -> None:
    images, labels = batch_of(dtype=torch.float32)
    how: dict[str, Any] = {} if num_penalized == M else {"estimator": "sampled", "num_sampled": num_penalized}

    def library(bf16: bool) -> tuple[nn.Module, Tensor]:
        model = network()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = step_of(model, (images, labels), method, loss_scale=0.5, **how)
        return model, torch.stack(losses)

    (expected, losses), model = library(False), network()
    torch.manual_seed(5)
    drawn = torch.randperm(M)
    order = None if num_penalized == M else torch.cat([drawn[:num_penalized], drawn[num_penalized:].sort().values])
    passes = FirstOrder(model, nn.CrossEntropyLoss(), images, labels, bf16=bf16, streams=2)
    penalty = Penalty(1e-4, RHO[method], M, num_penalized, method)
    found = passes.backward(images, labels, penalty, torch.tensor(BETA[method]), 0.5, order)
    passes.settle(torch.tensor(True))
    if bf16:  # as near to float32 as the library is
        other, _ = library(True)
        assert relative(grads(model), grads(expected)) < 1.5 * relative(grads(other), grads(expected))
        torch.testing.assert_close(torch.stack(found), losses, rtol=0.1, atol=1e-2)
    else:
        assert relative(grads(model), grads(expected)) < 1e-5
        assert relative(buffers(model), buffers(expected)) < 1e-6
        torch.testing.assert_close(torch.stack(found), losses, rtol=1e-4, atol=0)


@METHODS
def test_a_training_by_graphs_is_that_without(method: Method) -> None:
    penalty = PenaltySettings(1e-4, BETA[method], 8, method=method, rho=RHO[method])
    trained = []
    for by_graphs in (False, True):
        model, criterion, world = network(), nn.CrossEntropyLoss(), SingleProcess()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batch = batch_of(dtype=torch.float32)
        graphs = None
        if by_graphs:
            graphs = Graphs(FirstOrder(model, criterion, *batch, bf16=False), model, optimizer, world, None)
        for _ in range(3):
            result = train_step(
                model, criterion, optimizer, world, batch, loss_scale=1.0, penalty=penalty, graphs=graphs
            )
        assert result.penalty > 0
        trained.append(model)
    for one, other in zip(trained[0].state_dict().values(), trained[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# The trainer.

RUNS: dict[Method, list[str]] = {
    "sam": [],
    "asam": ["precision=bf16", "regularizer.rho=0.5"],
    "gradient_norm": ["regularizer.estimator=sampled", "regularizer.num_sampled=2", "regularizer.beta=0.5",
                      "regularizer.ramp_epochs=2"],
}  # fmt: skip
RECIPE = """
model: resnet20
epochs: 3
data: {path: DATA, augmentation: crop1_flip, global_batch_size: 32, train_images: 64}
schedule: {kind: constant}
regularizer: {when: from_epoch, epoch: 1, sub_batch_size: 8}
metric: {trials: 0}
evaluation: {every_epochs: 0}
checkpoint: {keep: 4}
telemetry: {port: null}
threads: 1
"""


@METHODS
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(method: Method, tmp_path: Path, small_data: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("DATA", str(small_data)))
    whole, second = tmp_path / "whole", tmp_path / "second"
    settings = [str(recipe), f"regularizer.method={method}", *RUNS[method], "resume=auto"]
    assert main([*settings, f"run_dir={whole}"]) == 0
    shutil.copytree(whole, second)
    checkpoint.newest_first(second / "checkpoints")[0].unlink()
    assert main([*settings, f"run_dir={second}"]) == 0
    (_, one), (_, other) = (checkpoint.load_newest(run, pytest.fail) for run in (whole, second))
    assert one["step"] == other["step"] == 6
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    steps = of_kind(list(read_records(whole / FILE)), StepRecord)
    assert [step.phase for step in steps] == ["plain"] * 2 + ["regularized"] * 4
    assert [step.beta for step in steps[2:]] == ([0, 0.125, 0.25, 0.375] if method == "gradient_norm" else [1] * 4)
    assert all(step.penalty > 0 for step in steps[2:])  # type: ignore[operator]


# The page.


def test_the_tests_that_the_page_names_are_there() -> None:
    tests = Path(__file__).parent
    named = set(re.findall(r"`(test_\w+)`", (tests.parent / "docs" / "methods.md").read_text()))
    found = set(re.findall(r"^def (test_\w+)", "".join(f.read_text() for f in tests.glob("test_*.py")), re.MULTILINE))
    assert len(named) > 10
    assert named <= found


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "esam"}, "method must be one of infomcr, sam, asam, gradient_norm, got 'esam'"),
        ({"rho": None}, "rho must be positive for method='sam', got None"),
        ({"rho": 0.0}, "rho must be positive for method='sam', got 0.0"),
        ({"rho": float("nan")}, "rho must be positive for method='sam', got nan"),
        ({"method": "infomcr"}, "rho is the radius of the other methods, got method='infomcr' and rho=0.1: use step"),
        ({"estimator": "reference"}, "estimator='reference' goes with method='infomcr', got method='sam'"),
        ({"derivative": "exact"}, "derivative='exact' goes with method='infomcr', got method='sam'"),
        ({"derivative": "euler"}, "derivative must be one of finite_difference, exact, got 'euler'"),
        ({"step": 1e-3}, "step=0.001 goes with method='infomcr', got method='sam'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    model = network().double()
    arguments: dict[str, Any] = {"method": "sam", "rho": 0.1, "sub_batches": M} | settings
    with pytest.raises(ValueError, match=message):
        regularized_backward(model, F.cross_entropy, *batch_of(), **arguments)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"method='sam' moves parameters of less than 32 bits"):
        step_of(network().to(dtype), batch_of(dtype=dtype), "sam")
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="method='sam' computes under autocast, which to float16 needs loss scaling"),
    ):
        step_of(network(), batch_of(dtype=torch.float32), "sam")
