"""Steps as CUDA graphs: the kernels of a step are recorded once for each kind of step, and then launched as one.

A GPU takes a few microseconds for a kernel of a small network, the host ten times as long to launch it. The passes of
`FirstOrder` and the update of the weights are recorded; the allreduce in between is the engine's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from infomcr_dist.first_order import FirstOrder, Penalty
from infomcr_dist.world import World

_MOST_KINDS = 16
"""Graphs that are kept, each with the memory of a step's passes; steps of other kinds are launched kernel by kernel."""


@dataclass
class _Kind:
    """The steps of one shape, penalty and factor of the gradient."""

    images: Tensor
    labels: Tensor
    order: Tensor | None
    gradient: torch.cuda.CUDAGraph = field(default_factory=torch.cuda.CUDAGraph)
    update: torch.cuda.CUDAGraph | None = None
    losses: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]
    gradients: list[Tensor] = field(default_factory=list)
    outcome: Tensor | None = None


class Graphs:
    """Takes the steps of one run; the first of each kind kernel by kernel, the second is recorded.

    Args:
        passes: Of the model.
        model: What `World.distribute` returned.
        optimizer: Likewise; its update is one of torch's fused ones.
        world: The workers.
        clip_gradient_norm: Largest 2-norm of the averaged gradient.
    """

    def __init__(
        self,
        passes: FirstOrder,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        clip_gradient_norm: float | None,
    ) -> None:
        self._passes, self._optimizer, self._world, self._clip = passes, optimizer, world, clip_gradient_norm
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        device = self._parameters[0].device
        self._beta = torch.zeros((), device=device)
        self._rate = torch.zeros((), device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._kinds: dict[tuple[object, ...], _Kind | None] = {}
        self._current: _Kind | None = None
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def backward(
        self, images: Tensor, labels: Tensor, penalty: Penalty | None, beta: float, loss_scale: float
    ) -> tuple[Tensor, Tensor]:
        """`FirstOrder.backward`; the sampled sub-batches are drawn from torch's CPU generator."""
        order = None
        if penalty is not None and penalty.num_penalized < penalty.sub_batches:
            drawn = torch.randperm(penalty.sub_batches)
            order = torch.cat([drawn[: penalty.num_penalized], drawn[penalty.num_penalized :].sort().values])
            order = order.pin_memory().to(images.device, non_blocking=True) if images.is_cuda else order
        self._beta.fill_(beta)
        key = (images.shape, images.stride(), images.dtype, labels.shape, labels.dtype, penalty, loss_scale)
        first = key not in self._kinds
        kind = self._kinds.get(key)
        self._current = kind
        if first or (kind is None and (self._pool is None or len(self._kinds) > _MOST_KINDS)):
            self._kinds.setdefault(key, None)
            return self._passes.backward(images, labels, penalty, self._beta, loss_scale, order)
        if kind is None:
            kind = self._current = self._kinds[key] = _Kind(images.clone(), labels.clone(), order)
            with torch.cuda.graph(kind.gradient, pool=self._pool, capture_error_mode="thread_local"):
                kind.losses = self._passes.backward(
                    kind.images, kind.labels, penalty, self._beta, loss_scale, kind.order
                )
            kind.gradients = [parameter.grad for parameter in self._parameters]  # type: ignore[misc]
        kind.images.copy_(images, non_blocking=True)
        kind.labels.copy_(labels, non_blocking=True)
        if kind.order is not None and order is not None:
            kind.order.copy_(order, non_blocking=True)
        kind.gradient.replay()
        for parameter, gradient in zip(self._parameters, kind.gradients, strict=True):
            parameter.grad = gradient
        return kind.losses

    def update(self, losses: Tensor) -> Tensor:
        """Update weights and running statistics from averaged gradients, where all is finite.

        Args:
            losses: (2,), loss and penalty over all workers.

        Returns:
            (2,): the norm of the gradient, and 1 where all was finite.
        """
        kind = self._current
        self._sums.copy_(losses)
        if kind is None:
            return self._update()
        self._rate.fill_(self._optimizer.param_groups[0]["lr"])
        if kind.update is None:
            kind.update = torch.cuda.CUDAGraph()
            groups = self._optimizer.param_groups
            before: list[dict[str, Any]] = [
                {name: group[name] for name in ("lr", "capturable") if name in group} for group in groups
            ]
            for group, names in zip(groups, before, strict=True):
                # Adam keeps its count of steps on the device anyway, where it is fused.
                group.update({name: self._rate if name == "lr" else True for name in names})
            with torch.cuda.graph(kind.update, pool=self._pool, capture_error_mode="thread_local"):
                kind.outcome = self._update()
            for group, names in zip(groups, before, strict=True):
                group.update(names)
        kind.update.replay()
        assert kind.outcome is not None
        return kind.outcome

    def _update(self) -> Tensor:
        outcome = update(self._parameters, self._optimizer, self._world, self._sums, self._clip)
        self._passes.settle(outcome[1] == 1)
        return outcome


@torch.no_grad()
def update(
    parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, world: World, losses: Tensor, clip: float | None
) -> Tensor:
    """Update the weights from averaged gradients, unless losses or gradients are not finite, without a wait for the
    device where the optimizer is fused.

    Returns:
        (2,) float64: the norm of the gradient, and 1 where all was finite.
    """
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    finite = torch.isfinite(losses).all() & torch.isfinite(norm)
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    if all(group.get("fused") for group in optimizer.param_groups):
        for group in optimizer.param_groups:
            for parameter in group["params"] if group.get("momentum") else ():
                # torch leaves it uninitialized where the very first update is skipped.
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        world.update(optimizer)
    elif finite:
        world.update(optimizer)
    return torch.stack([norm.double(), finite.double()])
