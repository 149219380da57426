"""A torch module as a pure function of its parameters, and arithmetic on dictionaries of tensors."""

import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from infomcr_dist.replica import replica

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Criterion = Callable[[Any, Tensor], Tensor]
LossFunction = Callable[[Params, Batch], Tensor]


def trainable_parameters(model: nn.Module) -> Params:
    """The parameters of `model` that require a gradient, by name; a shared parameter appears once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Network(NamedTuple):
    """A model with its loss, to be evaluated once: a forward pass may change their state."""

    model: nn.Module
    criterion: Criterion

    def __call__(self, batch: Batch) -> Tensor:
        """The loss, a scalar; the batch stays as it is, whatever the model does in place."""
        images, labels = batch
        return mean_loss(self.criterion, self.model(images.clone()), labels.clone())


def mean_loss(criterion: Criterion, output: Any, labels: Tensor) -> Tensor:
    """`criterion(output, labels)`, refused with a ValueError if it is not a scalar."""
    loss = criterion(output, labels)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"criterion must return the mean over its batch, a scalar (reduction='mean'), got {got}")
    return loss


@dataclass(frozen=True)
class FunctionalLoss:
    """`criterion(model(images), labels)` as a function of the parameters; made by `functional_loss`."""

    model: nn.Module
    criterion: Criterion
    evaluate: bool = False
    """In eval mode, whatever the mode of `model`."""
    routes: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What `gradient_gram` has found out about the model."""

    def __call__(self, params: Params, batch: Batch) -> Tensor:
        return self.at(params)(batch)

    def logits(self, params: Params, images: Tensor) -> Any:
        """What the model returns."""
        return self.at(params).model(images.clone())

    def at(self, params: Params, dtype: torch.dtype | None = None) -> Network:
        """The model and the criterion at `params`, with the state that they have now; other floating point tensors are
        converted to `dtype`.

        Raises:
            ValueError: A name that no parameter of the model has, or a tensor of another shape.
        """
        own = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in params.items():
            if name not in own:
                nearest = difflib.get_close_matches(name, own, n=1, cutoff=0)
                raise ValueError(f"params must hold names of the model's parameters, got {name!r}; nearest: {nearest}")
            if tensor.shape != own[name].shape:
                expected, got = tuple(own[name].shape), tuple(tensor.shape)
                raise ValueError(f"params[{name!r}] must have the shape of the parameter, {expected}, got {got}")
        tensors = {id(own[name]): tensor for name, tensor in params.items()}
        return Network(*replica((self.model, self.criterion), tensors, evaluate=self.evaluate, dtype=dtype))


def functional_loss(
    model: nn.Module, criterion: Criterion = nn.functional.cross_entropy, *, evaluate: bool = False
) -> FunctionalLoss:
    """The loss of `model` as a pure function `loss_fn(params, (images, labels)) -> scalar`.

    The call runs on copies of the modules (see `replica`): in training mode BatchNorm normalizes by the batch, and the
    model's running statistics, and whatever other state the model or the criterion keeps, stay as they are.

    Args:
        model: Maps images to what `criterion` takes.
        criterion: `criterion(output, labels)`, a mean over the batch.
        evaluate: In eval mode, whatever the mode of `model` is.

    Returns:
        `loss_fn`. Its `params` maps names, as in `model.named_parameters()`, to tensors; a parameter without an entry
        keeps the model's own value.

    Raises:
        ValueError: The model is in DistributedDataParallel, which every forward pass prepares for a backward pass, or
            holds modules that cannot be copied.
    """
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model must not be in DistributedDataParallel here: give model.module")
    check_modules(model)
    return FunctionalLoss(model, criterion, evaluate)


def check_modules(model: nn.Module) -> None:
    """Refuse modules that are no torch code of one process, with a ValueError."""
    for kind in {type(module) for module in model.modules()}:
        if message := _refusal(kind):  # type: ignore[arg-type]
            raise ValueError(message)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"model must be initialized, {name!r} is lazy: pass a batch through it first")
        if type(parameter) is not nn.Parameter and type(parameter.data) is not Tensor:
            raise ValueError(
                f"model must hold plain tensors, {name!r} is a {type(parameter.data).__name__}: "
                "tensor parallelism and other tensor subclasses are not supported"
            )


@functools.cache
def _refusal(kind: type) -> str | None:
    """Why modules of a class are refused."""
    if issubclass(kind, torch.jit.ScriptModule):
        return f"model must not hold a ScriptModule, got {kind.__name__}: give the module it was made of"
    if issubclass(kind, nn.DataParallel):
        return "model must not be in DataParallel: start one process a device, with Horovod or torchrun"
    if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in kind.__mro__):
        return "model must not be sharded (fully_shard): use DistributedDataParallel, or one device"
    return None


def gradient(scalar: Tensor, params: Params, create_graph: bool = False) -> Params:
    """Gradient of `scalar` with respect to those of `params` that it depends on; fires no accumulation hook.

    Raises:
        ValueError: Nothing to differentiate, a sparse gradient, or activation checkpointing that is reentrant.
    """
    if not scalar.requires_grad:
        raise ValueError("the loss must depend on a trainable parameter, and not under torch.no_grad: it has no graph")
    try:
        tensors = torch.autograd.grad(scalar, list(params.values()), create_graph=create_graph, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError("checkpoint(use_reentrant=True) is not supported: give it use_reentrant=False") from error
    found = {name: tensor for name, tensor in zip(params, tensors, strict=True) if tensor is not None}
    for name, tensor in found.items():
        if tensor.layout is not torch.strided:
            raise ValueError(f"{name!r} has a sparse gradient, which is not supported: sparse=False in its layer")
    return found if create_graph else {name: _laid_out(tensor, params[name]) for name, tensor in found.items()}


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the strides of `like`, which p.grad must have; double backward returns others."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def moved(params: Params, direction: Params, length: float | Tensor) -> Params:
    """w - length * direction, differentiable in w; a parameter without a direction stays where it is."""
    copies = {name: params[name].clone() for name in direction}
    add_scaled(copies, direction, -length)
    return params | copies


def add_scaled(total: Params, term: Params, scale: float | Tensor) -> None:
    """total += scale * term, in place; a name missing in `total` counts as zero. `scale` may be a scalar tensor."""
    known = [name for name in term if name in total]
    new = [name for name in term if name not in total]
    sums, terms = [total[name] for name in known], [term[name] for name in known]
    if known:
        if isinstance(scale, Tensor):
            torch._foreach_add_(sums, torch._foreach_mul(terms, scale))
        else:
            torch._foreach_add_(sums, terms, alpha=scale)
    if new:
        first = torch._foreach_mul([term[name] for name in new], scale)
        total.update((name, tensor.to(term[name].dtype)) for name, tensor in zip(new, first, strict=True))


def dot(left: Params, right: Params) -> Tensor:
    """Real inner product over the names of `right`, a scalar, differentiable."""
    return torch.stack([_dot(left[name].flatten(), tensor.flatten()) for name, tensor in right.items()]).sum()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.vdot(left, right).real if left.is_complex() else torch.dot(left, right)
