"""The flat-minima regularizer of Jia & Su (ICML 2020, Sec. 6, Eq. 7 and Algorithm 1).

    L(B, w) + beta R(w),   R(w) = (1/M) sum_i [L(B_i, w) - L(B_i, w - alpha g_i)]

with g_i = grad L(B_i, w) held constant, over the M equal sub-batches B_i of a batch B. The gradient of R is the mean of
g_i - h_i, where h_i is the gradient of L(B_i, .) at w - alpha g_i; for alpha -> 0 it is the mean of alpha H_i g_i.

The size of a sub-batch is part of the strength: E|g_i|^2 = |g|^2 + tr(Sigma) / |B_i|, with Sigma the covariance of the
gradients of single images. Keep `sub_batch_size` rather than `sub_batches` when the number of workers changes.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from infomcr_dist.functional import (
    Batch,
    Criterion,
    FunctionalLoss,
    LossFunction,
    Params,
    add_scaled,
    dot,
    full_precision,
    functional_loss,
    gradient,
    moved,
    trainable_parameters,
)

Derivative = Literal["finite_difference", "exact"]
Way = Literal["fused", "sampled", "reference"]


class SubBatchPenalty(NamedTuple):
    """What `sub_batch_penalty` returns: loss and penalty are scalars, their gradients have the names of `params`."""

    loss: Tensor
    penalty: Tensor
    loss_gradient: Params
    penalty_gradient: Params


class Losses(NamedTuple):
    """Loss L and penalty R of a step: detached scalars, without the factors beta and weight."""

    loss: Tensor
    penalty: Tensor


def sub_batch_penalty(
    loss_fn: LossFunction,
    params: Params,
    sub_batches: Sequence[Batch],
    alpha: float,
    derivative: Derivative = "finite_difference",
) -> SubBatchPenalty:
    """Mean loss and penalty R of the sub-batches at `params`, and their gradients (Eq. 7). A pure function.

    `loss_fn(params, batch)` is a scalar (see `functional_loss`); the gradients are with respect to all of `params`.
    "finite_difference" is the paper's g_i - h_i, computed outside autocast and with TF32 off, where it is noise.
    "exact" is its limit alpha H_i g_i, by a Hessian-vector product, with the penalty alpha |g_i|^2.

    Raises ValueError for no sub-batch, alpha <= 0, or finite differences of parameters of less than 32 bits.
    """
    if not sub_batches:
        raise ValueError("sub_batches must hold at least one batch, got none")
    _check(alpha, derivative, params)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    losses: list[Tensor] = []
    penalties: list[Tensor] = []
    loss_gradient: Params = {}
    penalty_gradient: Params = {}
    scale = 1 / len(sub_batches)
    for batch in sub_batches:
        with _precision(derivative, leaves):
            sub = _evaluate(loss_fn, loss_fn, leaves, batch, alpha, derivative)
            add_scaled(penalty_gradient, gradient(sub.surrogate, leaves), scale)
            if derivative == "finite_difference":
                add_scaled(penalty_gradient, sub.gradient, scale)
            add_scaled(loss_gradient, sub.gradient, scale)
        losses.append(sub.loss)
        penalties.append(sub.penalty)
    return SubBatchPenalty(torch.stack(losses).mean(), torch.stack(penalties).mean(), loss_gradient, penalty_gradient)


def health(loss_fn: LossFunction, params: Params, sub_batch: Batch, alpha: float) -> float:
    """How far the two derivatives of the penalty disagree on one sub-batch: |(g - h) - alpha H g| / |alpha H g|.

    Small where the finite difference means what it should. Rounding raises it, and so do the kinks of ReLU, at which
    alpha H g is not its limit; far above 1 the penalty is noise. Costs five passes and changes nothing.
    """
    with _repeatable(_device(params)):
        difference = sub_batch_penalty(loss_fn, params, [sub_batch], alpha, "finite_difference").penalty_gradient
    with _repeatable(_device(params)):
        exact = sub_batch_penalty(loss_fn, params, [sub_batch], alpha, "exact").penalty_gradient
    size = dot(exact, exact).sqrt()
    add_scaled(difference, exact, -1.0)
    return float(dot(difference, difference).sqrt() / size)


def regularized_backward(
    model: nn.Module,
    criterion: Criterion,
    images: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    beta: float,
    sub_batches: int | None = None,
    sub_batch_size: int | None = None,
    way: Way = "fused",
    sampled: int | None = None,
    derivative: Derivative | Literal["auto"] = "auto",
    weight: float = 1.0,
    max_batch_size: int | None = None,
) -> Losses:
    """Add the gradient of weight * (L + beta R) to `p.grad`, in place of `loss.backward()` (Algorithm 1).

    `images` (B, ...) and `labels` (B, ...) are split into `sub_batches` equal contiguous sub-batches, or into those of
    `sub_batch_size` images; give one of the two. `criterion(logits, labels)` is a mean over its batch.

    way:
      "fused"      two passes over the batch; L is the mean of the sub-batch losses.
      "sampled"    1 + k/M passes: the penalty of k = `sampled` of the M sub-batches, drawn afresh each call from
                   torch's CPU generator and weighted M/k: unbiased; the other sub-batches take one plain pass.
      "reference"  three passes; L is the loss of the whole batch in a pass of its own.
    derivative:
      "finite_difference"  the paper's g_i - h_i; its passes run outside autocast with TF32 off, where it is noise.
      "exact"              its limit alpha H_i g_i.
      "auto"               "exact" under autocast or for parameters of less than 32 bits, else "finite_difference".
    max_batch_size: images that pass through the network at once where no sub-batch does: the sampled way's other
      sub-batches, the reference's whole batch. More are taken in pieces, whose gradients add up.

    The parameters themselves are never changed. Hooks on their gradients fire once each, in the last backward, when
    p.grad holds everything else: Horovod and DistributedDataParallel send what a plain step sends. Running statistics
    of BatchNorm move once per image, from the unperturbed weights, with the horizon of a plain step. Dropout, and
    whatever else draws from torch's generators, is the same in both passes over a sub-batch.

    Raises ValueError for settings that do not fit, before anything is computed.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    params = trainable_parameters(inner)
    if not params:
        raise ValueError("model must have parameters that require a gradient, got none")
    if derivative == "auto":
        derivative = "exact" if _autocast(params) or _low_precision(params) else "finite_difference"
    _check(alpha, derivative, params)
    _check_modules(model, criterion, derivative)
    count = _sub_batch_count(len(images), sub_batches, sub_batch_size)
    split = _split(images, labels, count, way, sampled)
    penalty_weight = beta / len(split.penalized)

    total: Params = {}
    loss = torch.zeros((), device=images.device)
    penalty = torch.zeros((), device=images.device)
    for i, batch in enumerate(split.penalized):
        last = split.rest is None and i == len(split.penalized) - 1
        module = model if last else inner
        perturbed = _pure_loss(module, criterion)
        unperturbed = perturbed if way == "reference" else _tracked_loss(module, criterion, 1 / count, counted=last)
        with _precision(derivative, params):
            sub = _evaluate(unperturbed, perturbed, params, batch, alpha, derivative)
            loss = loss + split.loss_weight * sub.loss
            penalty = penalty + sub.penalty / len(split.penalized)
            known = split.loss_weight + (penalty_weight if derivative == "finite_difference" else 0.0)
            add_scaled(total, sub.gradient, weight * known)
            objective = weight * penalty_weight * sub.surrogate
            del sub  # frees g_i before the backward pass
            if last:
                _accumulate(params, total)
                objective.backward()
            else:
                add_scaled(total, gradient(objective, params), 1.0)
    if split.rest is not None:
        loss = loss + _plain(model, criterion, params, split.rest, total, weight, split.rest_weight, max_batch_size)
    return Losses(loss, penalty)


def plain_backward(
    model: nn.Module,
    criterion: Criterion,
    images: Tensor,
    labels: Tensor,
    *,
    weight: float = 1.0,
    max_batch_size: int | None = None,
) -> Losses:
    """Add the gradient of weight * L to `p.grad`, like `loss.backward()`; the penalty returned is 0.

    More than `max_batch_size` images pass through the network in pieces, whose gradients add up; hooks fire once each,
    in the last backward, and BatchNorm's running statistics keep their horizon.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    params = trainable_parameters(inner)
    loss = _plain(model, criterion, params, (images, labels), {}, weight, 1.0, max_batch_size)
    return Losses(loss, torch.zeros((), device=images.device))


def _plain(
    model: nn.Module,
    criterion: Criterion,
    params: Params,
    batch: Batch,
    total: Params,
    weight: float,
    fraction: float,
    max_batch_size: int | None,
) -> Tensor:
    """Backward of weight * fraction * (mean loss over the batch), which is a fraction of the step's, on top of `total`;
    returns fraction * loss. Empties `total` into p.grad before the last piece's backward, whose hooks fire."""
    images, labels = batch
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    pieces = list(zip(*(tensor.split(max_batch_size or len(images)) for tensor in batch), strict=True))
    loss = torch.zeros((), device=images.device)
    for i, piece in enumerate(pieces):
        last = i == len(pieces) - 1
        share = fraction * (len(piece[1]) / len(labels))
        piece_loss = _tracked_loss(model if last else inner, criterion, share, counted=last)(params, piece)
        loss = loss + share * piece_loss.detach()
        if last:
            _accumulate(params, total)
            (weight * share * piece_loss).backward()
        else:
            add_scaled(total, gradient(weight * share * piece_loss, params), 1.0)
    return loss


class _SubBatch(NamedTuple):
    """One sub-batch at w. The gradient of its penalty is that of `surrogate` (exact), or g_i plus that of `surrogate`
    (finite difference)."""

    loss: Tensor
    penalty: Tensor
    gradient: Params
    surrogate: Tensor


def _evaluate(
    unperturbed: LossFunction,
    perturbed: LossFunction,
    params: Params,
    batch: Batch,
    alpha: float,
    derivative: Derivative,
) -> _SubBatch:
    """`unperturbed` is the loss at w, `perturbed` the loss at w - alpha g_i; both see the same dropout mask."""
    if derivative == "exact":
        loss = unperturbed(params, batch)
        g = gradient(loss, params, create_graph=True)
        constant = {name: tensor.detach() for name, tensor in g.items()}
        penalty = alpha * dot(constant, g)
        # 0 * loss: the hook of every parameter fires, even of one that g_i does not depend on.
        return _SubBatch(loss.detach(), penalty.detach(), constant, penalty + 0.0 * loss)
    with _repeatable(_device(params)):
        loss = unperturbed(params, batch)
    g = gradient(loss, params)
    moved_loss = perturbed(moved(params, g, alpha), batch)
    return _SubBatch(loss.detach(), (loss - moved_loss).detach(), g, -moved_loss)


class _Split(NamedTuple):
    """L = loss_weight * (sum over `penalized`) + rest_weight * (mean over `rest`)."""

    penalized: list[Batch]
    loss_weight: float
    rest: Batch | None
    rest_weight: float


def _split(images: Tensor, labels: Tensor, count: int, way: Way, sampled: int | None) -> _Split:
    if way not in get_args(Way):
        raise ValueError(f"way must be one of {', '.join(get_args(Way))}, got {way!r}")
    if way != "sampled" and sampled is not None:
        raise ValueError(f"sampled belongs to way='sampled', got sampled={sampled} and way={way!r}")
    if way == "sampled" and (sampled is None or not 1 <= sampled <= count):
        raise ValueError(f"sampled must be from 1 to the number of sub-batches, {count}, got {sampled}")
    size = len(images) // count
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    if way == "fused":
        return _Split(batches, 1 / count, None, 0.0)
    if way == "reference":
        return _Split(batches, 0.0, (images, labels), 1.0)
    order = torch.randperm(count).tolist()
    rest = [batches[i] for i in sorted(order[sampled:])]
    return _Split(
        [batches[i] for i in order[:sampled]],
        1 / count,
        (torch.cat([x for x, _ in rest]), torch.cat([y for _, y in rest])) if rest else None,
        len(rest) / count,
    )


def _sub_batch_count(images: int, sub_batches: int | None, sub_batch_size: int | None) -> int:
    if (sub_batches is None) == (sub_batch_size is None):
        raise ValueError(f"give either sub_batches or sub_batch_size, got {sub_batches} and {sub_batch_size}")
    name, value = ("sub_batches", sub_batches) if sub_batches is not None else ("sub_batch_size", sub_batch_size)
    assert value is not None
    if value < 1 or images < 1 or images % value:
        raise ValueError(f"{name} must divide the local batch, got {value} and {images}")
    return value if name == "sub_batches" else images // value


def _check(alpha: float, derivative: Derivative, params: Params) -> None:
    if derivative not in get_args(Derivative):
        raise ValueError(f"derivative must be one of {', '.join(get_args(Derivative))}, got {derivative!r}")
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if derivative == "finite_difference" and _low_precision(params):
        raise ValueError(
            "derivative='finite_difference' is rounding noise for parameters of less than 32 bits: "
            "use derivative='exact', or keep the parameters in float32"
        )
    if derivative == "exact" and _autocast(params) == torch.float16:
        raise ValueError("autocast to float16 needs loss scaling, which the penalty does not do: use bfloat16")


def _check_modules(model: nn.Module, criterion: Criterion, derivative: Derivative) -> None:
    if isinstance(criterion, nn.Module) and any(parameter.requires_grad for parameter in criterion.parameters()):
        raise ValueError("criterion must have no trainable parameters: make them part of model")
    if isinstance(model, DistributedDataParallel) and model.static_graph:
        raise ValueError(
            "model must not be DistributedDataParallel(static_graph=True): a step has passes it does not know"
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules() if module is not model):
        raise ValueError("DistributedDataParallel must be the outermost wrapper of model: compile first, then wrap")
    if derivative == "exact" and any(_is_compiled(module) for module in model.modules()):
        raise ValueError(
            "derivative='exact' needs double backward, which torch.compile does not support: "
            "use derivative='finite_difference', or a model that is not compiled"
        )


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _low_precision(params: Params) -> bool:
    return any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in params.values())


def _device(params: Params) -> torch.device:
    return next(iter(params.values())).device


def _autocast(params: Params) -> torch.dtype | None:
    """The type autocast computes in, None outside autocast."""
    kind = _device(params).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _precision(derivative: Derivative, params: Params) -> AbstractContextManager[None]:
    return full_precision(_device(params)) if derivative == "finite_difference" else nullcontext()


@contextmanager
def _running_statistics(model: nn.Module, fraction: float, counted: bool) -> Iterator[None]:
    """For a pass over a fraction of the batch: momentum m becomes 1 - (1 - m)^fraction, so that the passes of a step
    forget as much as one plain pass; `num_batches_tracked` goes up only if `counted`."""
    layers = [
        (layer, layer.momentum)
        for layer in model.modules()
        if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats and layer.momentum is not None
    ]
    try:
        for layer, momentum in layers:
            layer.momentum = 1 - (1 - momentum) ** fraction if fraction < 1 else momentum
        yield
        for layer, _ in layers:
            if not counted and layer.num_batches_tracked is not None:
                layer.num_batches_tracked -= 1
    finally:
        for layer, momentum in layers:
            layer.momentum = momentum


def _repeatable(device: torch.device) -> AbstractContextManager[None]:
    """Afterwards the random number generators are back where they were, so that the next pass draws the same masks."""
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)


def _tracked_loss(model: nn.Module, criterion: Criterion, fraction: float, counted: bool) -> LossFunction:
    """The loss at the model's own parameters over a fraction of the batch, which moves the running statistics."""

    def loss_fn(_: Params, batch: Batch) -> Tensor:
        with _running_statistics(model, fraction, counted):
            return criterion(model(batch[0]), batch[1])

    return loss_fn


def _pure_loss(model: nn.Module, criterion: Criterion) -> LossFunction:
    """The loss at any parameters, named as in the wrapped model where `model` is DistributedDataParallel."""
    if not isinstance(model, DistributedDataParallel):
        return functional_loss(model, criterion)
    loss_fn = FunctionalLoss(model, criterion)
    return lambda params, batch: loss_fn({f"module.{name}": tensor for name, tensor in params.items()}, batch)


def _accumulate(params: Params, total: Params) -> None:
    """p.grad += total, before the one backward whose hooks may send p.grad."""
    known, terms = [], []
    for name, term in total.items():
        grad = params[name].grad
        if grad is None:
            params[name].grad = term
        else:
            known.append(grad)
            terms.append(term)
    if known:
        torch._foreach_add_(known, terms)
