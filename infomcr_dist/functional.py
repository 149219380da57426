"""A torch module as a pure function of its parameters, and arithmetic on dictionaries of tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]
LossFunction = Callable[[Params, Batch], Tensor]


def trainable_parameters(model: nn.Module) -> Params:
    """The parameters of `model` that require a gradient, by name; a shared parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class FunctionalLoss:
    """`criterion(model(images), labels)` as a function of the parameters; made by `functional_loss`."""

    model: nn.Module
    criterion: Criterion

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        images, labels = batch
        return self.criterion(self.logits(params, images), labels)

    def logits(self, params: Params, images: Tensor) -> Tensor:
        """What the model returns, run on copies of its buffers."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        logits: Tensor = functional_call(self.model, (params, buffers), (images,))
        return logits


def functional_loss(model: nn.Module, criterion: Criterion = nn.functional.cross_entropy) -> FunctionalLoss:
    """The loss of `model` as a pure function `loss_fn(params, (images, labels)) -> scalar`.

    `params` maps names, as in `model.named_parameters()`, to tensors; a name left out keeps the model's own value.
    `criterion(logits, labels)` must be a mean over the batch. The call runs on copies of the buffers: in training mode
    BatchNorm normalises by the batch and the model's running statistics stay as they are.

    Raises ValueError for a model in DistributedDataParallel, which every forward pass prepares for a backward pass.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model must not be in DistributedDataParallel here: give model.module")
    return FunctionalLoss(model, criterion)


def gradient(scalar: Tensor, params: Params, create_graph: bool = False) -> Params:
    """Gradient of `scalar` with respect to `params`, without those it does not depend on; fires no gradient hook."""
    tensors = torch.autograd.grad(scalar, list(params.values()), create_graph=create_graph, allow_unused=True)
    found = {name: tensor for name, tensor in zip(params, tensors, strict=True) if tensor is not None}
    return found if create_graph else {name: _laid_out(tensor, params[name]) for name, tensor in found.items()}


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the strides of `like`, which p.grad must have; double backward returns others."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def moved(params: Params, direction: Params, alpha: float) -> Params:
    """w - alpha * direction, differentiable in w; a parameter without a direction stays where it is."""
    tensors = torch._foreach_sub([params[name] for name in direction], list(direction.values()), alpha=alpha)
    return params | dict(zip(direction, tensors, strict=True))


def add_scaled(total: Params, term: Params, scale: float) -> None:
    """total += scale * term, in place; a name missing in `total` counts as zero."""
    known = [name for name in term if name in total]
    new = [name for name in term if name not in total]
    if known:
        torch._foreach_add_([total[name] for name in known], [term[name] for name in known], alpha=scale)
    if new:
        total.update(zip(new, torch._foreach_mul([term[name] for name in new], scale), strict=True))


def dot(left: Params, right: Params) -> Tensor:
    """Inner product over the names of `right`, a scalar, differentiable."""
    return torch.stack([torch.dot(left[name].flatten(), tensor.flatten()) for name, tensor in right.items()]).sum()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast on `device`, and neither TF32 nor bfloat16 inside float32 products, while it lasts."""
    backends: Any = torch.backends
    cuda, cudnn, onednn = backends.cuda, backends.cudnn, backends.mkldnn
    operations = (cuda.matmul, cudnn.conv, cudnn.rnn, onednn.matmul, onednn.conv)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode for `model` while it lasts; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
