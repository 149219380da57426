import gc
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from infomcr_dist import inspection, regularized_backward
from infomcr_dist.functional import Params, functional_loss, trainable_parameters
from infomcr_dist.regularizer import finite_difference_error, plain_backward, sub_batch_penalty

ALPHA, BETA = 1e-4, 10.0


def smooth_net(batch_norm: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=not batch_norm),
        nn.BatchNorm2d(5) if batch_norm else nn.Identity(),
        nn.SiLU(),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(24, 4),
    ).double()


def batch_of(size: int = 24, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 6, 6, dtype=torch.float64, generator=generator)
    return images, torch.randint(4, (size,), generator=generator)


def split(batch: tuple[Tensor, Tensor], count: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch[0].chunk(count), batch[1].chunk(count), strict=True))


def flat(params: Params) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in params.values()])


def grads(model: nn.Module) -> Tensor:
    return flat({name: parameter.grad for name, parameter in trainable_parameters(model).items()})


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def double_backward(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of H_i g_i = the gradient of half the mean squared gradient norm."""
    params = list(trainable_parameters(model).values())
    total: Any = 0
    for images, labels in batches:
        g = torch.autograd.grad(F.cross_entropy(model(images), labels), params, create_graph=True)
        total = total + sum(t.square().sum() for t in g) / (2 * len(batches))
    return torch.cat([t.flatten() for t in torch.autograd.grad(total, params)])


# The pure function.


@pytest.mark.parametrize("derivative", ["finite_difference", "exact"])
def test_a_quadratic_gives_its_closed_form(derivative: Any) -> None:
    # L(B, w) = wᵀ A w / 2 with A symmetric: g = A w, h = A (w − αg), so g − h = α A² w for every α.
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(3, 6, 6, dtype=torch.float64, generator=generator)
    matrices = roots @ roots.mT
    w = torch.randn(6, dtype=torch.float64, generator=generator)
    alpha = 0.01

    def loss_fn(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return params["w"] @ batch[0] @ params["w"] / 2

    result = sub_batch_penalty(loss_fn, {"w": w}, [(a, torch.zeros(0)) for a in matrices], alpha, derivative)
    squares = torch.stack([a @ a for a in matrices])
    torch.testing.assert_close(result.loss_gradient["w"], (matrices @ w).mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(result.penalty_gradient["w"], alpha * (squares @ w).mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(result.loss, torch.stack([w @ a @ w / 2 for a in matrices]).mean(), rtol=1e-13, atol=0)
    # L(w) − L(w − αg) = α gᵀg − α² gᵀAg / 2; its limit keeps the first term.
    second = alpha**2 * (w @ torch.stack([a @ a @ a for a in matrices]) @ w) / 2
    penalty = alpha * (w @ squares @ w) - (second if derivative == "finite_difference" else 0)
    torch.testing.assert_close(result.penalty, penalty.mean(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_exact_derivative_is_double_backward(batch_norm: bool) -> None:
    model, batches = smooth_net(batch_norm), split(batch_of(), 3)
    result = sub_batch_penalty(functional_loss(model), trainable_parameters(model), batches, ALPHA, "exact")
    assert relative(flat(result.penalty_gradient), ALPHA * double_backward(model, batches)) < 1e-12


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_error_of_the_finite_difference_falls_linearly_in_alpha(batch_norm: bool) -> None:
    model, batches = smooth_net(batch_norm), split(batch_of(), 3)
    exact = double_backward(model, batches)
    params, loss_fn = trainable_parameters(model), functional_loss(model)

    def error(alpha: float) -> float:
        return relative(flat(sub_batch_penalty(loss_fn, params, batches, alpha).penalty_gradient) / alpha, exact)

    coarse, middle, fine = error(1e-2), error(1e-3), error(1e-4)
    assert fine < 1e-3
    assert coarse / middle == pytest.approx(10, rel=0.1)
    assert middle / fine == pytest.approx(10, rel=0.01)


def test_sub_batches_are_normalized_by_their_own_statistics() -> None:
    model, batch = smooth_net(), batch_of()
    result = sub_batch_penalty(functional_loss(model), trainable_parameters(model), split(batch, 3), ALPHA)
    alone = torch.stack([F.cross_entropy(model(images), labels) for images, labels in split(batch, 3)])
    assert torch.equal(result.loss, alone.mean())
    assert abs(result.loss - F.cross_entropy(model(batch[0]), batch[1])) > 1e-4


def test_the_pure_function_changes_nothing() -> None:
    model = smooth_net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sub_batch_penalty(functional_loss(model), trainable_parameters(model), split(batch_of(), 3), ALPHA)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# One call in place of backward: each estimator against an expectation written out with plain autograd.


def plain_pair(model: nn.Module, batch: tuple[Tensor, Tensor], alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L(B), g, L(B) − L(B, w − αg), g − h by moving the weights of a copy."""
    params = trainable_parameters(model)
    loss = F.cross_entropy(model(batch[0]), batch[1])
    g = torch.autograd.grad(loss, list(params.values()))
    before = [parameter.detach().clone() for parameter in params.values()]
    with torch.no_grad():
        for parameter, direction in zip(params.values(), g, strict=True):
            parameter -= alpha * direction
    other = F.cross_entropy(model(batch[0]), batch[1])
    h = torch.autograd.grad(other, list(params.values()))
    with torch.no_grad():
        for parameter, value in zip(params.values(), before, strict=True):
            parameter.copy_(value)
    g_flat, h_flat = (torch.cat([t.flatten() for t in tensors]) for tensors in (g, h))
    return loss.detach(), g_flat, (loss - other).detach(), g_flat - h_flat


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("derivative", ["finite_difference", "exact"])
@pytest.mark.parametrize("estimator", ["fused", "reference"])
def test_fused_and_reference(estimator: Any, derivative: Any, batch_norm: bool) -> None:
    batch = batch_of()
    oracle = smooth_net(batch_norm)
    pairs = [plain_pair(oracle, piece, ALPHA) for piece in split(batch, 3)]
    loss, g, penalty, difference = (torch.stack(terms).mean(0) for terms in zip(*pairs, strict=True))
    if estimator == "reference":
        loss = F.cross_entropy(oracle(batch[0]), batch[1])
        g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, list(oracle.parameters()))])
    if derivative == "exact":
        difference = ALPHA * double_backward(oracle, split(batch, 3))

    model = smooth_net(batch_norm)
    losses = regularized_backward(
        model,
        F.cross_entropy,
        *batch,
        alpha=ALPHA,
        beta=BETA,
        sub_batches=3,
        estimator=estimator,
        derivative=derivative,
    )
    assert relative(grads(model) - g, BETA * difference) < 1e-9
    torch.testing.assert_close(losses.loss, loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(losses.penalty, penalty, rtol=1e-2 if derivative == "exact" else 1e-9, atol=0)
    assert not losses.loss.requires_grad
    assert not losses.penalty.requires_grad


@pytest.mark.parametrize("derivative", ["finite_difference", "exact"])
def test_sampled_penalizes_some_sub_batches_and_takes_the_others_plain(derivative: Any, monkeypatch: Any) -> None:
    batch, oracle = batch_of(), smooth_net()
    pieces = split(batch, 4)
    chosen, rest = [pieces[3], pieces[1]], tuple(torch.cat(t) for t in zip(pieces[0], pieces[2], strict=True))
    pairs = [plain_pair(oracle, piece, ALPHA) for piece in chosen]
    difference = torch.stack([pair[3] for pair in pairs]).mean(0)
    if derivative == "exact":
        difference = ALPHA * double_backward(oracle, chosen)
    rest_loss, rest_gradient, *_ = plain_pair(oracle, rest, ALPHA)
    expected = (pairs[0][1] + pairs[1][1]) / 4 + rest_gradient / 2

    model = smooth_net()
    monkeypatch.setattr(torch, "randperm", lambda count: torch.tensor([3, 1, 2, 0]))
    losses = regularized_backward(
        model,
        F.cross_entropy,
        *batch,
        alpha=ALPHA,
        beta=BETA,
        sub_batches=4,
        estimator="sampled",
        num_sampled=2,
        derivative=derivative,
    )
    assert relative(grads(model) - expected, BETA * difference) < 1e-9
    torch.testing.assert_close(losses.loss, (pairs[0][0] + pairs[1][0]) / 4 + rest_loss / 2, rtol=1e-13, atol=0)


def test_sampled_is_unbiased_over_all_choices(monkeypatch: Any) -> None:
    batch = batch_of()
    common: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "sub_batches": 4}
    full = smooth_net(batch_norm=False)
    expected = regularized_backward(full, F.cross_entropy, *batch, **common)
    gradients, losses = [], []
    for order in itertools.permutations(range(4)):
        if order[0] > order[1] or order[2] > order[3]:
            continue
        monkeypatch.setattr(torch, "randperm", lambda count, order=order: torch.tensor(order))
        model = smooth_net(batch_norm=False)
        losses.append(
            regularized_backward(model, F.cross_entropy, *batch, **common, estimator="sampled", num_sampled=2)
        )
        gradients.append(grads(model))
    assert len(gradients) == 6
    assert relative(torch.stack(gradients).mean(0), grads(full)) < 1e-13
    assert max(relative(g, grads(full)) for g in gradients) > 1e-4
    for field in ("loss", "penalty"):
        mean = torch.stack([getattr(one, field) for one in losses]).mean()
        torch.testing.assert_close(mean, getattr(expected, field), rtol=1e-10, atol=0)


def test_sampling_draws_afresh_from_the_seeded_generator() -> None:
    batch, model = batch_of(), smooth_net()

    def draw() -> Tensor:
        model.zero_grad()
        regularized_backward(
            model, F.cross_entropy, *batch, alpha=ALPHA, beta=1e4, sub_batches=4, estimator="sampled", num_sampled=1
        )
        return grads(model)

    torch.manual_seed(3)
    first = [draw() for _ in range(8)]
    torch.manual_seed(3)
    assert all(torch.equal(draw(), gradient) for gradient in first)
    assert len({float(gradient.sum()) for gradient in first}) == 4


def test_sampling_all_sub_batches_is_fused(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "randperm", torch.arange)
    batch, one, other = batch_of(), smooth_net(), smooth_net()
    common: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "sub_batches": 4}
    regularized_backward(one, F.cross_entropy, *batch, **common)
    regularized_backward(other, F.cross_entropy, *batch, **common, estimator="sampled", num_sampled=4)
    assert torch.equal(grads(one), grads(other))


def test_without_penalty_the_reference_gives_the_plain_gradient_bit_for_bit() -> None:
    (images, labels), one, other = batch_of(), smooth_net().float(), smooth_net().float()
    F.cross_entropy(one(images.float()), labels).backward()
    regularized_backward(
        other, F.cross_entropy, images.float(), labels, alpha=ALPHA, beta=0.0, sub_batches=4, estimator="reference"
    )
    assert torch.equal(grads(one), grads(other))
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(("estimator", "num_sampled"), [("fused", None), ("sampled", 1)])
def test_without_penalty_and_batch_norm_the_gradient_is_the_plain_one(estimator: Any, num_sampled: int | None) -> None:
    batch, one, other = batch_of(), smooth_net(batch_norm=False), smooth_net(batch_norm=False)
    F.cross_entropy(one(batch[0]), batch[1]).backward()
    regularized_backward(
        other,
        F.cross_entropy,
        *batch,
        alpha=ALPHA,
        beta=0.0,
        sub_batches=4,
        estimator=estimator,
        num_sampled=num_sampled,
    )
    assert relative(grads(other), grads(one)) < 1e-13


# What must hold around the call.

ESTIMATORS: list[dict[str, Any]] = [
    {"estimator": estimator, "derivative": derivative} | ({"num_sampled": 2} if estimator == "sampled" else {})
    for estimator in ("fused", "sampled", "reference")
    for derivative in ("finite_difference", "exact")
]
EVERY_ESTIMATOR = pytest.mark.parametrize("how", ESTIMATORS, ids=lambda how: f"{how['estimator']}-{how['derivative']}")


def run(model: nn.Module, batch: tuple[Tensor, Tensor], how: dict[str, Any], **settings: Any) -> Any:
    settings = {"alpha": ALPHA, "beta": BETA, "sub_batches": 4} | settings
    torch.manual_seed(5)
    return regularized_backward(model, F.cross_entropy, *batch, **settings, **how)


@EVERY_ESTIMATOR
def test_every_hook_fires_once_when_the_gradient_is_final(how: dict[str, Any]) -> None:
    model, fired, seen = smooth_net(), Counter[str](), {}

    def record(name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            fired[name] += 1
            assert parameter.grad is not None
            seen[name] = parameter.grad.clone()

        return hook

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(record(name))
    run(model, batch_of(), how)
    assert fired == {name: 1 for name, _ in model.named_parameters()}
    assert all(torch.equal(seen[name], parameter.grad) for name, parameter in model.named_parameters())


@EVERY_ESTIMATOR
def test_weights_keep_their_bits_and_their_storage(how: dict[str, Any]) -> None:
    model = smooth_net().float()
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    run(model, (batch_of()[0].float(), batch_of()[1]), how)
    for parameter, (address, version, value) in zip(model.parameters(), before, strict=True):
        assert (parameter.data_ptr(), parameter._version) == (address, version)
        assert torch.equal(parameter, value)


@EVERY_ESTIMATOR
def test_gradients_accumulate_and_scale(how: dict[str, Any]) -> None:
    batch, once, twice = batch_of(), smooth_net(), smooth_net()
    run(once, batch, how)
    first = run(twice, batch, how, loss_scale=0.25)
    second = run(twice, batch, how, loss_scale=0.75)
    assert relative(grads(twice), grads(once)) < 1e-12
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-13, atol=0)


@EVERY_ESTIMATOR
def test_running_statistics_move_as_in_a_plain_step(how: dict[str, Any]) -> None:
    # With sub-batches that are copies of each other, sub-batch means and the batch mean agree.
    images, labels = batch_of(6)
    batch = images.repeat(4, 1, 1, 1), labels.repeat(4)
    plain, model = smooth_net(), smooth_net()
    run(model, batch, how)
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1
    plain(batch[0])
    got, expected = model[1], plain[1]
    assert got.momentum == 0.1
    assert got.num_batches_tracked == 1
    torch.testing.assert_close(got.running_mean, expected.running_mean, rtol=1e-12, atol=0)
    # The unbiased variance of 6 images differs from that of 24 by the factor n / (n - 1).
    torch.testing.assert_close(got.running_var, expected.running_var, rtol=0.02, atol=0)


@EVERY_ESTIMATOR
def test_dropout_uses_one_mask_in_both_passes(how: dict[str, Any]) -> None:
    # Linear in the mask: with the same mask the penalty is α‖g‖² to first order, positive and small.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 4)).double()
    penalties = torch.stack([run(model, batch_of(seed=seed), how).penalty for seed in range(5)])
    assert (penalties > 0).all()
    assert (penalties < 0.01).all()


def test_dropout_draws_new_masks_for_new_sub_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 4)).double()
    masks: list[Tensor] = []
    batch = torch.ones(8, 3, 6, 6, dtype=torch.float64), torch.arange(8) % 4
    run(model, batch, {})  # the first call looks at passes of its own
    model[1].register_forward_hook(lambda module, args, output: masks.append(output.detach() != 0))
    run(model, batch, {"estimator": "fused"})
    pairs = list(zip(masks[::2], masks[1::2], strict=True))
    assert len(pairs) == 4
    assert all(torch.equal(first, second) for first, second in pairs)
    assert not any(torch.equal(one[0], other[0]) for one, other in itertools.combinations(pairs, 2))


@EVERY_ESTIMATOR
def test_an_exception_leaves_no_trace(how: dict[str, Any]) -> None:
    model, calls = smooth_net(), Counter[str]()

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        calls["criterion"] += 1
        if calls["criterion"] == 3:
            raise RuntimeError("no more memory")
        return F.cross_entropy(logits, labels)

    calls["criterion"] = 3  # the first call looks at passes of its own
    regularized_backward(model, criterion, *batch_of(), alpha=ALPHA, beta=BETA, sub_batches=4, **how)
    calls["criterion"] = 0
    state = {name: tensor.clone() for name, tensor in model.named_parameters()}
    before = grads(model)
    precision = torch.backends.cudnn.conv.fp32_precision
    with pytest.raises(RuntimeError, match="no more memory"):
        regularized_backward(model, criterion, *batch_of(), alpha=ALPHA, beta=BETA, sub_batches=4, **how)
    assert torch.equal(grads(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.named_parameters())
    assert model[1].momentum == 0.1
    assert torch.backends.cudnn.conv.fp32_precision == precision


@EVERY_ESTIMATOR
def test_frozen_unused_and_shared_parameters(how: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(108, 108), nn.Linear(108, 108), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)
            self.head = nn.Linear(108, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(F.silu(self.second(F.silu(self.first(images.flatten(1))))))

    torch.manual_seed(0)
    model = Net().double()
    run(model, batch_of(), how)
    assert model.first.bias.grad is None
    assert model.unused.weight.grad is None
    used = {n: p for n, p in trainable_parameters(model).items() if not n.startswith("unused")}
    got = flat({name: p.grad for name, p in used.items()})
    if how["estimator"] != "sampled":
        loss_fn, batch = functional_loss(model), batch_of()
        pure = sub_batch_penalty(loss_fn, used, split(batch, 4), ALPHA, how["derivative"])
        assert relative(got, flat(pure.loss_gradient) + BETA * flat(pure.penalty_gradient)) < 1e-12


def test_layouts_with_equal_sub_batch_size_give_equal_gradients() -> None:
    batch = batch_of(32)
    one = smooth_net()
    regularized_backward(one, F.cross_entropy, *batch, alpha=ALPHA, beta=BETA, sub_batch_size=4)
    workers = []
    for part in split(batch, 4):
        worker = smooth_net()
        regularized_backward(worker, F.cross_entropy, *part, alpha=ALPHA, beta=BETA, sub_batch_size=4)
        workers.append(grads(worker))
    assert relative(torch.stack(workers).mean(0), grads(one)) < 1e-13


def test_the_penalty_follows_the_size_of_a_sub_batch() -> None:
    # E‖g_i‖² = ‖g‖² + tr(Σ) / |B_i| over all sub-batches drawn with replacement: here by their closed form on pairs.
    model, (images, labels) = smooth_net(batch_norm=False), batch_of(6)
    loss_fn, params = functional_loss(model), trainable_parameters(model)

    def penalty(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        return sub_batch_penalty(loss_fn, params, batches, 1.0, "exact").penalty

    singles = penalty([(images[i : i + 1], labels[i : i + 1]) for i in range(6)])
    pairs = penalty([(images[[i, j]], labels[[i, j]]) for i in range(6) for j in range(6)])
    whole = penalty([(images, labels)])
    torch.testing.assert_close(pairs, whole + (singles - whole) / 2, rtol=1e-12, atol=0)


# Precision.


@pytest.fixture
def low_precision() -> Iterator[None]:
    """TF32 in cuDNN's convolutions, bfloat16 in oneDNN's matrix products."""
    backends: Any = torch.backends
    operations = backends.cudnn.conv, backends.mkldnn.matmul
    before = [operation.fp32_precision for operation in operations]
    for operation, precision in zip(operations, ("tf32", "bf16"), strict=True):
        operation.fp32_precision = precision
    yield
    for operation, precision in zip(operations, before, strict=True):
        operation.fp32_precision = precision


@pytest.mark.usefixtures("low_precision")
def test_finite_differences_run_in_full_precision() -> None:
    backends: Any = torch.backends
    seen = []

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        precisions = backends.cudnn.conv.fp32_precision, backends.mkldnn.matmul.fp32_precision
        seen.append((*precisions, torch.is_autocast_enabled("cpu"), logits.dtype))
        return F.cross_entropy(logits, labels)

    model, (images, labels) = smooth_net().float(), batch_of()
    common: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "sub_batches": 2, "estimator": "sampled", "num_sampled": 1}
    regularized_backward(model, criterion, images.float(), labels, **common)
    seen.clear()  # the first call looks at passes of its own
    with torch.autocast("cpu", torch.bfloat16):
        common["derivative"] = "finite_difference"
        regularized_backward(model, criterion, images.float(), labels, **common, step="alpha")
        assert torch.is_autocast_enabled("cpu")
    full, plain = ("ieee", "ieee", False, torch.float32), ("tf32", "bf16", True, torch.bfloat16)
    assert seen == [full, full, plain]
    assert backends.cudnn.conv.fp32_precision == "tf32"
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        regularized_backward(model, criterion, images.float(), labels, **common)
    assert seen == [plain, plain, plain]


@pytest.mark.parametrize("derivative", ["finite_difference", "exact", "auto"])
@pytest.mark.parametrize("estimator", ["fused", "reference"])
def test_the_penalty_survives_autocast(estimator: Any, derivative: Any) -> None:
    batch, oracle = batch_of(), smooth_net()
    expected = ALPHA * double_backward(oracle, split(batch, 4))
    model, batch = smooth_net().float(), (batch[0].float(), batch[1])
    with torch.autocast("cpu", torch.bfloat16):
        how = {"estimator": estimator, "derivative": derivative} | ({} if derivative == "exact" else {"step": "alpha"})
        run(model, batch, how, beta=0.0)
        plain = grads(model)
        model.zero_grad()
        run(model, batch, how)
    assert relative(grads(model).double() - plain.double(), BETA * expected) < 0.01


@pytest.mark.parametrize("rho", [1e-6, 1e-3, 0.3, -1e-3, -0.3])
def test_a_quadratic_gives_the_exact_product_at_any_step(rho: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, dtype=torch.float64, generator=generator)
    matrices = [(lambda a: a @ a.T)(torch.randn(5, 5, dtype=torch.float64, generator=generator)) for _ in range(3)]

    def loss_fn(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return params["w"] @ batch[0] @ params["w"] / 2

    batches = [(a, torch.zeros(0)) for a in matrices]
    result = sub_batch_penalty(loss_fn, {"w": w}, batches, ALPHA, step=rho)
    expected = ALPHA * sum(a @ (a @ w) for a in matrices) / 3
    torch.testing.assert_close(result.penalty_gradient["w"], expected, rtol=1e-8, atol=0)
    lengths = [rho * w.norm() / (a @ w).norm() for a in matrices]
    parts = [
        ALPHA / length * (w @ a @ w - (w - length * a @ w) @ a @ (w - length * a @ w)) / 2
        for a, length in zip(matrices, lengths, strict=True)
    ]
    torch.testing.assert_close(result.penalty, torch.stack(parts).mean(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_error_of_a_longer_step_falls_with_it(sign: int) -> None:
    loss_fn, params, batch = functional_loss(smooth_net()), trainable_parameters(smooth_net()), batch_of()
    errors = [finite_difference_error(loss_fn, params, batch, ALPHA, sign * rho) for rho in (1e-2, 1e-3, 1e-4, 1e-5)]
    for error, smaller in itertools.pairwise(errors):
        assert smaller == pytest.approx(error / 10, rel=0.1)


@pytest.mark.parametrize("rounded", [False, True])
def test_a_gpu_that_takes_products_in_tf32_takes_a_longer_step(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "rounds_float32", lambda device: rounded)
    batch, found = batch_of(), []
    for step in ("auto", 3e-3 if rounded else "alpha"):
        model = smooth_net()
        run(model, batch, {}, step=step)
        found.append(grads(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("how", [{}, {"estimator": "reference"}, {"estimator": "sampled", "num_sampled": 4}])
def test_autocast_takes_a_longer_step(how: Any) -> None:
    batch, oracle = batch_of(), smooth_net()
    expected = ALPHA * double_backward(oracle, split(batch, 4))
    model, batch = smooth_net().float(), (batch[0].float(), batch[1])
    found = []
    for beta in (0.0, 1e3):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            penalty = run(model, batch, how, beta=beta).penalty
        found.append(grads(model).double())
    assert relative((found[1] - found[0]) / 1e3, expected) < 0.3  # of a step of length alpha: above 1, as below
    mean = torch.stack([sum((g**2).sum() for g in gs) for gs in squared(oracle, split(batch_of(), 4))]).mean()
    torch.testing.assert_close(penalty.double(), ALPHA * mean, rtol=0.2, atol=0)


def squared(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, ...]]:
    """The gradient of each batch."""
    params = list(trainable_parameters(model).values())
    return [torch.autograd.grad(F.cross_entropy(model(x), y), params) for x, y in batches]


def test_a_gradient_of_zeros_moves_nothing() -> None:
    model, images, labels = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.zeros(4, 4), torch.tensor([0, 1] * 2)
    nn.init.zeros_(model[1].bias)  # then every logit is 0, and the labels are balanced
    losses = regularized_backward(
        model, F.cross_entropy, images, labels, alpha=ALPHA, beta=BETA, sub_batches=2, step=1e-2
    )
    assert losses.penalty == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_a_finite_difference_inside_autocast_would_be_noise() -> None:
    # Why "auto" takes a longer step there: the same difference taken by hand, in bfloat16.
    batch, oracle = batch_of(), smooth_net()
    expected = ALPHA * double_backward(oracle, [batch])
    with torch.autocast("cpu", torch.bfloat16):
        *_, difference = plain_pair(smooth_net().float(), (batch[0].float(), batch[1]), ALPHA)
    assert relative(difference.double(), expected) > 1


def test_the_finite_difference_error_shows_rounding_and_kinks() -> None:
    batch = batch_of()
    smooth = smooth_net()
    params, loss_fn = trainable_parameters(smooth), functional_loss(smooth)
    assert finite_difference_error(loss_fn, params, batch, 1e-4) < 1e-3
    assert finite_difference_error(loss_fn, params, batch, 1e-2) == pytest.approx(
        100 * finite_difference_error(loss_fn, params, batch, 1e-4), rel=0.1
    )
    single, batch_32 = smooth_net().float(), (batch[0].float(), batch[1])
    params_32, loss_32 = trainable_parameters(single), functional_loss(single)
    assert finite_difference_error(loss_32, params_32, batch_32, 1e-4) < 1e-2
    assert finite_difference_error(loss_32, params_32, batch_32, 1e-6) > 1e-2  # rounding of the weights
    assert finite_difference_error(loss_32, params_32, batch_32, 1e-9) == 1  # which no longer notice the step
    kinked = nn.Sequential(nn.Flatten(), nn.Linear(108, 500), nn.ReLU(), nn.Linear(500, 4)).double()
    assert finite_difference_error(functional_loss(kinked), trainable_parameters(kinked), batch, 1.0) > 0.1
    # The masks are the same in both derivatives.
    dropout = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 4)).double()
    assert finite_difference_error(functional_loss(dropout), trainable_parameters(dropout), batch, 1e-4) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_few_bits_take_the_exact_derivative(dtype: torch.dtype) -> None:
    model, batch = smooth_net().to(dtype), (batch_of()[0].to(dtype), batch_of()[1])
    with pytest.raises(ValueError, match="derivative='finite_difference' is rounding noise"):
        run(model, batch, {}, derivative="finite_difference")
    losses = run(model, batch, {})
    expected = run(smooth_net(), batch_of(), {})
    torch.testing.assert_close(losses.penalty.double(), expected.penalty, rtol=0.05, atol=0)


def test_a_criterion_that_learns_is_refused() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels, self.weight)

    with pytest.raises(ValueError, match="criterion must have no trainable parameters"):
        regularized_backward(smooth_net().float(), Weighted(), *batch_of(), alpha=ALPHA, beta=BETA, sub_batches=4)


def test_autocast_to_float16_is_refused() -> None:
    model, batch = smooth_net().float(), (batch_of()[0].float(), batch_of()[1])
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="needs loss scaling"):
        run(model, batch, {})


# What models come wrapped in.


@EVERY_ESTIMATOR
def test_channels_last(how: dict[str, Any]) -> None:
    batch, model, expected = batch_of(), smooth_net(), smooth_net()
    model = model.to(memory_format=torch.channels_last)
    run(model, (batch[0].to(memory_format=torch.channels_last), batch[1]), how)
    run(expected, batch, how)
    assert relative(grads(model), grads(expected)) < 1e-12
    assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # read by torch.compile itself
@pytest.mark.parametrize("estimator", ["fused", "sampled", "reference"])
def test_a_compiled_model(estimator: str) -> None:
    how = {"estimator": estimator} | ({"num_sampled": 1} if estimator == "sampled" else {})
    plain, batch = smooth_net(), batch_of()
    run(plain, batch, how)
    for compiled in (torch.compile(smooth_net(), backend="aot_eager"), smooth_net()):
        if isinstance(compiled, nn.Sequential):
            compiled.compile(backend="aot_eager")
        with pytest.raises(ValueError, match=r"which torch\.compile does not"):
            run(compiled, batch, how, derivative="exact")
        run(compiled, batch, how)
        assert relative(grads(compiled), grads(plain)) < 1e-12
        assert all(
            torch.allclose(one.double(), other.double())
            for one, other in zip(compiled.buffers(), plain.buffers(), strict=True)
        )


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrappers_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="static_graph=True"):
        run(DistributedDataParallel(smooth_net(), static_graph=True), batch_of(), {})
    with pytest.raises(ValueError, match="must be the outermost wrapper"):
        run(nn.Sequential(DistributedDataParallel(smooth_net())), batch_of(), {})
    with pytest.raises(ValueError, match=r"give model\.module"):
        functional_loss(DistributedDataParallel(smooth_net()))


def test_distributed_data_parallel_averages_once(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(average_on_two_workers, (tmp_path,), nprocs=2)


def average_on_two_workers(rank: int, path: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    parts = split(batch_of(32), 2)
    for how in ESTIMATORS:
        serial = []
        for part in parts:
            alone = smooth_net()
            run(alone, part, how)
            serial.append(grads(alone))
        expected = torch.stack(serial).mean(0)
        model, sent = DistributedDataParallel(smooth_net()), []

        def count(
            _: None, bucket: torch.distributed.GradBucket, sent: list[int] = sent
        ) -> torch.futures.Future[torch.Tensor]:
            sent.append(bucket.buffer().numel())
            work = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
            return work.then(lambda future: future.value()[0])

        model.register_comm_hook(None, count)
        for _ in range(2):
            model.zero_grad()
            run(model, parts[rank], how)
            assert relative(grads(model.module), expected) < 1e-12, how
        assert sum(sent) == 2 * sum(parameter.numel() for parameter in model.parameters()), how
        del model
        gc.collect()  # the model refers to itself, and to the process group, whose threads must end before the process
    torch.distributed.barrier()  # a worker that leaves early takes gloo's threads of the other by surprise
    torch.distributed.destroy_process_group()


# Memory.


def peak_in_parameters(how: dict[str, Any] | None, sub_batches: int) -> float:
    """Peak of what one step allocates, gradients included, in sizes of the parameters."""
    model = nn.Sequential(nn.Linear(600, 600), nn.SiLU(), nn.Linear(600, 600))
    batch = torch.randn(8, 600), torch.randint(600, (8,))
    with torch.profiler.profile(profile_memory=True) as profiler:
        if how is None:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        else:
            run(model, batch, how, sub_batches=sub_batches)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes)) / sum(p.numel() * p.element_size() for p in model.parameters())


@EVERY_ESTIMATOR
def test_a_step_holds_at_most_two_more_copies_of_the_parameters(how: dict[str, Any]) -> None:
    plain = peak_in_parameters(None, 1)
    assert plain == pytest.approx(1, abs=0.1)
    peaks = [peak_in_parameters(how, count) for count in (2, 4, 8)]
    assert max(peaks) - min(peaks) < 0.1
    assert max(peaks) - plain < 2.1


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sub_batches": 7}, "sub_batches must divide the local batch, got 7 and 24"),
        ({"sub_batches": 0}, "sub_batches must divide the local batch, got 0 and 24"),
        ({"sub_batches": None, "sub_batch_size": 16}, "sub_batch_size must divide the local batch, got 16 and 24"),
        ({"sub_batch_size": 6}, "give either sub_batches or sub_batch_size, got 4 and 6"),
        ({"sub_batches": None}, "give either sub_batches or sub_batch_size, got None and None"),
        ({"estimator": "quick"}, "estimator must be one of fused, sampled, reference, got 'quick'"),
        ({"estimator": "sampled"}, "num_sampled must be from 1 to the number of sub-batches, 4, got None"),
        (
            {"estimator": "sampled", "num_sampled": 5},
            "num_sampled must be from 1 to the number of sub-batches, 4, got 5",
        ),
        ({"num_sampled": 2}, "num_sampled needs estimator='sampled', got num_sampled=2 and estimator='fused'"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"alpha": float("nan")}, "alpha must be positive, got nan"),
        ({"derivative": "euler"}, "derivative must be one of finite_difference, exact, got 'euler'"),
        ({"step": "far"}, "step must be 'alpha', 'auto' or a number between -1 and 1 that is not 0, got 'far'"),
        ({"step": 2.0}, "step must be 'alpha', 'auto' or a number between -1 and 1 that is not 0, got 2.0"),
        ({"step": 1e-3, "derivative": "exact"}, "derivative='exact' takes no step, got step=0.001"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_computed(settings: Any, message: str) -> None:
    model = smooth_net()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        run(model, batch_of(), {}, **settings)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model[1].num_batches_tracked == 0


def test_bad_input_of_the_pure_function() -> None:
    model = smooth_net()
    loss_fn, params = functional_loss(model), trainable_parameters(model)
    with pytest.raises(ValueError, match="sub_batches must hold at least one batch, got none"):
        sub_batch_penalty(loss_fn, params, [], ALPHA)
    with pytest.raises(ValueError, match="alpha must be positive, got -1"):
        sub_batch_penalty(loss_fn, params, split(batch_of(), 2), -1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have parameters that require a gradient, got none"):
        run(model, batch_of(), {})


@pytest.mark.parametrize("estimator", ["plain", "sampled", "reference"])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(estimator: str) -> None:
    """Without BatchNorm pieces of 3 images, the last smaller, add up to the batch; hooks fire once a parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 4)).double()
    images, labels = torch.randn(8, 5, dtype=torch.float64), torch.randint(4, (8,))
    fired: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    found = []
    for pieces in (None, 3):
        model.zero_grad()
        fired.clear()
        torch.manual_seed(1)
        if estimator == "plain":
            losses = plain_backward(model, nn.CrossEntropyLoss(), images, labels, loss_scale=0.5, max_batch_size=pieces)
        else:
            losses = regularized_backward(
                model, nn.CrossEntropyLoss(), images, labels, alpha=0.01, beta=2.0, sub_batches=4, estimator=estimator,  # type: ignore[arg-type]
                num_sampled=1 if estimator == "sampled" else None, loss_scale=0.5, max_batch_size=pieces,
            )  # fmt: skip
        assert sorted(fired) == sorted(name for name, _ in model.named_parameters())
        found.append((losses.loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[1])
    if estimator == "plain":
        model.zero_grad()
        (0.5 * nn.CrossEntropyLoss()(model(images), labels)).backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], found[1][1])
