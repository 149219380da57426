"""Forward passes of a training step, one after the other, with the effects of one: on BatchNorm's running statistics,
on random numbers, on hooks of the parameters' gradients, and on what DistributedDataParallel sends."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from infomcr_dist.functional import Batch, Criterion, Network, Params, mean_loss
from infomcr_dist.graph import accumulators, dependencies
from infomcr_dist.replica import replica

# Whether the backward pass of a model moves its buffers: activation checkpointing runs the forward pass again.
_RECOMPUTES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Passes:
    """The passes of one step.

    The last one of them is that whose backward pass is `.backward()`: hooks of the gradients fire there, and its
    `total` names the parameters that have a gradient so far, which its graph must reach for that.

    In DistributedDataParallel the first pass that moves state is a forward pass of the wrapper without synchronization
    and the last pass one with it, as in gradient accumulation: buffers are broadcast and gradients reduced once a step,
    also under `join`. The passes in between bypass the wrapper.
    """

    def __init__(self, model: nn.Module, criterion: Criterion, params: Params) -> None:
        self.wrapper = model if isinstance(model, DistributedDataParallel) else None
        self.model = unwrapped(model)
        self.criterion = criterion
        self.params = params
        self._started = False
        self._buffers = [module._buffers for module in self.model.modules() if module._buffers]

    def network(self, tensors: Params) -> Network:
        """A replica with the state of now, and `tensors` in the place of the parameters of these names."""
        by_id = {id(self.params[name]): tensor for name, tensor in tensors.items()}
        return Network(*replica((self.model, self.criterion), by_id))

    def tracked(self, batch: Batch, fraction: float, total: Params | None, counted: bool) -> Tensor:
        """The loss at the parameters over a fraction of the step's images, which moves the state of model and
        criterion. `counted`: see `_running_statistics`."""
        images, labels = batch
        first, self._started = not self._started, True
        with _running_statistics(self.model, fraction, counted):
            return mean_loss(self.criterion, self._forward(self.model, images, first, total), labels)

    def pure(self, network: Network, batch: Batch, total: Params | None) -> Tensor:
        """The loss of a replica, which moves its own state alone."""
        images, labels = batch[0].clone(), batch[1].clone()
        return mean_loss(network.criterion, self._forward(network.model, images, False, total), labels)

    def _forward(self, model: nn.Module, images: Tensor, first: bool, total: Params | None) -> Any:
        module = _Reaching(model, {name: self.params[name] for name in total}) if total else model
        if self.wrapper is None or not (first or total is not None):
            return module(images)
        with _standing_in(self.wrapper, module), nullcontext() if total is not None else self.wrapper.no_sync():
            return self.wrapper(images)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """For a backward pass: buffers that it moves, by running deferred work again, return to where they were."""
        recomputes = _RECOMPUTES.get(self.model)
        if not self._buffers or recomputes is False:
            yield
            return
        before = [
            (buffers, name, buffer, buffer.clone())
            for buffers in self._buffers
            for name, buffer in buffers.items()
            if buffer is not None
        ]
        yield
        if recomputes is None:  # the first backward pass of this model
            recomputes = any(
                buffers[name] is not buffer or not torch.equal(buffer, value) for buffers, name, buffer, value in before
            )
            if recomputes or self.model.training:
                _RECOMPUTES[self.model] = recomputes
        if recomputes:
            with torch.no_grad():
                for buffers, name, buffer, value in before:
                    buffer.data.copy_(value)  # not a change that a graph in use would refuse
                    buffers[name] = buffer


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in DistributedDataParallel, or `model`."""
    if isinstance(model, DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model


class _Reaching(nn.Module):
    """`module`, with an output whose graph arrives at all of `params`: with zeros at those that it does not use."""

    def __init__(self, module: nn.Module, params: Params) -> None:
        super().__init__()
        self.module, self._params = module, params

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return self.module.named_buffers(*args, **kwargs)

    def forward(self, images: Tensor) -> Any:
        output = self.module(images)
        roots = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        reached = dependencies(roots, accumulators(self._params)).reached
        missing = [parameter for name, parameter in self._params.items() if name not in reached]
        if not missing:
            return output
        zero = torch.stack([parameter.reshape(-1)[:0].sum().real for parameter in missing]).sum()
        return tree_map(lambda leaf: leaf + zero if any(leaf is root for root in roots) else leaf, output)


@contextmanager
def _standing_in(wrapper: nn.Module, module: nn.Module) -> Iterator[None]:
    """`module` in the place of `wrapper.module`."""
    inner = wrapper._modules["module"]
    wrapper._modules["module"] = module
    try:
        yield
    finally:
        wrapper._modules["module"] = inner


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


@contextmanager
def repeatable(devices: Iterable[torch.device]) -> Iterator[None]:
    """Afterwards the random numbers of torch, NumPy and Python are where they were, so that the next pass draws the
    same masks."""
    accelerators = {device for device in devices if device.type != "cpu"}
    python, numpy = random.getstate(), np.random.get_state()
    kind = next(iter(accelerators)).type if accelerators else "cpu"
    fork: AbstractContextManager[None] = torch.random.fork_rng(list(accelerators), device_type=kind)
    try:
        with fork:
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def hooks_once(params: Params) -> Iterator[Callable[[Params], Params]]:
    """Tensor hooks of the parameters do not fire before the block calls the function that it gets, with the gradient
    so far: then in each parameter's next backward pass, with the sum. The function returns what it has not taken."""
    hooked = {name: parameter._backward_hooks for name, parameter in params.items() if parameter._backward_hooks}

    def sums(total: Params) -> Params:
        for name, hooks in hooked.items():
            first = {-1: lambda grad, term=total[name]: grad + term} if name in total else {}
            params[name]._backward_hooks = OrderedDict(first | dict(hooks))
        return {name: term for name, term in total.items() if name not in hooked}

    try:
        for name in hooked:
            params[name]._backward_hooks = None
        yield sums
    finally:
        for name, hooks in hooked.items():
            params[name]._backward_hooks = hooks
