"""What a network does that the arithmetic of the regularizer must know of, found out once from a few images."""

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from infomcr_dist.checks import (
    RELATIVE_STEP,
    Derivative,
    Method,
    Scheme,
    Step,
    autocast_type,
    check_derivative,
    compiled,
    devices,
    low_precision,
)
from infomcr_dist.criteria import check_mean
from infomcr_dist.functional import (
    Batch,
    Criterion,
    FunctionalLoss,
    Params,
    add_scaled,
    dot,
    functional_loss,
    gradient,
    mean_loss,
    moved,
)
from infomcr_dist.graph import accumulators, dependencies
from infomcr_dist.passes import repeatable
from infomcr_dist.precision import full_precision, math_attention, rounds_float32

SECOND_DERIVATIVE_TOLERANCE = 0.01
_REENTRANT = "CheckpointFunctionBackward"


@dataclass(frozen=True)
class Findings:
    """Of a network with a loss."""

    low_precision: torch.dtype | None
    """What the forward pass computes in by itself, outside autocast, if that is less than float32."""
    unproven: frozenset[str]
    """Functions in it whose second derivative is not torch's own, or known to be wrong."""


_FINDINGS: WeakKeyDictionary[nn.Module, dict[Any, Findings]] = WeakKeyDictionary()
_SECOND_DERIVATIVE_ERRORS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def resolve_scheme(
    derivative: Derivative | Literal["auto"],
    alpha: float,
    step: Step,
    model: nn.Module,
    criterion: Criterion,
    params: Params,
    batch: Batch,
    method: Method = "infomcr",
    rho: float | None = None,
) -> Scheme:
    """The derivative and the step to take, after a look at the network the first time; see `inspect`."""
    if method != "infomcr":
        check_derivative(alpha, "finite_difference" if derivative == "auto" else derivative, "auto", params, model)
        inspect(model, criterion, params, batch)
        return Scheme("finite_difference", alpha, rho, method)
    few_bits, autocast = low_precision(params), autocast_type(params)
    if step == "auto":  # under autocast and in TF32 a step of length alpha drowns in rounding
        rounded = autocast == torch.bfloat16 or (autocast is None and any(map(rounds_float32, devices(params))))
        possible = derivative != "exact" and not few_bits and len(devices(params)) == 1
        step = RELATIVE_STEP if rounded and possible else "alpha"
    longer = step != "alpha"
    if derivative != "auto":
        chosen: Derivative = derivative
    else:
        chosen = "exact" if few_bits or (autocast and not longer) else "finite_difference"
    check_derivative(alpha, chosen, step, params, model)
    found = inspect(model, criterion, params, batch)
    if chosen == "finite_difference" and found.low_precision and not longer:
        if derivative != "auto" or compiled(model):
            raise ValueError(
                f"derivative='finite_difference' is rounding noise in a model that computes in {found.low_precision} "
                "by itself: use step=0.003 or derivative='exact', or leave autocast to the caller"
            )
        chosen = "exact"
    if chosen == "exact" and found.unproven:
        error = second_derivative_error(model, criterion, params, batch)
        if not error <= SECOND_DERIVATIVE_TOLERANCE:
            names = ", ".join(sorted(found.unproven))
            if derivative != "auto" or few_bits or found.low_precision:
                raise ValueError(
                    f"derivative='exact' is off by {error:.1%} in this model, for {names}: "
                    "use derivative='finite_difference' in float32"
                )
            warnings.warn(
                f"derivative='auto' takes the finite difference in float32: 'exact' is off by {error:.1%} in this "
                f"model, for {names}",
                stacklevel=3,
            )
            chosen = "finite_difference"
    return Scheme(chosen, alpha, None if chosen == "exact" or step == "alpha" else step)


def inspect(model: nn.Module, criterion: Criterion, params: Params, batch: Batch) -> Findings:
    """Look at two forward passes of copies over one sub-batch, the first time that model and criterion meet.

    Args:
        model: The network, not in DistributedDataParallel.
        criterion: Its loss.
        params: Its trainable parameters, by name.
        batch: One sub-batch.

    Raises:
        ValueError: The loss is a sum, depends on parameters that the copy does not have, or keeps state that cannot be
            copied.
    """
    known = _FINDINGS.setdefault(model, {})
    key = (model.training, _kind(criterion))
    if key not in known:
        known[key] = _inspect(functional_loss(model, criterion), params, batch)
    return known[key]


def _kind(criterion: Any) -> Any:
    """What stays the same where a loss is made anew for each step."""
    if isinstance(criterion, functools.partial):
        return _kind(criterion.func)
    return getattr(criterion, "__code__", type(criterion))


def _inspect(loss_fn: FunctionalLoss, params: Params, batch: Batch) -> Findings:
    copies = {name: parameter.detach().clone().requires_grad_() for name, parameter in params.items()}
    nodes = accumulators(copies)
    first, second, third = (loss_fn.at(copies) for _ in range(3))
    devices = {tensor.device for tensor in params.values()}
    with full_precision(next(iter(devices))):
        with repeatable(devices):
            output = first.model(batch[0].clone())
            loss = mean_loss(first.criterion, output, batch[1].clone())
        check_mean(third.criterion, output, batch[1], loss)
        with repeatable(devices):
            again = second(batch)
    found, leaves = dependencies([loss], nodes), dependencies([again], nodes).leaves
    if _REENTRANT in found.unproven:
        raise ValueError("checkpoint(use_reentrant=True) is not supported: give it use_reentrant=False")
    # A leaf that each pass makes for itself is no parameter of anybody.
    check_leaves([leaf for leaf in found.leaves if any(leaf is other for other in leaves)], loss_fn.model)
    _check_equal(loss.detach(), again.detach())
    return Findings(found.low_precision, frozenset(found.unproven))


def check_leaves(leaves: list[Tensor], model: nn.Module) -> None:
    """Refuse tensors that a loss depends on beside those in the place of the parameters, with a ValueError."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for leaf in leaves:
        if name := names.get(id(leaf)):
            raise ValueError(
                f"the loss uses the parameter {name!r} from outside of the model's modules (a global variable, an "
                "object that is not a module): refer to it through the model"
            )
        raise ValueError(
            f"the loss depends on a tensor of shape {tuple(leaf.shape)} that requires a gradient and that model does "
            "not hold: make it a parameter of model, or freeze it with requires_grad_(False)"
        )


def _check_equal(loss: Tensor, again: Tensor) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(loss.dtype, 0.02)
    if not torch.allclose(loss, again, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise ValueError(
            f"two forward passes over the same images at the same weights must agree, got the losses {float(loss):.6g} "
            f"and {float(again):.6g}: keep state in buffers or attributes of modules, and draw from torch's generators"
        )


def second_derivative_error(model: nn.Module, criterion: Criterion, params: Params, batch: Batch) -> float:
    """Relative error of torch's H g on one sub-batch, against a finite difference in float64; nan if the network does
    not compute in float64. Worked out once a network, which stays as it is.
    """
    if model not in _SECOND_DERIVATIVE_ERRORS:
        loss_fn = functional_loss(model, criterion)
        try:
            # Steps of a billionth of the weights and less: between kinks, and above rounding.
            errors = [_error(loss_fn, params, batch, step) for step in (1e-9, 1e-10)]
        except (RuntimeError, TypeError):
            errors = [math.nan]
        rounding = min(errors) > SECOND_DERIVATIVE_TOLERANCE and max(errors) > 2 * min(errors)
        _SECOND_DERIVATIVE_ERRORS[model] = math.nan if rounding else min(errors)
    return _SECOND_DERIVATIVE_ERRORS[model]


def _double(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _error(loss_fn: FunctionalLoss, params: Params, batch: Batch, step: float) -> float:
    double = {name: _double(tensor.detach()).clone().requires_grad_() for name, tensor in params.items()}
    doubled = (_double(batch[0]), _double(batch[1]))
    devices = {tensor.device for tensor in params.values()}

    def derivative(at: Params, create_graph: bool = False) -> Params:
        with repeatable(devices):
            return gradient(loss_fn.at(at, torch.float64)(doubled), double, create_graph)

    with full_precision(next(iter(devices))), math_attention():
        g = derivative(double, create_graph=True)
        constant = {name: tensor.detach() for name, tensor in g.items()}
        exact = gradient(dot(constant, g), double)
        length = float(dot(constant, constant).sqrt())
        weights = float(dot(double, double).detach().sqrt())
        alpha = step * weights / max(length, 1e-300)
        h = derivative(moved(double, constant, alpha))
    difference: Params = {}
    add_scaled(difference, constant, 1 / alpha)
    add_scaled(difference, h, -1 / alpha)
    add_scaled(difference, exact, -1.0)
    size = float(dot(exact, exact).sqrt()) + 1e-6 * length
    return float(dot(difference, difference).sqrt()) / size if size else 0.0


_NO_SECOND_DERIVATIVE = (
    "not implemented",
    "differentiate twice",
    "double backward",
    "not differentiable",
    "not have been used in the graph",
)


@contextmanager
def second_derivatives(what: str) -> Iterator[None]:
    """What torch cannot differentiate twice is refused with a ValueError, which says that `what` needs it."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if not any(sign in text for sign in _NO_SECOND_DERIVATIVE):
            raise
        raise ValueError(f"{what} needs a second derivative that torch does not have: {text}") from error
