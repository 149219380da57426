"""Second derivatives that torch has wrong or not at all, and what a network computes in."""

import warnings
from typing import Any

import pytest
import torch
from cases.library import data, net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from infomcr_dist import functional_loss, regularized_backward
from infomcr_dist.functional import trainable_parameters
from infomcr_dist.inspection import second_derivative_error
from infomcr_dist.regularizer import finite_difference_error

COMMON: dict[str, Any] = {"alpha": 1e-3, "beta": 10.0, "sub_batches": 4}


class Swish(torch.autograd.Function):
    """A function whose backward pass can be differentiated, or hides that it depends on its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, right: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.right = right
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        x = x if ctx.right else x.detach()
        return gradient * (x.sigmoid() * (1 + x * (1 - x.sigmoid()))), None


class OwnFunction(nn.Module):
    def __init__(self, right: bool) -> None:
        super().__init__()
        self.net, self.right = net(), right

    def forward(self, x: Tensor) -> Tensor:
        return self.net[5:](Swish.apply(self.net[3](self.net[:3](x)), self.right))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention = nn.Linear(3, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.flatten(2).transpose(1, 2))
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def weight_normed() -> nn.Module:
    model = net()
    parametrizations.weight_norm(model[3])
    parametrizations.weight_norm(model[6])
    return model


def error_of(model: nn.Module) -> float:
    x, y = data()
    dtype = next(model.parameters()).dtype
    return second_derivative_error(model, F.cross_entropy, trainable_parameters(model), (x[:4].to(dtype), y[:4]))


def test_the_error_of_second_derivatives_that_are_right() -> None:
    relu = net()
    relu[2], relu[4] = nn.ReLU(), nn.ReLU()
    assert error_of(net()) < 1e-5
    assert error_of(net().float()) < 1e-5
    assert error_of(relu) < 1e-5
    assert error_of(nn.Sequential(nn.Dropout(0.3), net())) < 1e-5
    assert error_of(OwnFunction(right=True)) < 1e-5
    assert error_of(Attending().double()) < 1e-5


def test_the_error_of_second_derivatives_that_are_wrong() -> None:
    assert error_of(weight_normed()) > 0.01
    assert error_of(OwnFunction(right=False)) > 0.01


@pytest.mark.parametrize("model", [weight_normed(), OwnFunction(right=False)], ids=["weight_norm", "own function"])
def test_a_wrong_second_derivative_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"derivative='exact' is off by \d+\.\d% in this model, for \w+") as refused:
        regularized_backward(model, F.cross_entropy, *data(), **COMMON, derivative="exact")
    assert "\n" not in str(refused.value)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "build", [weight_normed, lambda: OwnFunction(right=False)], ids=["weight_norm", "own function"]
)
def test_auto_notices_and_takes_the_finite_difference_in_float32(build: Any) -> None:
    x, y = data()
    expected, model = build(), build().float()
    regularized_backward(expected, F.cross_entropy, x, y, **COMMON, derivative="finite_difference")
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="'auto' takes the finite difference"):
        regularized_backward(model, F.cross_entropy, x.float(), y, **COMMON, step="alpha")
    found, wanted = (torch.cat([p.grad.flatten().double() for p in m.parameters()]) for m in (model, expected))
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_auto_cannot_help_weights_of_few_bits() -> None:
    x, y = data()
    with pytest.raises(ValueError, match="derivative='exact' is off by"):
        regularized_backward(weight_normed().bfloat16(), F.cross_entropy, x.bfloat16(), y, **COMMON)


def test_a_right_function_of_ones_own_is_exact() -> None:
    x, y = data()
    expected, model = net(), OwnFunction(right=True)
    for one in (expected, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            regularized_backward(one, F.cross_entropy, x, y, **COMMON, derivative="exact")
    for one, other in zip(model.net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_no_second_derivative_at_all_is_refused() -> None:
    x, y = data()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net[5:](Once.apply(self.net[3](self.net[:3](x)) / 10))

    with pytest.raises(ValueError, match="derivative='exact' ") as refused:
        regularized_backward(Model(), F.cross_entropy, x, y, **COMMON, derivative="exact")
    assert "\n" not in str(refused.value)


def test_attention_is_exact() -> None:
    x, y = data()
    model, loss_fn = Attending().double(), functional_loss(Attending().double())
    assert finite_difference_error(loss_fn, trainable_parameters(model), (x, y), 1e-6) < 1e-5
    regularized_backward(model, F.cross_entropy, x, y, **COMMON, derivative="exact")


def test_a_network_that_differentiates_its_input() -> None:
    """Leaves that a pass makes for itself are nobody's parameters."""
    x, y = data()

    class Sensitive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            out = self.net(x)
            (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return out + slope.square().mean((1, 2, 3))[:, None] * torch.arange(5)

    model = Sensitive()
    regularized_backward(model, F.cross_entropy, x, y, **COMMON)
    assert model.net[0].weight.grad is not None
