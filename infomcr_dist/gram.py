"""The Gram matrix of per-sample gradients, without ever holding them all (Jia & Su, ICML 2020, Eq. 5)."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from infomcr_dist.functional import (
    Batch,
    FunctionalLoss,
    LossFunction,
    Params,
    evaluation,
    full_precision,
    functional_loss,
)

BLOCK_BYTES = 256 * 2**20  # of J held at a time
CACHE_BYTES = 4 * 2**20  # of a layer's input patches held at a time


def gradient_gram(loss_fn: LossFunction, params: Params, batch: Batch, chunk: int | None = None) -> Tensor:
    """xi = J J^T, (N, N) float64 (Eq. 5): inner products of the gradients of the N samples of `batch`.

    Row n of J is the gradient of `loss_fn(params, (images[n:n+1], labels[n:n+1]))` with respect to `params`; J is never
    held as a whole. A model behind `functional_loss` runs once, in eval mode (with batch statistics a sample has no
    gradient of its own): weights of convolutions, linear layers and BatchNorm are taken from each layer's input and
    output gradient. Any other parameter, and any other `loss_fn`, goes the general way: `chunk` samples (default: all)
    are differentiated at a time, for as many parameters as fit. Runs outside autocast and with TF32 off.

    Raises ValueError for an empty batch, labels that do not match, and chunk < 1.
    """
    images, labels = batch
    if len(images) < 1 or len(images) != len(labels):
        raise ValueError(f"batch must hold as many labels as images, at least one, got {len(labels)} and {len(images)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    leaves = {name: tensor.detach() for name, tensor in params.items()}
    total = _Sum(images)
    with full_precision(images.device):
        if not isinstance(loss_fn, FunctionalLoss):
            _add_general(total, loss_fn, leaves, list(leaves), batch, chunk)
            return total.gram()
        # p - y of a sample that is fitted well cancels in float32: the loss is taken in float64.
        precise = functional_loss(loss_fn.model, lambda logits, labels: loss_fn.criterion(logits.double(), labels))
        with evaluation(loss_fn.model):
            left = _add_layers(total, precise, leaves, batch)
            _add_general(total, precise, leaves, left, batch, chunk)
    return total.gram()


class _Sum:
    """The Gram matrix so far, of which the lower triangle is left for the end, and memory that layers use in turn:
    fresh blocks of this size cost as much in page faults as the arithmetic in them."""

    def __init__(self, like: Tensor) -> None:
        self.samples = len(like)
        self.upper = torch.zeros(self.samples, self.samples, dtype=torch.float64, device=like.device)
        self.buffers: dict[str, Tensor] = {}

    def buffer(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialised memory, valid until the next request for the same use."""
        size = math.prod(shape)
        if use not in self.buffers or self.buffers[use].numel() < size or self.buffers[use].dtype != like.dtype:
            self.buffers[use] = like.new_empty(size)
        return self.buffers[use][:size].view(shape)

    def add(self, rows: Tensor) -> None:
        """Add rows rows^T for a block of columns (N, any) of J."""
        for block in self._thirds():
            self.upper[block, block.start :] += rows[block] @ rows[block.start :].T

    def add_outer(self, inputs: Callable[[slice], Tensor], outputs: Tensor) -> None:
        """Add the inner products of the matrices G_n = outputs_n inputs_n^T, for inputs of some samples (any, D, P) and
        outputs (N, O, P): from blocks of rows of G, or, which is cheaper for few positions P, as
        <G_n, G_m> = sum_pq (inputs_np . inputs_mq) (outputs_np . outputs_mq)."""
        samples, width, positions = outputs.shape
        depth, item = inputs(slice(0, 1)).shape[1], outputs.element_size()
        if samples * positions**2 * (depth + width) > (2 * positions + samples) * depth * width:
            chunk = max(1, CACHE_BYTES // (depth * positions * item))
            for part in outputs.split(max(1, BLOCK_BYTES // (samples * depth * item)), dim=1):
                rows = self.buffer("rows", (samples, part.shape[1], depth), outputs)
                for first in range(0, samples, chunk):
                    some = slice(first, first + chunk)
                    torch.bmm(part[some], inputs(some).mT, out=rows[some])
                self.add(rows.flatten(1))
            return
        left, right = (tensor.mT.reshape(samples * positions, -1) for tensor in (inputs(slice(None)), outputs))
        for block in self._thirds():
            rows_of, later = (
                slice(block.start * positions, block.stop * positions),
                slice(block.start * positions, None),
            )
            products = (left[rows_of] @ left[later].T).mul_(right[rows_of] @ right[later].T)
            pairs = products.view(block.stop - block.start, positions, -1, positions)
            self.upper[block, block.start :] += pairs.sum((1, 3))

    def _thirds(self) -> Iterator[slice]:
        """Blocks of rows; what lies left of a block's first row is not computed."""
        size = -(-self.samples // 3)
        for first in range(0, self.samples, size):
            yield slice(first, min(first + size, self.samples))

    def gram(self) -> Tensor:
        return self.upper.triu() + self.upper.triu(1).mT


def _add_general(
    total: _Sum, loss_fn: LossFunction, params: Params, names: list[str], batch: Batch, chunk: int | None
) -> None:
    """Add the part of the named parameters, from their block of J."""
    for group in _groups({name: params[name] for name in names}, total.samples):
        fixed = {name: tensor for name, tensor in params.items() if name not in group}

        def sample_loss(chosen: Params, image: Tensor, label: Tensor, fixed: Params = fixed) -> Tensor:
            return loss_fn(fixed | chosen, (image[None], label[None]))

        per_sample = vmap(grad(sample_loss), in_dims=(None, 0, 0), chunk_size=chunk)
        for rows in per_sample({name: params[name] for name in group}, *batch).values():
            total.add(rows.flatten(1))


def _groups(params: Params, samples: int) -> Iterator[list[str]]:
    """Names of parameters whose rows of J fit BLOCK_BYTES together; a larger one stands alone."""
    group: list[str] = []
    size = 0
    for name, tensor in params.items():
        rows = samples * tensor.numel() * tensor.element_size()
        if group and size + rows > BLOCK_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += rows
    if group:
        yield group


Arguments = dict[str, Any]
CONVOLUTION = {"stride": 1, "padding": 0, "dilation": 1}


def _add_layers(total: _Sum, loss_fn: FunctionalLoss, params: Params, batch: Batch) -> list[str]:
    """Add the parts of all parameters that layers account for; the names of the others."""
    images, labels = batch
    with _Layers(total, params) as layers:
        logits = loss_fn.logits(params, images)
    if layers.starts:
        losses = [loss_fn.criterion(logits[n : n + 1], labels[n : n + 1]) for n in range(len(images))]
        torch.autograd.grad(torch.stack(losses).sum(), layers.starts, allow_unused=True)
    return [name for name in params if name not in layers.done]


class _Layers(TorchFunctionMode):
    """Watches a forward pass for the functions in LAYERS, whose per-sample parameter gradients follow from their input
    and output gradient, and adds the part of each to `total` when the backward pass reaches it.

    `uses` counts the calls that take a parameter: one used twice, or by another function, is left to the general way.
    Afterwards `done` names the parameters that were added. The backward pass ends at `starts`.
    """

    def __init__(self, total: _Sum, params: Params) -> None:
        super().__init__()
        self.total = total
        self.names = {id(tensor): name for name, tensor in params.items()}
        self.uses: Counter[str] = Counter()
        self.done: set[str] = set()
        self.starts: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Arguments | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        used = [self.names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.names]
        if not used or not isinstance(result, Tensor):
            return result
        self.uses.update(used)
        if function not in LAYERS:
            return result
        names, covers, add_weight = LAYERS[function]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if not covers(arguments) or len(result) != self.total.samples:
            return result
        if not result.requires_grad:
            self.starts.append(result.requires_grad_())
            result = result.clone()  # what follows may work in place, which a leaf forbids

        def add(output_gradient: Tensor) -> None:
            if name := self._once(arguments["weight"]):
                add_weight(self.total, arguments, output_gradient)
                self.done.add(name)
            if name := self._once(arguments.get("bias")):
                channels = output_gradient.movedim(-1, 1) if function is F.linear else output_gradient
                self.total.add(channels.reshape(*channels.shape[:2], -1).sum(2))
                self.done.add(name)
            arguments.clear()  # the graph keeps this function, and it the input

        result.register_hook(add)
        return result

    def _once(self, tensor: Tensor | None) -> str | None:
        name = self.names.get(id(tensor))
        return name if name is not None and self.uses[name] == 1 else None


def _add_convolution(total: _Sum, arguments: Arguments, output_gradient: Tensor) -> None:
    weight, outputs = arguments["weight"], output_gradient.flatten(2)
    stride, padding, dilation = (_pair(arguments.get(name, default)) for name, default in CONVOLUTION.items())
    padded = arguments["input"]
    if any(padding):
        padded = F.pad(padded, (padding[1], padding[1], padding[0], padding[0]))
    groups = arguments.get("groups", 1)
    shape = (padded.shape[1] // groups, *weight.shape[2:], *output_gradient.shape[2:])
    strides = [*padded.stride(), *padded.stride()[2:]]
    for axis in (0, 1):
        strides[2 + axis] *= dilation[axis]
        strides[4 + axis] *= stride[axis]
    for images, gradients in zip(padded.chunk(groups, dim=1), outputs.chunk(groups, dim=1), strict=True):

        def patches(some: slice, images: Tensor = images) -> Tensor:
            chosen = images[some]
            windows = chosen.as_strided((len(chosen), *shape), strides, chosen.storage_offset())
            copies = total.buffer("patches", windows.shape, chosen).copy_(windows)
            return copies.view(len(chosen), -1, outputs.shape[2])

        total.add_outer(patches, gradients)


def _add_linear(total: _Sum, arguments: Arguments, output_gradient: Tensor) -> None:
    inputs, outputs = (
        tensor.reshape(total.samples, -1, tensor.shape[-1]).mT for tensor in (arguments["input"], output_gradient)
    )
    total.add_outer(lambda some: inputs[some], outputs)


def _add_batch_norm(total: _Sum, arguments: Arguments, output_gradient: Tensor) -> None:
    mean, variance = arguments["running_mean"], arguments["running_var"]
    inputs, outputs = (tensor.reshape(*tensor.shape[:2], -1) for tensor in (arguments["input"], output_gradient))
    products = torch.einsum("ncp,ncp->nc", inputs, outputs)
    total.add((products - mean * outputs.sum(2)) / (variance + arguments.get("eps", 1e-5)).sqrt())


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value if len(value) == 2 else (value[0], value[0])


def _covers_convolution(arguments: Arguments) -> bool:
    return arguments["input"].dim() == 4 and not isinstance(arguments.get("padding"), str)


def _covers_batch_norm(arguments: Arguments) -> bool:
    return not arguments.get("training") and arguments.get("weight") is not None


# Function: names of its positional arguments, which calls are covered, what adds the part of the weight.
LAYERS: dict[Any, tuple[list[str], Callable[[Arguments], bool], Callable[[_Sum, Arguments, Tensor], None]]] = {
    torch.conv2d: (
        ["input", "weight", "bias", "stride", "padding", "dilation", "groups"],
        _covers_convolution,
        _add_convolution,
    ),
    F.linear: (["input", "weight", "bias"], lambda arguments: arguments["input"].dim() > 1, _add_linear),
    F.batch_norm: (
        ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"],
        _covers_batch_norm,
        _add_batch_norm,
    ),
}
