"""Values and batches that a step refuses or takes into account, and hooks of the parameters."""

import functools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from cases.library import algorithm_1, data, net
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist import functional_loss, gradient_gram, regularized_backward
from infomcr_dist.functional import trainable_parameters
from infomcr_dist.regularizer import plain_backward, sub_batch_penalty

COMMON: dict[str, Any] = {"alpha": 1e-4, "beta": 10.0, "sub_batches": 4}
ESTIMATORS: list[dict[str, Any]] = [
    {},
    {"derivative": "exact"},
    {"estimator": "reference"},
    {"estimator": "reference", "max_batch_size": 5},
    {"estimator": "sampled", "num_sampled": 4},
]


def step(model: nn.Module, criterion: Any, x: Any, y: Any, **how: Any) -> Any:
    return regularized_backward(model, criterion, x, y, **(COMMON | how))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": math.nan}, "beta must be finite, got nan"),
        ({"beta": math.inf}, "beta must be finite, got inf"),
        ({"loss_scale": math.nan}, "loss_scale must be finite, got nan"),
        ({"loss_scale": -math.inf}, "loss_scale must be finite, got -inf"),
        ({"alpha": math.nan}, "alpha must be positive, got nan"),
        ({"alpha": math.inf}, "alpha must be positive, got inf"),
        ({"max_batch_size": 0}, "max_batch_size must be an integer of at least 1, got 0"),
        ({"max_batch_size": 2.5}, "max_batch_size must be an integer of at least 1, got 2.5"),
        ({"sub_batches": 4.0}, "sub_batches must divide the local batch, got 4.0 and 16"),
        ({"sub_batches": None, "sub_batch_size": 4.0}, "sub_batch_size must divide the local batch, got 4.0 and 16"),
    ],
)
def test_numbers(settings: dict[str, Any], message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message):
        step(model, F.cross_entropy, *data(), **settings)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].num_batches_tracked == 0


X, Y = data()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ({"pixels": X}, Y, r"images must be a tensor \(B, ...\), got dict"),
        ([X, X], Y, r"images must be a tensor \(B, ...\), got list"),
        (X, (Y, Y), r"labels must be a tensor \(B, ...\), got tuple"),
        (X, Y[:12], r"images and labels must be as many, got \(16, 3, 8, 8\) and \(12,\)"),
        (X[0, 0, 0, 0], Y, r"images and labels must be as many, got \(\) and \(16,\)"),
        (X, torch.rand(16, 5, dtype=torch.float64).requires_grad_(), "labels must not require a gradient"),
    ],
)
def test_batches(x: Any, y: Any, message: str) -> None:
    for call in (step, plain_backward):
        with pytest.raises(ValueError, match=message):
            call(net(), F.cross_entropy, x, y)  # type: ignore[operator]


def test_without_gradients() -> None:
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, pytest.raises(ValueError, match=r"call it outside torch\.no_grad and torch\.inference_mode"):
            step(net(), F.cross_entropy, X.clone(), Y)
    loss_fn, params = functional_loss(net()), trainable_parameters(net())
    with torch.no_grad(), pytest.raises(ValueError, match=r"and not under torch\.no_grad"):
        sub_batch_penalty(loss_fn, params, [(X, Y)], 1e-4)
    expected = gradient_gram(loss_fn, params, (X, Y))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(gradient_gram(loss_fn, params, (X, Y)), expected)
    with torch.inference_mode():
        images = X.clone()
    assert torch.equal(gradient_gram(loss_fn, params, (images, Y)), expected)
    one, other = net(), net()
    step(one, F.cross_entropy, X, Y)
    step(other, F.cross_entropy, images, Y)
    torch.testing.assert_close([p.grad for p in other.parameters()], [p.grad for p in one.parameters()])


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits - F.one_hot(labels, 5)).square().sum()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), "a mean over its batch, got reduction='sum'"),
        (nn.CrossEntropyLoss(reduction="none"), "a mean over its batch, got reduction='none'"),
        (nn.MultiMarginLoss(reduction="sum"), "a mean over its batch, got reduction='sum'"),
        (functools.partial(F.cross_entropy, reduction="sum"), "a mean over its batch, got reduction='sum'"),
        (lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum"), "got reduction='sum'"),
        (
            lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
            r"a scalar \(reduction='mean'\), got a tensor of shape \(4,\)",
        ),
        (summed, "over half a batch it is half as large"),
        (
            lambda logits, labels: 3 * F.cross_entropy(logits, labels, reduction="sum"),
            "over half a batch it is half as large",
        ),
        (lambda logits, labels: 1.0, r"a scalar \(reduction='mean'\), got float"),
    ],
)
def test_losses_that_are_no_mean(criterion: Any, message: str) -> None:
    model = net()
    with pytest.raises(ValueError, match=message) as refused:
        step(model, criterion, X, Y)
    assert "\n" not in str(refused.value)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_sum_divided_by_its_size_is_a_mean() -> None:
    found = []
    for criterion in (
        F.cross_entropy,
        lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum") / len(labels),
        lambda logits, labels: F.cross_entropy(logits, labels, reduction="none").mean(),
    ):
        model = net()
        step(model, criterion, X, Y)
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found[2], found[0], rtol=1e-10, atol=1e-13)


WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5, 0.0], dtype=torch.float64)


def without_norm() -> nn.Sequential:
    model = net()
    model[1] = nn.Identity()
    return model


COUNTING: dict[str, tuple[Any, int, Tensor | None]] = {
    "default": (F.cross_entropy, -100, None),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=1), 1, None),
    "weight": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), -100, WEIGHT),
    "partial": (functools.partial(F.cross_entropy, ignore_index=2, weight=WEIGHT), 2, WEIGHT),
}


@pytest.mark.parametrize("how", ESTIMATORS, ids=str)
@pytest.mark.parametrize("name", COUNTING)
def test_labels_that_count_differently(name: str, how: dict[str, Any]) -> None:
    """Without BatchNorm L is the mean over the batch, however much the sub-batches count; so is the penalty."""
    criterion, ignored, weight = COUNTING[name]
    y = Y.clone()
    y[4:8] = y[9] = ignored
    whole = without_norm()
    expected_loss = criterion(whole(X), y)
    expected_loss.backward()

    plain = without_norm()
    losses = step(plain, criterion, X, y, beta=0.0, **how)
    torch.testing.assert_close(losses.loss, expected_loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close([p.grad for p in plain.parameters()], [p.grad for p in whole.parameters()])

    weights = torch.ones(5, dtype=torch.float64) if weight is None else weight
    shares = [float(weights[part[part != ignored]].sum()) for part in y.chunk(4)]
    expected: dict[str, Any] = {}
    for share, part_x, part_y in zip(shares, X.chunk(4), y.chunk(4), strict=True):
        if share:
            for key, term in algorithm_1(without_norm(), criterion, part_x, part_y, 1e-4, 1).items():
                expected[key] = expected.get(key, 0) + term * share / sum(shares)
    model = without_norm()
    assert step(model, criterion, X, y, beta=1e3, **how).penalty > 0
    found = {key: (p.grad - plain.get_parameter(key).grad) / 1e3 for key, p in model.named_parameters()}
    error = sum(float((found[key] - term).square().sum()) for key, term in expected.items())
    size = sum(float(term.square().sum()) for term in expected.values())
    assert (error / size) ** 0.5 < (1e-3 if "derivative" in how else 1e-8)


def test_a_batch_in_which_nothing_counts() -> None:
    model = net()
    losses = step(model, F.cross_entropy, X, torch.full_like(Y, -100))
    assert (float(losses.loss), float(losses.penalty)) == (0.0, 0.0)
    assert all(not parameter.grad.any() for parameter in model.parameters())


class Phases(nn.Module):
    """Complex weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(27, 9, dtype=torch.complex128) / 5)
        self.head = nn.Linear(9, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh((x[:, :, :3, :3].flatten(1) + 0j) @ self.weight).abs())


def test_complex_parameters() -> None:
    """As two real parameters each."""
    for derivative, alpha, tolerance in (("finite_difference", 1e-4, 1e-8), ("exact", 1e-7, 1e-4)):
        expected = algorithm_1(Phases(), F.cross_entropy, X, Y, alpha, 4)
        plain, model = Phases(), Phases()
        step(plain, F.cross_entropy, X, Y, alpha=alpha, beta=0.0, derivative=derivative)
        step(model, F.cross_entropy, X, Y, alpha=alpha, beta=0.1 / alpha, derivative=derivative)
        for name, parameter in model.named_parameters():
            found = (parameter.grad - plain.get_parameter(name).grad) * alpha / 0.1
            assert (found - expected[name]).norm() < tolerance * expected[name].norm()
    model = Phases()
    rows = []
    for n in range(16):
        grads = torch.autograd.grad(F.cross_entropy(model(X[n : n + 1]), Y[n : n + 1]), list(model.parameters()))
        rows.append(torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in grads]))
    jacobian = torch.stack(rows)
    gram = gradient_gram(functional_loss(model), trainable_parameters(model), (X, Y))
    torch.testing.assert_close(gram, jacobian @ jacobian.T, rtol=1e-10, atol=1e-12)


def test_sparse_gradients_are_refused() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x).mean(1))

    with pytest.raises(
        ValueError, match=r"'embed\.weight' has a sparse gradient, which is not supported: sparse=False"
    ):
        step(Tokens(), F.cross_entropy, torch.randint(7, (16, 3)), Y)


def test_cached_parametrizations_are_refused() -> None:
    model = net()
    nn.utils.parametrizations.weight_norm(model[3])
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match=r"outside parametrize\.cached"):
        step(model, F.cross_entropy, X, Y)


def test_a_criterion_may_share_parameters_with_the_model() -> None:
    class Margin(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels) + self.weight.square().sum()

    found = []
    for kind in ("shared", "method"):
        model = net()

        class Own(nn.Module):
            def __init__(self, inner: nn.Sequential) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x)

            def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
                return F.cross_entropy(logits, labels) + self.inner[6].weight.square().sum()

        own = Own(model)
        step(own, Margin(model[6].weight) if kind == "shared" else own.loss, X, Y, alpha=1e-2)
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found[0], found[1])


# Hooks of the parameters.


@pytest.mark.parametrize("how", ESTIMATORS, ids=str)
def test_tensor_hooks_fire_once_with_the_whole_gradient(how: dict[str, Any]) -> None:
    expected, model = net(), net()
    torch.manual_seed(0)
    step(expected, F.cross_entropy, X, Y, **how)
    fired: Counter[str] = Counter()
    seen: dict[str, Tensor] = {}

    def record(name: str, gradient: Tensor) -> None:
        fired[name] += 1
        seen[name] = gradient.clone()

    for name, parameter in model.named_parameters():
        parameter.register_hook(functools.partial(record, name))
    model[0].weight.register_hook(lambda gradient: gradient * 0)  # a pruning mask
    handle = model[3].weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    torch.manual_seed(0)
    step(model, F.cross_entropy, X, Y, **how)
    assert fired == {name: 1 for name, _ in model.named_parameters()}
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-12, atol=1e-15)
    assert not model[0].weight.grad.any()
    torch.testing.assert_close(model[3].weight.grad, expected[3].weight.grad.clamp(-1e-3, 1e-3))
    handle.remove()
    assert len(model[3].weight._backward_hooks) == 1
    assert len(model[0].weight._backward_hooks) == 2


def test_hooks_are_back_after_an_exception() -> None:
    model = net()
    model[0].weight.register_hook(lambda gradient: gradient * 2)
    hooks = model[0].weight._backward_hooks

    def failing(logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[0] == 16:
            raise RuntimeError("stop")
        return F.cross_entropy(logits, labels)

    with pytest.raises(RuntimeError, match="stop"):
        step(model, failing, X, Y, estimator="reference")
    assert model[0].weight._backward_hooks is hooks


def test_hooks_of_a_parameter_that_the_last_pass_does_not_reach_fire_once() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.unused = (nn.Linear(192, 5).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out = self.first(x.flatten(1))
            return out + self.second(x.flatten(1)).tanh() if float(x.sum()) > 0 else out

    x = X.abs()
    x[12:] *= -1
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        expected, model = Skipping(), Skipping()
        step(expected, F.cross_entropy, x, Y)
        fired: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            getattr(parameter, hook)(lambda _, name=name, fired=fired: fired.update([name]))
        step(model, F.cross_entropy, x, Y)
        assert fired == {name: 1 for name, _ in model.named_parameters() if not name.startswith("unused")}
        for one, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("labels", [(16, 6, 6), (16,)])
def test_pixels_that_are_ignored(labels: tuple[int, ...]) -> None:
    """A loss over positions: sub-batches count by their positions."""
    x = X[..., :6, :6].clone()
    torch.manual_seed(2)
    y = torch.randint(5, labels)
    y[torch.rand(labels) < 0.4] = 255
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 5, 1)]
    if len(labels) == 1:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers).double()
    expected = criterion(model(x), y)
    expected.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for how in ({}, {"estimator": "sampled", "num_sampled": 1}, {"estimator": "reference", "max_batch_size": 3}):
        model.zero_grad()
        losses = step(model, criterion, x, y, beta=0.0, **how)
        torch.testing.assert_close(losses.loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close([p.grad for p in model.parameters()], gradients)
    model.zero_grad()
    plain_backward(model, criterion, x, y, max_batch_size=3)
    torch.testing.assert_close([p.grad for p in model.parameters()], gradients)


def test_scalar_parameters_keep_their_type() -> None:
    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.temperature = net().float(), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) / self.temperature

    y = Y.clone()
    y[0] = -100
    model = Tempered()
    losses = step(model, F.cross_entropy, X.float(), y)
    assert losses.loss.dtype == losses.penalty.dtype == torch.float32
    assert model.temperature.grad is not None
    assert model.temperature.grad.dtype == torch.float32
