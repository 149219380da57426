"""The gradient of a step by first-order passes alone, without a wait for the device: what a CUDA graph can hold.

`regularized_backward` serves any training loop. This is the trainer's own, for a GPU: weights lie side by side, so that
moving all of them is one kernel; those that convolutions and linear layers multiply by are converted to bfloat16 once;
sub-batches, which do not depend on each other, take turns on several streams; and BatchNorm's statistics of each pass
are kept apart until the step is known to be finite. The results are those of `regularized_backward` up to rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from infomcr_dist.checks import Method, Scheme
from infomcr_dist.functional import Criterion, mean_loss, trainable_parameters
from infomcr_dist.methods import displacement, needs_size, norm
from infomcr_dist.replica import replica

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers that multiply by their weight, under autocast in low precision."""

Vector = tuple[Tensor, ...]
"""A point in the space of weights: a flat tensor for each `_Group`."""


class Penalty(NamedTuple):
    """How a step is regularized: the arguments of `regularized_backward`; k = M for the fused estimator."""

    alpha: float
    rho: float | None
    """As in `Scheme`"""
    sub_batches: int
    """M"""
    num_penalized: int
    """k"""
    method: Method = "infomcr"


class FirstOrder:
    """The passes of a model's steps; the gradient of each step is left in ``p.grad``.

    Args:
        model: In training mode, on one device, its trainable parameters in float32.
        criterion: A mean over its batch in which all labels count alike.
        images: (B, ...), a few images to try the model with.
        labels: (B,).
        bf16: Compute under autocast to bfloat16.
        streams: Streams of a GPU that the sub-batches take turns on; 1: the current one.
        compile: Compile the passes and the arithmetic of the weights with torch.compile.

    Raises:
        ValueError: Why the model cannot be run this way; nothing has changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        images: Tensor,
        labels: Tensor,
        *,
        bf16: bool,
        streams: int = 1,
        compile: bool = False,
    ) -> None:
        self._params = trainable_parameters(model)
        self._bf16, self._device = bf16, images.device
        self._norms = _norms(model)
        check(model, criterion, images, labels, bf16)
        products = _products(model, self._params) if bf16 else set()
        names = [[n for n in self._params if n in products], [n for n in self._params if n not in products]]
        self._groups = [
            _Group(group, [self._params[name] for name in group], dtype)
            for group, dtype in zip(names, (torch.bfloat16, torch.float32), strict=True)
            if group
        ]
        self._buffers = [f"{name}.{kind}" for name, _ in self._norms for kind in ("running_mean", "running_var")]
        self._momentum = torch.cat(
            [torch.full((2 * layer.num_features,), layer.momentum or 0.0) for _, layer in self._norms]
            or [torch.zeros(0)]
        ).to(self._device)
        self._at_weights = _variant(model, statistics=True)
        self._at_moved = _variant(model, statistics=False)
        self._criterion = criterion
        parallel = streams > 1 and self._device.type == "cuda"
        self._streams = [torch.cuda.Stream() for _ in range(streams)] if parallel else []
        self._totals: list[Vector] = [tuple(group.zeros() for group in self._groups) for _ in range(max(1, streams))]
        self._pending: list[tuple[list[Tensor], float]] = []
        self._loss: Callable[..., Tensor] = torch.compile(_loss, dynamic=False) if compile else _loss
        self._shift: Callable[..., Tensor] = torch.compile(_shift) if compile else _shift
        self._accumulate: Callable[..., None] = torch.compile(_accumulate) if compile else _accumulate

    @torch.no_grad()
    def backward(
        self,
        images: Tensor,
        labels: Tensor,
        penalty: Penalty | None,
        beta: Tensor,
        loss_scale: float,
        order: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The gradient of loss_scale * (L + beta R), or of loss_scale * L, in ``p.grad``.

        Args:
            images: (B, ...).
            labels: (B,).
            penalty: None for a plain step.
            beta: A scalar on the device.
            loss_scale: Factor of the whole gradient.
            order: (M,), the sub-batches in the order in which they are taken, the penalized ones first; None: as they
                are.

        Returns:
            L and R, scalars.
        """
        weights = tuple(group.read() for group in self._groups)
        low = tuple(flat.to(group.dtype) for group, flat in zip(self._groups, weights, strict=True))
        for flat in self._totals[0]:
            flat.zero_()
        if penalty is None:
            statistics = self._statistics()
            loss, g = self._pass(low, images, labels, statistics)
            _add(self._totals[0], g, loss_scale)
            self._pending = [(statistics, 1.0)]
            penalty_value = torch.zeros((), device=self._device)
        else:
            if order is not None:
                images, labels = (t.unflatten(0, (len(order), -1))[order].flatten(0, 1) for t in (images, labels))
            loss, penalty_value = self._regularized(weights, low, images, labels, penalty, beta, loss_scale)
        for group, flat in zip(self._groups, self._totals[0], strict=True):
            for parameter, view in zip(group.parameters, group.views(flat), strict=True):
                parameter.grad = view
        return loss, penalty_value

    @torch.no_grad()
    def settle(self, finite: Tensor) -> None:
        """Move BatchNorm's running statistics by the passes of the last `backward`, if it was finite (a scalar)."""
        running = [buffer for _, layer in self._norms for buffer in (layer.running_mean, layer.running_var)]
        if not running:
            return
        before = torch.cat(running)  # type: ignore[arg-type]
        after = before
        for statistics, fraction in self._pending:
            weight = 1 - (1 - self._momentum) ** fraction if fraction < 1 else self._momentum
            after = torch.lerp(after, torch.cat(statistics), weight)
        after = torch.where(finite, after, before)
        torch._foreach_copy_(running, list(after.split([len(buffer) for buffer in running])))  # type: ignore[arg-type]
        counters = [layer.num_batches_tracked for _, layer in self._norms if layer.num_batches_tracked is not None]
        torch._foreach_add_(counters, [finite.to(counter.dtype) for counter in counters])

    def _regularized(
        self,
        weights: Vector,
        low: Vector,
        images: Tensor,
        labels: Tensor,
        penalty: Penalty,
        beta: Tensor,
        loss_scale: float,
    ) -> tuple[Tensor, Tensor]:
        count, penalized = penalty.sub_batches, penalty.num_penalized
        size = len(labels) // count
        parts = list(zip(images.split(size), labels.split(size), strict=True))[:penalized]
        scheme = Scheme("finite_difference", penalty.alpha, penalty.rho, penalty.method)
        length = norm(weights) if needs_size(scheme) else None
        main = torch.cuda.current_stream() if self._streams else None
        losses, penalties, statistics = [], [], [self._statistics() for _ in parts]
        rest = None
        if penalized < count:
            rest = (images[penalized * size :], labels[penalized * size :])
            statistics.append(self._statistics())
        for stream in self._streams:
            stream.wait_stream(main)  # type: ignore[arg-type]
        for i, part in enumerate(parts):
            turn = i % len(self._totals)
            total = self._totals[turn]
            with torch.cuda.stream(self._streams[turn]) if self._streams else nullcontext():
                if 0 < turn == i:
                    for flat in total:
                        flat.zero_()
                loss, g = self._pass(low, *part, statistics[i])
                where = displacement(scheme, list(weights), list(g), length)
                moved = tuple(
                    self._shift(w, d, where.length, one.dtype)
                    for w, d, one in zip(weights, where.direction, low, strict=True)
                )
                moved_loss, h = self._pass(moved, *part, None)
                weight = loss_scale / penalized * where.scale * beta
                for flat, one, other in zip(total, g, h, strict=True):
                    self._accumulate(flat, one, other, loss_scale / count, weight)
                losses.append(loss)
                penalties.append(where.scale * (loss - moved_loss))
        if rest is not None:
            loss, g = self._pass(low, *rest, statistics[-1])
            losses.append(loss * (count - penalized))
        for stream in self._streams:
            main.wait_stream(stream)  # type: ignore[union-attr]
        if rest is not None:
            _add(self._totals[0], g, loss_scale * (1 - penalized / count))
        for total in self._totals[1 : len(parts)]:
            _add(self._totals[0], total, 1.0)
        fractions = [1 / count] * penalized + [1 - penalized / count] * (rest is not None)
        self._pending = list(zip(statistics, fractions, strict=True))
        return torch.stack(losses).sum() / count, torch.stack(penalties).mean()

    def _statistics(self) -> list[Tensor]:
        """Zeros for the statistics of one pass: the mean and the variance of each BatchNorm layer."""
        return [
            torch.zeros(layer.num_features, device=self._device) for _, layer in self._norms for _ in ("mean", "var")
        ]

    def _pass(
        self, weights: Vector, images: Tensor, labels: Tensor, statistics: list[Tensor] | None
    ) -> tuple[Tensor, Vector]:
        """The loss of some images at some weights, and its gradient; their statistics are written to `statistics`."""
        leaves: list[Tensor] = []
        for group, flat in zip(self._groups, weights, strict=True):
            leaves += [view.requires_grad_() for view in group.views(flat)]
        tensors = dict(zip((name for group in self._groups for name in group.names), leaves, strict=True))
        module = self._at_moved
        if statistics is not None:
            tensors |= dict(zip(self._buffers, statistics, strict=True))
            module = self._at_weights
        with torch.enable_grad():
            loss = self._loss(module, self._criterion, tensors, images, labels, self._bf16)
        gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        parts = iter(gradients)
        flats = tuple(group.flat([next(parts) for _ in group.names]) for group in self._groups)
        return loss.detach(), flats


def check(model: nn.Module, criterion: Criterion, images: Tensor, labels: Tensor, bf16: bool) -> None:
    """Refuse, with a ValueError, a model whose passes are more than arithmetic and BatchNorm's statistics."""
    if any(parameter.dtype != torch.float32 for parameter in trainable_parameters(model).values()):
        raise ValueError("parameters that are not in float32")
    if {tensor.device for tensor in (*model.parameters(), *model.buffers())} != {images.device}:
        raise ValueError("parameters on several devices")
    known = {id(layer) for _, layer in _norms(model)}
    for module in model.modules():
        if isinstance(module, _NormBase) and module.training and module.track_running_stats and id(module) not in known:
            raise ValueError(f"running statistics of {type(module).__name__} with momentum={module.momentum}")
    own = {f"{name}.{kind}" for name, _ in _norms(model) for kind in ("running_mean", "running_var", _COUNTER)}
    copy, own_criterion = replica((model, criterion), {})
    before = {name: buffer.clone() for name, buffer in copy.named_buffers()}
    states = _random_states(images.device)
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        mean_loss(own_criterion, copy(images), labels)
    if any(not torch.equal(one, other) for one, other in zip(states, _random_states(images.device), strict=True)):
        raise ValueError("a forward pass that draws random numbers")
    for name, buffer in copy.named_buffers():
        if name not in own and not torch.equal(buffer, before[name]):
            raise ValueError(f"a forward pass that changes the buffer {name!r}")


_COUNTER = "num_batches_tracked"


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state(), torch.tensor(hash((random.getstate(), str(np.random.get_state()))))]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _norms(model: nn.Module) -> list[tuple[str, _NormBase]]:
    """The BatchNorm layers whose running statistics a pass moves, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _NORMS)
        and type(module) in _NORMS
        and module.training
        and module.track_running_stats
        and module.momentum is not None
    ]


def _products(model: nn.Module, params: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that nothing but convolutions and linear layers uses, as their weight."""
    names = {id(tensor): name for name, tensor in params.items()}
    weights: set[str] = set()
    others: set[str] = set()
    for module in model.modules():
        for kind, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in names:
                (weights if type(module) in _PRODUCTS and kind == "weight" else others).add(names[id(parameter)])
    return weights - others


def _variant(model: nn.Module, statistics: bool) -> nn.Module:
    """A copy that shares the parameters; its BatchNorm layers write the statistics of one pass, or none."""
    shared = {id(buffer): buffer for buffer in model.buffers()}
    (copy,) = replica((model,), shared)
    for _, layer in _norms(copy):
        layer._buffers[_COUNTER] = None
        if statistics:
            layer.momentum = 1.0
        else:
            layer.track_running_stats = False
    return copy  # type: ignore[no-any-return]


def _loss(
    module: nn.Module, criterion: Criterion, tensors: dict[str, Tensor], images: Tensor, labels: Tensor, bf16: bool
) -> Tensor:
    # Without the cache, which would keep the converted weights of every pass.
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        return mean_loss(criterion, functional_call(module, tensors, (images,)), labels)


def _shift(weights: Tensor, gradient: Tensor, step: Tensor | float, dtype: torch.dtype) -> Tensor:
    """w - step * g, rounded once."""
    if dtype == weights.dtype or not isinstance(step, Tensor) or torch.compiler.is_compiling():
        return (weights - step * gradient.to(weights.dtype)).to(dtype)
    return torch.addcmul(weights, gradient, -step, out=torch.empty_like(weights, dtype=dtype))


def _accumulate(total: Tensor, g: Tensor, h: Tensor, factor: float, weight: Tensor) -> None:
    """total += factor * g + weight * (g - h)"""
    total.add_(g, alpha=factor)
    total.addcmul_(g - h, weight)


def _add(total: Vector, g: Vector, factor: float) -> None:
    """total += factor * g"""
    for flat, one in zip(total, g, strict=True):
        flat.add_(one, alpha=factor)


class _Group:
    """Parameters side by side in one flat tensor, each in the order that it has in memory."""

    def __init__(self, names: list[str], parameters: list[Tensor], dtype: torch.dtype) -> None:
        self.names, self.parameters, self.dtype = names, parameters, dtype
        ends = np.cumsum([0, *(parameter.numel() for parameter in parameters)])
        self._ranges = list(pairwise(map(int, ends)))
        self._orders = [sorted(range(p.dim()), key=lambda i, p=p: -p.stride(i)) for p in parameters]  # type: ignore[misc]

    def zeros(self) -> Tensor:
        return torch.zeros(self._ranges[-1][1], device=self.parameters[0].device)

    def read(self) -> Tensor:
        return self.flat(self.parameters)

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes side by side."""
        return torch.cat([t.permute(order).reshape(-1) for t, order in zip(tensors, self._orders, strict=True)])

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of a flat tensor in the parameters' shapes, detached from it."""
        parts = []
        for parameter, order, (start, end) in zip(self.parameters, self._orders, self._ranges, strict=True):
            inverse = [order.index(i) for i in range(len(order))]
            part = flat[start:end].view([parameter.shape[i] for i in order])
            parts.append(part.permute(inverse).detach())
        return parts
