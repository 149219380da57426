"""The flat-minima regularizer of Jia & Su (ICML 2020, Sec. 6, Eq. 7 and Algorithm 1), and others of its form.

    L(B, w) + beta R(w),   R(w) = (1/M) sum_i [L(B_i, w) - L(B_i, w - alpha g_i)]

with g_i = grad L(B_i, w) held constant, over the M equal sub-batches B_i of a batch B. The gradient of R is the mean of
g_i - h_i, where h_i is the gradient of L(B_i, .) at w - alpha g_i; for alpha -> 0 it is the mean of alpha H_i g_i.

The size of a sub-batch is part of the strength: E|g_i|^2 = |g|^2 + tr(Sigma) / |B_i|, with Sigma the covariance of the
gradients of single images. Keep `sub_batch_size` rather than `sub_batches` when the number of workers changes.

In low precision a step of length alpha drowns in rounding. A longer step epsilon_i = rho |w| / |g_i|, weighted
alpha / epsilon_i, has the same limit. `python benchmarks/rho.py` prints its error by rho.

SAM, ASAM and the penalty on the norm of the gradient differ in where h_i is taken: see `methods`.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from infomcr_dist.checks import (
    Derivative,
    Method,
    Scheme,
    Step,
    check_derivative,
    check_method,
    check_numbers,
    check_step,
    devices,
    sub_batch_count,
)
from infomcr_dist.criteria import shares
from infomcr_dist.estimators import Estimator, Split, split_batch
from infomcr_dist.functional import (
    Batch,
    Criterion,
    FunctionalLoss,
    LossFunction,
    Params,
    add_scaled,
    dot,
    gradient,
    moved,
    trainable_parameters,
)
from infomcr_dist.inspection import resolve_scheme
from infomcr_dist.methods import (
    SubBatch,
    differentiated_twice,
    evaluate,
    needs_size,
    norm,
    pass_precision,
    same_draws,
)
from infomcr_dist.passes import Passes, hooks_once, repeatable, unwrapped


class SubBatchPenalty(NamedTuple):
    """What `sub_batch_penalty` returns: loss and penalty are scalars, their gradients have the names of `params`."""

    loss: Tensor
    penalty: Tensor
    loss_gradient: Params
    penalty_gradient: Params


class Losses(NamedTuple):
    """Loss L and penalty R of a step: detached scalars, not multiplied by beta or loss_scale."""

    loss: Tensor
    penalty: Tensor


def sub_batch_penalty(
    loss_fn: LossFunction,
    params: Params,
    sub_batches: Sequence[Batch],
    alpha: float,
    derivative: Derivative = "finite_difference",
    step: Step = "alpha",
    method: Method = "infomcr",
    rho: float | None = None,
) -> SubBatchPenalty:
    """Mean loss and penalty R of the sub-batches at `params`, and their gradients (Eq. 7). A pure function.

    Args:
        loss_fn: `loss_fn(params, batch)` is a scalar; see `functional_loss`.
        params: The point w, by name; the gradients are with respect to all of them.
        sub_batches: The B_i, each (images, labels).
        alpha: Length of the step w - alpha g_i.
        derivative: "finite_difference" is the paper's g_i - h_i, computed outside autocast and with TF32 off, where it
            is noise. "exact" is its limit alpha H_i g_i, by a Hessian-vector product, with the penalty alpha |g_i|^2.
        step: As for `regularized_backward`; needs a `functional_loss` where it is "auto".
        method: Likewise.
        rho: Likewise.

    Returns:
        The loss, the penalty, and the gradient of each.

    Raises:
        ValueError: No sub-batch, alpha <= 0, or finite differences of parameters of less than 32 bits.
    """
    if not sub_batches:
        raise ValueError("sub_batches must hold at least one batch, got none")
    check_method(method, rho, derivative, step, params)
    check_derivative(alpha, derivative, step, params)
    if isinstance(loss_fn, FunctionalLoss):
        model, criterion = loss_fn.model, loss_fn.criterion
        scheme = resolve_scheme(derivative, alpha, step, model, criterion, params, sub_batches[0], method, rho)
    else:
        scheme = Scheme(derivative, alpha, rho if isinstance(step, str) else float(step), method)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    size = norm(leaves.values()) if needs_size(scheme) else None
    losses: list[Tensor] = []
    penalties: list[Tensor] = []
    loss_gradient: Params = {}
    penalty_gradient: Params = {}
    scale = 1 / len(sub_batches)
    for batch in sub_batches:

        def perturbed(g: Params, length: float | Tensor, batch: Batch = batch) -> Tensor:
            return loss_fn(moved(leaves, g, length), batch)

        with pass_precision(scheme, leaves):
            with same_draws(derivative, leaves):
                loss = loss_fn(leaves, batch)
            sub = evaluate(loss, perturbed, leaves, scheme, size, nullcontext())
            with differentiated_twice(derivative):
                add_scaled(penalty_gradient, gradient(sub.surrogate, leaves), scale * sub.scale)
            if derivative == "finite_difference":
                add_scaled(penalty_gradient, sub.gradient, scale * sub.scale)
            add_scaled(loss_gradient, sub.gradient, scale)
        losses.append(sub.loss)
        penalties.append(sub.penalty)
    return SubBatchPenalty(torch.stack(losses).mean(), torch.stack(penalties).mean(), loss_gradient, penalty_gradient)


def finite_difference_error(
    loss_fn: LossFunction, params: Params, sub_batch: Batch, alpha: float, step: Step = "alpha"
) -> float:
    """Relative error of the penalty's finite difference on one sub-batch: |(g - h) - alpha H g| / |alpha H g|.

    Rounding raises it, and so do the kinks of ReLU, where alpha H g is not the limit of g - h. Far above 1 the penalty
    is noise. Costs five passes over the sub-batch and changes nothing.

    Args:
        loss_fn: `loss_fn(params, batch)` is a scalar; see `functional_loss`.
        params: The point w, by name.
        sub_batch: One (images, labels).
        alpha: Length of the step w - alpha g.
        step: Of the finite difference, as for `regularized_backward`.

    Raises:
        ValueError: As `sub_batch_penalty`.
    """
    with repeatable(devices(params)):
        difference = sub_batch_penalty(loss_fn, params, [sub_batch], alpha, "finite_difference", step).penalty_gradient
    with repeatable(devices(params)):
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
    alpha: float = 1e-4,
    beta: float = 1.0,
    sub_batches: int | None = None,
    sub_batch_size: int | None = None,
    estimator: Estimator = "fused",
    num_sampled: int | None = None,
    derivative: Derivative | Literal["auto"] = "auto",
    step: Step = "auto",
    method: Method = "infomcr",
    rho: float | None = None,
    loss_scale: float = 1.0,
    max_batch_size: int | None = None,
) -> Losses:
    """Add the gradient of loss_scale * (L + beta R) to `p.grad`, in place of `loss.backward()` (Algorithm 1).

    The parameters themselves are never changed: the pass at w - alpha g_i runs on a copy of the modules (see
    `replica`), from the state that the pass at w started from, with the same random numbers. Hooks on gradients fire
    once each, in the last backward, with the whole gradient: Horovod and DistributedDataParallel send what a plain step
    sends. State of the model and the criterion moves once, in the passes at w; running statistics of BatchNorm move
    once per image, with the horizon of a plain step.

    The first call with a model and a criterion looks at two more forward passes of copies over one sub-batch (see
    `inspect`). docs/library.md has the table of what is exact, what is refused and why.

    Args:
        model: Maps images to what `criterion` takes; may be wrapped in DistributedDataParallel.
        criterion: `criterion(logits, labels)`, a mean over its batch.
        images: (B, ...), the local batch.
        labels: (B, ...).
        alpha: For "infomcr": length of the step w - alpha g_i; 1e-4 in the paper.
        beta: Weight of the penalty R; 1 to 100 in the paper. 1 is SAM and ASAM; for "gradient_norm" it is from 0 to 1.
        sub_batches: M, the number of equal contiguous sub-batches; give this or `sub_batch_size`.
        sub_batch_size: Images in a sub-batch, B / M.
        estimator: How L and R are estimated.
            "fused": two passes over the batch; L is the mean of the sub-batch losses.
            "sampled": 1 + k/M passes: the penalty of k = `num_sampled` of the M sub-batches, drawn afresh each call
            from torch's CPU generator and weighted M/k, which is unbiased; the other sub-batches take one plain pass.
            "reference": three passes; L is the loss of the whole batch in a pass of its own.
        num_sampled: k, for estimator="sampled".
        derivative: How the penalty is differentiated.
            "finite_difference": the paper's g_i - h_i, of two first-order passes.
            "exact": its limit alpha H_i g_i, by double backward.
            "auto": "finite_difference"; "exact" for parameters of less than 32 bits and, with step="alpha", under
            autocast and in a model that computes in less than float32 by itself; unless torch has the second derivative
            wrong: then the finite difference in float32, with a warning.
        step: Length of the finite difference's step.
            "alpha": the paper's; its passes run outside autocast with TF32 off, where it is noise.
            A number rho: epsilon_i = rho |w| / |g_i|, weighted alpha / epsilon_i; its passes run under the caller's
            autocast. A negative one goes uphill, as SAM does.
            "auto": 3e-3 under autocast to bfloat16, and on a GPU that takes matrix products in TF32
            (`torch.backends.cuda.matmul.fp32_precision`), else "alpha". Not for derivative="exact".
        method: What R compares the loss at w with; the table of `infomcr_dist.methods` has them all. All but "infomcr"
            take passes under the caller's autocast, and no `estimator="reference"`, `derivative="exact"` or `step`.
            "infomcr": the loss after a step along -g_i: the paper's.
            "sam": that at the distance rho along g_i; "asam": with the distance in each weight scaled by its size;
            "gradient_norm": as "sam", R being about rho |g_i|.
        rho: The radius of "sam", "asam" and "gradient_norm".
        loss_scale: Factor of the whole gradient.
        max_batch_size: Images that pass through the network at once where no sub-batch does: the sampled estimator's
            other sub-batches, the reference's whole batch. More are taken in pieces, whose gradients add up.

    Returns:
        L and R, without loss_scale and beta.

    Raises:
        ValueError: In one line, settings, models, losses and batches that do not fit; p.grad is then as it was.
    """
    inner = unwrapped(model)
    params = trainable_parameters(inner)
    check_step(model, criterion, images, labels, params)
    check_numbers(max_batch_size, beta=beta, loss_scale=loss_scale)
    check_method(method, rho, derivative, step, params, estimator)
    count = sub_batch_count(len(images), sub_batches, sub_batch_size)
    split = split_batch(images, labels, criterion, count, estimator, num_sampled)
    scheme = resolve_scheme(derivative, alpha, step, inner, criterion, params, split.penalized[0], method, rho)
    resolved = scheme.derivative
    size = norm(params.values()) if needs_size(scheme) else None

    passes = Passes(model, criterion, params)
    # The whole-batch loss of "reference" moves the state of the model; its sub-batches do not.
    fraction = None if estimator == "reference" else 1 / count
    settled = passes.settled if fraction and resolved == "exact" else nullcontext
    total: Params = {}
    loss = torch.zeros((), device=images.device)
    penalty = torch.zeros((), device=images.device)
    with hooks_once(params) as release:
        for i, (batch, relative) in enumerate(zip(split.penalized, split.relative, strict=True)):
            last = split.rest is None and i == len(split.penalized) - 1
            penalty_weight = beta / len(split.penalized) * relative
            with pass_precision(scheme, params):
                sub = _sub_batch(passes, batch, scheme, size, fraction, total if last else None)
                loss = loss + _weighted(split.loss_weight * relative, sub.loss)
                penalty = penalty + _weighted(relative / len(split.penalized), sub.penalty)
                penalty_weight = penalty_weight * sub.scale
                known = split.loss_weight * relative + (penalty_weight if resolved == "finite_difference" else 0.0)
                add_scaled(total, sub.gradient, loss_scale * known)
                objective, at = loss_scale * penalty_weight * sub.surrogate, sub.at
                del sub  # frees g_i before the backward pass
                with differentiated_twice(resolved), settled():
                    if last:
                        _accumulate(params, release(total))
                        objective.backward()
                    else:
                        add_scaled(total, gradient(objective, at), 1.0)
                del objective, at  # frees the moved weights before the next pass
        if split.rest is not None:
            loss = loss + _plain(passes, split, total, release, loss_scale, max_batch_size)
    return Losses(loss, penalty)


def plain_backward(
    model: nn.Module,
    criterion: Criterion,
    images: Tensor,
    labels: Tensor,
    *,
    loss_scale: float = 1.0,
    max_batch_size: int | None = None,
) -> Losses:
    """Add the gradient of loss_scale * L to `p.grad`, like `loss.backward()`.

    Hooks fire once each, in the last backward, and BatchNorm's running statistics keep their horizon.

    Args:
        model: Maps images to what `criterion` takes; may be wrapped in DistributedDataParallel.
        criterion: `criterion(logits, labels)`, a mean over its batch.
        images: (B, ...), the local batch.
        labels: (B, ...).
        loss_scale: Factor of the gradient.
        max_batch_size: More images pass through the network in pieces, whose gradients add up.

    Returns:
        L, and 0 for the penalty.
    """
    params = trainable_parameters(unwrapped(model))
    check_step(model, criterion, images, labels, params)
    check_numbers(max_batch_size, loss_scale=loss_scale)
    whole = Split([], [], 0.0, (images, labels), 1.0, 1.0)
    with hooks_once(params) as release:
        loss = _plain(Passes(model, criterion, params), whole, {}, release, loss_scale, max_batch_size)
    return Losses(loss, torch.zeros((), device=images.device))


def _weighted(weight: float | Tensor, value: Tensor) -> Tensor:
    """weight * value; 0 for a part in which nothing counts, whose mean is not a number."""
    if isinstance(weight, Tensor):
        return torch.where(weight > 0, (weight * value).to(value.dtype), 0.0)
    return weight * value


def _plain(
    passes: Passes,
    split: Split,
    total: Params,
    release: Callable[[Params], Params],
    loss_scale: float,
    max_batch_size: int | None,
) -> Tensor:
    """Backward of loss_scale * (the part of L that is the rest's), which it returns. Adds `total` to p.grad before the
    last piece's backward, whose hooks fire."""
    assert split.rest is not None
    images, labels = split.rest
    loss = torch.zeros((), device=images.device)
    pieces = list(zip(*(tensor.split(max_batch_size or len(images)) for tensor in split.rest), strict=True))
    parts = shares(passes.criterion, [part for _, part in pieces])
    for i, (piece, share) in enumerate(zip(pieces, parts, strict=True)):
        last = i == len(pieces) - 1
        fraction = split.rest_fraction * (len(piece[1]) / len(labels))
        piece_loss = passes.tracked(piece, fraction, total if last else None, counted=last)
        loss = loss + _weighted(split.rest_weight * share, piece_loss.detach())
        objective = loss_scale * split.rest_weight * share * piece_loss
        with passes.settled():
            if last:
                _accumulate(passes.params, release(total))
                objective.backward()
            else:
                add_scaled(total, gradient(objective, passes.params), 1.0)
    return loss


def _sub_batch(
    passes: Passes,
    batch: Batch,
    scheme: Scheme,
    size: Tensor | None,
    fraction: float | None,
    total: Params | None,
) -> SubBatch:
    """A sub-batch of a step: the pass at w moves the state of the model over a `fraction` of the batch, unless None;
    the pass at w - epsilon_i g_i starts from the same state, and moves none. `size` is |w|. `total`: see `Passes`, for
    the last pass."""
    exact = scheme.derivative == "exact"
    # The state and the weights from here on, before the pass at w.
    shifted = {} if exact else _copies(passes.params, attached=total is not None)
    network = None if exact else passes.network(shifted)
    with same_draws(scheme.derivative, passes.params):
        if fraction is None:
            loss = passes.pure(passes.network({}), batch, None)
        else:
            own = (batch[0].clone(), batch[1].clone())
            last = total is not None
            loss = passes.tracked(own, fraction, total if exact else None, counted=last)

    def perturbed(g: Params, length: float | Tensor) -> Tensor:
        assert network is not None
        with torch.no_grad():
            add_scaled(shifted, g, -length)
        return passes.pure(network, batch, None if total is None else total | g)

    settled = nullcontext if fraction is None else passes.settled
    sub = evaluate(loss, perturbed, passes.params, scheme, size, settled())
    return sub if exact or total is not None else sub._replace(at=shifted)


def _copies(params: Params, attached: bool) -> Params:
    """Copies to be moved: leaves; or part of the graph, one node a parameter, so that the parameters' hooks fire."""
    if attached:
        return {name: parameter.clone() for name, parameter in params.items()}
    return {name: parameter.detach().clone().requires_grad_() for name, parameter in params.items()}


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
