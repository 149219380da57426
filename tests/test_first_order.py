"""The trainer's own passes for a GPU against `regularized_backward`, on the CPU."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist.checks import RELATIVE_STEP, Step
from infomcr_dist.estimators import Estimator
from infomcr_dist.first_order import FirstOrder, Penalty
from infomcr_dist.graphs import Graphs
from infomcr_dist.regularizer import plain_backward, regularized_backward
from infomcr_dist.step import PenaltySettings, train_step
from infomcr_dist.world import SingleProcess

ALPHA, BETA, M = 1e-3, 20.0, 3


def network(channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.BatchNorm2d(16, momentum=0.3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )
    return model.to(memory_format=torch.channels_last) if channels_last else model


def batch_of(size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(10, (size,), generator=generator)


def relative(found: nn.Module, expected: nn.Module, what: str) -> float:
    def vector(model: nn.Module) -> Tensor:
        tensors = [p.grad for p in model.parameters()] if what == "grad" else list(model.buffers())
        return torch.cat([tensor.double().flatten() for tensor in tensors])  # type: ignore[union-attr]

    return float((vector(found) - vector(expected)).norm() / vector(expected).norm())


def steps(model: nn.Module, bf16: bool, penalty: Penalty | None, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    images, labels = batch_of()
    passes = FirstOrder(model, nn.CrossEntropyLoss(), images, labels, bf16=bf16, streams=2)
    found = passes.backward(images, labels, penalty, torch.tensor(BETA), 0.5, order)
    passes.settle(torch.tensor(True))
    return found


CASES: dict[str, tuple[Estimator, float | None, bool, bool]] = {
    "the paper's step": ("fused", None, False, False),
    "the paper's step, channels last": ("fused", None, False, True),
    "a longer step": ("fused", 3e-3, False, False),
    "sampled": ("sampled", 3e-3, False, True),
    "a longer step in bfloat16": ("fused", 3e-3, True, True),
    "sampled in bfloat16": ("sampled", 3e-3, True, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_regularized_step_is_that_of_the_library(case: str) -> None:
    estimator, rho, bf16, channels_last = CASES[case]
    images, labels = batch_of()

    def library(bf16: bool) -> tuple[nn.Module, Tensor]:
        model, how = network(channels_last), {"num_sampled": 1} if estimator == "sampled" else {}
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = regularized_backward(
                model, nn.CrossEntropyLoss(), images, labels, alpha=ALPHA, beta=BETA, sub_batches=M, loss_scale=0.5,
                step="alpha" if rho is None else rho, estimator=estimator, **how
            )  # fmt: skip
        return model, torch.stack(losses)

    torch.manual_seed(5)
    order = None
    if estimator == "sampled":
        drawn = torch.randperm(M)
        order = torch.cat([drawn[:1], drawn[1:].sort().values])
    model, (expected, losses) = network(channels_last), library(bf16=False)
    found = steps(model, bf16, Penalty(ALPHA, rho, M, 1 if estimator == "sampled" else M), order)
    if bf16:  # as near to float32 as the library is
        other, _ = library(bf16=True)
        for what in ("grad", "buffer"):
            assert relative(model, expected, what) < 1.5 * relative(other, expected, what)
        torch.testing.assert_close(torch.stack(found), losses, rtol=0.1, atol=0)
    else:
        assert relative(model, expected, "grad") < 1e-4
        assert relative(model, expected, "buffer") < 1e-6
        torch.testing.assert_close(torch.stack(found), losses, rtol=1e-3, atol=0)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride() or 1 in parameter.shape


def test_a_plain_step_is_that_of_the_library() -> None:
    expected, model = network(), network()
    wanted = plain_backward(expected, nn.CrossEntropyLoss(), *batch_of(), loss_scale=0.5)
    found = steps(model, False, None)
    assert relative(model, expected, "grad") < 1e-6
    assert relative(model, expected, "buffer") < 1e-6
    torch.testing.assert_close(found[0], wanted.loss, rtol=1e-6, atol=0)


def test_a_step_that_is_not_finite_leaves_the_statistics() -> None:
    model = network()
    before = copy.deepcopy(list(model.buffers()))
    images, labels = batch_of()
    passes = FirstOrder(model, nn.CrossEntropyLoss(), images, labels, bf16=False)
    for broken, finite in ((torch.full_like(images, torch.inf), False), (images, True)):
        passes.backward(broken, labels, Penalty(ALPHA, None, M, M), torch.tensor(BETA), 1.0)
        passes.settle(torch.tensor(finite))
        assert finite or all(torch.equal(b, old) for b, old in zip(model.buffers(), before, strict=True))
    expected = network()
    regularized_backward(expected, F.cross_entropy, images, labels, alpha=ALPHA, beta=BETA, sub_batches=M)
    assert relative(model, expected, "buffer") < 1e-6


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(192, 10)), "draws random numbers"),
        (Counting(), "changes the buffer 'calls'"),
        (nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(192, 10)), "momentum=None"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double(), "not in float32"),
    ],
    ids=["dropout", "state", "cumulative averages", "float64"],
)
def test_what_a_graph_cannot_hold_is_refused(model: nn.Module, reason: str) -> None:
    before = copy.deepcopy(model.state_dict())
    images = batch_of()[0].to(next(model.parameters()).dtype)
    with pytest.raises(ValueError, match=reason):
        FirstOrder(model, nn.CrossEntropyLoss(), images, batch_of()[1], bf16=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
@pytest.mark.parametrize("step", ["alpha", "auto"])
def test_the_paper_s_step_is_not_taken_in_low_precision(
    step: Step, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be noise: there its passes run in float32, kernel by kernel. auto is the longer step."""
    bf16 = precision == "bf16"
    for module in ("step", "inspection"):
        monkeypatch.setattr(f"infomcr_dist.{module}.rounds_float32", lambda device: not bf16)
    penalty = PenaltySettings(ALPHA, BETA, 4, step=step)
    assert penalty.of(12, rounded=True).rho == (None if step == "alpha" else RELATIVE_STEP)
    trained = []
    for by_graphs in (False, True):
        model, criterion, world = network(), nn.CrossEntropyLoss(), SingleProcess()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        passes = FirstOrder(model, criterion, *batch_of(), bf16=bf16)
        graphs = Graphs(passes, model, optimizer, world, None) if by_graphs else None
        train_step(
            model, criterion, optimizer, world, batch_of(), loss_scale=1.0, penalty=penalty, bf16=bf16, graphs=graphs
        )
        trained.append(model)
    for one, other in zip(trained[0].parameters(), trained[1].parameters(), strict=True):
        if step == "alpha":
            assert torch.equal(one, other), "the same passes"
        elif not bf16:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("estimator", ["fused", "sampled"])
def test_a_training_by_graphs_is_that_without(estimator: Estimator, fused: bool) -> None:
    """Update, clipping and the check for finite numbers too; the graphs of a GPU are not recorded here."""
    penalty = PenaltySettings(ALPHA, BETA, 4, estimator, 1 if estimator == "sampled" else None)
    trained = []
    for by_graphs in (False, True):
        model, criterion, world = network(), nn.CrossEntropyLoss(), SingleProcess()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=fused and by_graphs)
        graphs, finite = None, []
        if by_graphs:
            passes = FirstOrder(model, criterion, *batch_of(), bf16=False, streams=2)
            graphs = Graphs(passes, model, optimizer, world, 0.5)
        for step in range(8):
            torch.manual_seed(step)
            images, labels = batch_of(8 if step == 5 else 12)
            images = images * torch.inf if step in (0, 4) else images
            result = train_step(
                model, criterion, optimizer, world, (images, labels), loss_scale=1.0, clip_gradient_norm=0.5,
                penalty=penalty if step >= 3 else None, flags=(1.0, 2.0), graphs=graphs
            )  # fmt: skip
            assert result.flags == [1.0, 2.0]
            finite.append(result.finite)
        assert [step for step, fine in enumerate(finite) if not fine] == [0, 4]
        trained.append(model)
    for one, other in zip(trained[0].state_dict().values(), trained[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
