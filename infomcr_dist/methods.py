"""The two gradients of a sub-batch, and the methods: where the second is taken, and how it counts.

All of them minimize L(B, w) + beta R(w), where R compares the loss of each sub-batch at w with that at another point,
which is held constant: R = mean of scale_i (L(B_i, w) - L(B_i, w - epsilon_i d_i)). With g_i at w and h_i at the other
point, the gradient of a step is the mean of a_i g_i + b_i h_i, a_i = 1 + beta scale_i and b_i = -beta scale_i::

    method         d_i        epsilon_i                    scale_i             gradient of a step, mean of
    infomcr        g_i        alpha                        1                   g_i + beta (g_i - h_i)
    infomcr, step  g_i        rho norm(w) / norm(g_i)      alpha / epsilon_i   the same, for a small alpha
    sam            g_i        -rho / norm(g_i)             -1                  h_i, at beta = 1
    asam           w^2 g_i    -rho / norm(w g_i)           -1                  h_i, at beta = 1
    gradient_norm  g_i        -rho / norm(g_i)             -1                  (1 - beta) g_i + beta h_i

Jia & Su 2020; Foret et al. 2021; Kwon et al. 2021, with the product by w element by element; Zhao et al. 2022.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from infomcr_dist.checks import Derivative, Scheme, devices
from infomcr_dist.functional import Params, dot, gradient
from infomcr_dist.inspection import second_derivatives
from infomcr_dist.passes import repeatable
from infomcr_dist.precision import full_precision, math_attention


class Displacement(NamedTuple):
    """The other point is w - length * direction; the loss's fall on the way there counts `scale` times."""

    direction: list[Tensor]
    length: float | Tensor
    scale: float | Tensor


def displacement(scheme: Scheme, weights: list[Tensor], gradients: list[Tensor], size: Tensor | None) -> Displacement:
    """Where the second gradient of a sub-batch is taken: a table is above.

    Args:
        scheme: Of finite differences.
        weights: w, detached, any parts of it that all gradients are of.
        gradients: g_i, of the same shapes.
        size: |w|, where `needs_size` is true.
    """
    if scheme.method == "infomcr":
        if size is None:
            return Displacement(gradients, scheme.alpha, 1.0)
        assert scheme.rho is not None
        length = scheme.rho * size / _divisor(gradients)
        return Displacement(gradients, length, scheme.alpha / length)
    assert scheme.rho is not None
    if scheme.method != "asam":
        return Displacement(gradients, -scheme.rho / _divisor(gradients), -1.0)
    scaled = list(torch._foreach_mul(gradients, torch._foreach_abs(weights)))
    length = -scheme.rho / _divisor(scaled)
    return Displacement(list(torch._foreach_mul(scaled, torch._foreach_abs(weights))), length, -1.0)


def needs_size(scheme: Scheme) -> bool:
    """Whether `displacement` needs |w|."""
    return scheme.method == "infomcr" and scheme.rho is not None


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """2-norm of all of them together, a scalar, in float32 or better."""
    parts = [tensor.detach() for tensor in tensors]
    low = any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in parts)
    norms = torch._foreach_norm(parts, 2, torch.float32 if low else None)
    return torch.stack(norms).square().sum().sqrt()


def _divisor(tensors: list[Tensor]) -> Tensor:
    """Their norm. A gradient of zeros moves nothing, however far."""
    size = norm(tensors)
    return size.clamp_min(torch.finfo(size.dtype).tiny ** 0.5)


class SubBatch(NamedTuple):
    """One sub-batch at w. The gradient of its penalty is that of `surrogate` (exact), or `scale` times the sum of g_i
    and that of `surrogate`, -h_i (finite difference)."""

    loss: Tensor
    penalty: Tensor
    gradient: Params
    surrogate: Tensor
    at: Params
    """Where to differentiate `surrogate`."""
    scale: float | Tensor = 1.0


def evaluate(
    loss: Tensor,
    perturbed: Callable[[Params, float | Tensor], Tensor],
    params: Params,
    scheme: Scheme,
    size: Tensor | None,
    settled: AbstractContextManager[None],
) -> SubBatch:
    """`loss` at w; `perturbed(g, epsilon)` is the loss at w - epsilon g; both see the same dropout mask. `settled` is
    for the backward pass of `loss`."""
    if scheme.derivative == "exact":
        with differentiated_twice(scheme.derivative), settled:
            g = gradient(loss, params, create_graph=True)
        constant = {name: tensor.detach() for name, tensor in g.items()}
        penalty = scheme.alpha * dot(constant, g)
        # 0 * loss: the hook of every parameter fires, even of one that g_i does not depend on.
        return SubBatch(loss.detach(), penalty.detach(), constant, penalty + 0.0 * loss, params)
    with settled:
        g = gradient(loss, params)
    where = displacement(scheme, [params[name].detach() for name in g], list(g.values()), size)
    direction = dict(zip(g, where.direction, strict=True))
    kind = loss.device.type
    # Autocast would keep its copies of all moved weights.
    with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        moved_loss = perturbed(direction, where.length)
    return SubBatch(loss.detach(), where.scale * (loss - moved_loss).detach(), g, -moved_loss, params, where.scale)


def pass_precision(scheme: Scheme, params: Params) -> AbstractContextManager[None]:
    """What the passes compute in; a longer step leaves it to the caller."""
    if scheme.derivative == "exact":
        return math_attention()
    return full_precision(devices(params)[0]) if scheme.rho is None else nullcontext()


def same_draws(derivative: Derivative, params: Params) -> AbstractContextManager[None]:
    """For the first of two passes: the second draws the same random numbers."""
    return repeatable(devices(params)) if derivative == "finite_difference" else nullcontext()


def differentiated_twice(derivative: Derivative) -> AbstractContextManager[None]:
    """Refuses what torch cannot differentiate twice, where the derivative is exact."""
    what = "derivative='exact' (the other is 'finite_difference', in float32)"
    return second_derivatives(what) if derivative == "exact" else nullcontext()
