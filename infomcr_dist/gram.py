"""The Gram matrix of per-sample gradients, without ever holding them all (Jia & Su, ICML 2020, Eq. 5)."""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from infomcr_dist.functional import (
    Batch,
    Criterion,
    FunctionalLoss,
    LossFunction,
    Params,
    functional_loss,
    gradient,
    mean_loss,
)
from infomcr_dist.gram_layers import LAYERS, Arguments, Outer, Rows
from infomcr_dist.graph import accumulators, dependencies
from infomcr_dist.inspection import check_leaves
from infomcr_dist.precision import full_precision, math_attention

BLOCK_BYTES = 256 * 2**20  # of J held at a time
CACHE_BYTES = 4 * 2**20  # of a layer's input patches held at a time on a CPU; a GPU takes a block, in few launches


def gradient_gram(loss_fn: LossFunction, params: Params, batch: Batch, chunk: int | None = None) -> Tensor:
    """xi = J J^T, (N, N) float64 (Eq. 5): inner products of the gradients of the N samples of `batch`.

    Row n of J is the gradient of `loss_fn(params, (images[n:n+1], labels[n:n+1]))` with respect to `params`; J is never
    held as a whole. A model behind `functional_loss` runs in eval mode, since with batch statistics a sample has no
    gradient of its own, and in general once: weights of convolutions, linear layers and BatchNorm are taken from each
    layer's input and output gradient, any other parameter with `vmap`, for as many at a time as fit. The first time,
    rows of a few samples are compared with backward passes of their own; parameters for which they differ, or for which
    `vmap` has no rule, take one backward pass a sample from then on, with a warning. Runs outside autocast and with
    TF32 off.

    Args:
        loss_fn: A pure loss, a mean over its batch; see `functional_loss`.
        params: The point w, by name; the gradients are with respect to all of them.
        batch: images (N, ...) and labels (N, ...).
        chunk: Samples that are differentiated at a time with `vmap`; all by default.

    Returns:
        xi, (N, N) float64.

    Raises:
        ValueError: An empty batch, labels that do not match, chunk < 1, a name that is no parameter's, or BatchNorm
            with batch statistics in eval mode.
    """
    images, labels = batch
    if len(images) < 1 or len(images) != len(labels):
        raise ValueError(f"batch must hold as many labels as images, at least one, got {len(labels)} and {len(images)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    with torch.inference_mode(False), torch.enable_grad(), full_precision(images.device), math_attention():
        batch = images.detach().clone(), labels.detach().clone()
        leaves = {name: tensor.detach() for name, tensor in params.items()}
        total = _Sum(images)
        if not isinstance(loss_fn, FunctionalLoss):
            _add_general(total, loss_fn, leaves, list(leaves), batch, chunk)
            return total.gram()
        # p - y of a sample that is fitted well cancels in float32: the loss is taken in float64.
        criterion = functools.partial(_in_double, loss_fn.criterion)
        precise = functional_loss(loss_fn.model, criterion, evaluate=True)
        key = (tuple(params), images.shape, images.dtype)
        total.routes = loss_fn.routes.get(key) or _Routes(_look(precise, leaves, batch))
        left = _add_layers(total, precise, leaves, batch)
        _add_general(total, precise, leaves, left, batch, chunk)
        loss_fn.routes[key] = replace(total.routes, truth=None)
    return total.gram()


def _in_double(criterion: Criterion, output: Any, labels: Tensor) -> Tensor:
    def double(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return criterion(_mapped(double, output), labels)


def _mapped(function: Callable[[Any], Any], output: Any) -> Any:
    """tree_map, without its cost for the usual output of a model."""
    return function(output) if isinstance(output, Tensor) else tree_map(function, output)


class _Truth(NamedTuple):
    """Rows of J of a few samples, each from a backward pass of its own."""

    samples: list[int]
    losses: Tensor
    rows: Params
    lengths: Tensor
    """Of the samples' gradients with respect to all parameters."""

    def confirms_losses(self, losses: Tensor) -> bool:
        """Whether losses (samples,) of samples in a batch are those of the samples alone, but for rounding."""
        tolerance = max((torch.finfo(rows.dtype).eps for rows in self.rows.values()), default=0.0) ** 0.6
        return torch.allclose(losses, self.losses, rtol=tolerance, atol=tolerance)

    def confirms(self, name: str, rows: Tensor) -> bool:
        """Whether rows (samples, size of the parameter) are these, but for rounding.

        A loss is continuous in rounding, a gradient is not: an activation within rounding of ReLU's kink has another
        derivative, which moves rows of a small layer by a hundredth; rows of other samples differ by all their length.
        """
        expected = self.rows[name]
        tolerance = 1e-6 if rows.dtype in (torch.float64, torch.complex128) else 0.1
        error = (rows - expected).norm(dim=1).double()
        return bool((error <= tolerance * (expected.norm(dim=1).double() + 1e-3 * self.lengths)).all())


def _look(loss_fn: FunctionalLoss, params: Params, batch: Batch) -> _Truth:
    """Rows of the first, the middle and the last sample.

    Raises:
        ValueError: The loss uses a parameter that `params` cannot replace.
    """
    count = len(batch[0])
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    own = {id(parameter) for parameter in loss_fn.model.parameters()}
    outside = dependencies([loss_fn(leaves, (batch[0][:1], batch[1][:1]))], accumulators(leaves)).leaves
    check_leaves([leaf for leaf in outside if id(leaf) in own], loss_fn.model)
    samples = sorted({0, count // 2, count - 1})
    losses = torch.stack([loss_fn(params, (batch[0][n : n + 1], batch[1][n : n + 1])).detach() for n in samples])
    rows = _rows(loss_fn, params, list(params), batch, samples)
    squares = [tensor.abs().square().sum(1).double() for tensor in rows.values()]
    return _Truth(samples, losses, rows, torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(len(samples)))


@dataclass
class _Routes:
    """How parameters' parts are had; checked against `truth` while there is one."""

    truth: _Truth | None = None
    layers: Literal["from the first", "from the images", "none"] = "from the first"
    """Where the backward pass ends that takes the layers' parts, if it does."""
    no_layer: set[str] = field(default_factory=set)
    by_sample: set[str] = field(default_factory=set)


class _Sum:
    """The upper triangle of the Gram matrix so far, and memory that layers use in turn:
    fresh blocks of this size cost as much in page faults as the arithmetic in them."""

    def __init__(self, like: Tensor) -> None:
        self.samples = len(like)
        self.upper = torch.zeros(self.samples, self.samples, dtype=torch.float64, device=like.device)
        self.patch_bytes = CACHE_BYTES if like.device.type == "cpu" else BLOCK_BYTES
        self.buffers: dict[str, Tensor] = {}
        self.routes = _Routes()

    def buffer(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Uninitialized memory, valid until the next request for the same use."""
        size = math.prod(shape)
        if use not in self.buffers or self.buffers[use].numel() < size or self.buffers[use].dtype != like.dtype:
            self.buffers[use] = like.new_empty(size)
        return self.buffers[use][:size].view(shape)

    def add(self, rows: Tensor) -> None:
        """Add rows rows^T for a block of columns (N, any) of J."""
        rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
        for block in self._thirds():
            self.upper[block, block.start :] += rows[block] @ rows[block.start :].T

    def add_outer(self, inputs: Callable[[slice], Tensor], outputs: Tensor) -> None:
        """Add the inner products of the matrices G_n = outputs_n inputs_n^T, for inputs of some samples (any, D, P) and
        outputs (N, O, P): from blocks of rows of G, or, which is cheaper for few positions P, as
        <G_n, G_m> = sum_pq (inputs_np . inputs_mq) (outputs_np . outputs_mq)."""
        samples, width, positions = outputs.shape
        depth, item = inputs(slice(0, 1)).shape[1], outputs.element_size()
        if samples * positions**2 * (depth + width) > (2 * positions + samples) * depth * width:
            chunk = max(1, self.patch_bytes // (depth * positions * item))
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
    total: _Sum,
    loss_fn: LossFunction,
    params: Params,
    names: list[str],
    batch: Batch,
    chunk: int | None,
) -> None:
    """Add the part of the named parameters, from their block of J."""
    routes = total.routes
    for group in _groups({name: params[name] for name in names if name not in routes.by_sample}, total.samples):
        try:
            found = _vmapped(loss_fn, params, group, batch, chunk)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever vmap meets that it has no rule for
            routes.by_sample.update(group)
            continue
        for name, rows in found.items():
            if routes.truth is None or routes.truth.confirms(name, rows[routes.truth.samples]):
                total.add(rows)
            else:
                routes.by_sample.add(name)
    slow = [name for name in names if name in routes.by_sample]
    if slow and (routes.truth is not None or not isinstance(loss_fn, FunctionalLoss)):
        warnings.warn(
            f"the Gram matrix takes one backward pass a sample, which is slow, for {len(slow)} parameters that vmap "
            f"cannot differentiate, the first of them {slow[0]!r}",
            stacklevel=4,
        )
    for group in _groups({name: params[name] for name in slow}, total.samples):
        for rows in _rows(loss_fn, params, group, batch, range(total.samples)).values():
            total.add(rows)


def _vmapped(loss_fn: LossFunction, params: Params, names: list[str], batch: Batch, chunk: int | None) -> Params:
    """Rows (N, size of the parameter) of J, by vmap."""
    fixed = {name: tensor for name, tensor in params.items() if name not in names}

    def sample_loss(chosen: Params, image: Tensor, label: Tensor) -> Tensor:
        return loss_fn(fixed | chosen, (image[None], label[None]))

    per_sample = vmap(grad(sample_loss), in_dims=(None, 0, 0), chunk_size=chunk)
    found: Params = per_sample({name: params[name] for name in names}, *batch)
    return {name: rows.flatten(1) for name, rows in found.items()}


def _rows(loss_fn: LossFunction, params: Params, names: list[str], batch: Batch, samples: Sequence[int]) -> Params:
    """Rows (samples, size of the parameter) of J, by one backward pass a sample."""
    images, labels = batch
    leaves = {name: params[name].detach().requires_grad_() for name in names}
    rows = {name: tensor.new_zeros(len(samples), tensor.numel()) for name, tensor in leaves.items()}
    for i, n in enumerate(samples):
        loss = loss_fn(params | leaves, (images[n : n + 1], labels[n : n + 1]))
        if loss.requires_grad:
            for name, tensor in gradient(loss, leaves).items():
                rows[name][i] = tensor.detach().flatten()
    return {name: tensor.detach() for name, tensor in rows.items()}


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


def _add_layers(total: _Sum, loss_fn: FunctionalLoss, params: Params, batch: Batch) -> list[str]:
    """Add the parts of all parameters that layers account for; the names of the others."""
    routes = total.routes
    while routes.layers != "none":
        try:
            done = _layers_done(total, loss_fn, params, batch, routes.layers == "from the images")
            return [name for name in params if name not in done]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # checkpoints see another graph when they run again, if it does not begin at the images
            routes.layers = "from the images" if routes.layers == "from the first" else "none"
            total.upper.zero_()
    return list(params)


def _layers_done(total: _Sum, loss_fn: FunctionalLoss, params: Params, batch: Batch, from_images: bool) -> set[str]:
    images, labels = batch
    network = loss_fn.at(params)
    first = images.clone().requires_grad_(from_images)
    with _Layers(total, params) as layers:
        output = network.model(first.clone())
    starts = [first] if from_images else layers.starts
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if starts and tensors and all(tensor.dim() and len(tensor) == len(images) for tensor in tensors):
        losses = [mean_loss(network.criterion, _sample(output, n), labels[n : n + 1]) for n in range(len(images))]
        truth = total.routes.truth
        if truth and not truth.confirms_losses(torch.stack([losses[n].detach() for n in truth.samples])):
            total.routes.layers = "none"  # samples meet in the network
            return set()
        torch.autograd.grad(torch.stack(losses).sum(), starts, allow_unused=True)
    done: set[str] = layers.done
    return done


def _sample(output: Any, n: int) -> Any:
    """What a model returns, of one sample."""
    return _mapped(lambda leaf: leaf[n : n + 1] if isinstance(leaf, Tensor) else leaf, output)


class _Layers(TorchFunctionMode):
    """Watches a forward pass for the functions in LAYERS, whose per-sample parameter gradients follow from their input
    and output gradient, and adds the part of each to `total` when the backward pass reaches it.

    `uses` counts the calls that take a parameter: one used twice, or by another function, is left to `_add_general`,
    and so is one for which rows of dimension 0 turn out not to belong to the samples. Afterwards `done` names the
    parameters that were added. The backward pass ends at `starts`.
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
        layer = LAYERS.get(function)
        arguments = dict(zip(layer.names, args, strict=False)) | kwargs if layer else {}
        if function is F.batch_norm and arguments.get("training"):
            raise ValueError(
                "BatchNorm must use running statistics in eval mode: with those of the batch "
                "(track_running_stats=False) a sample has no gradient of its own"
            )
        result = function(*args, **kwargs)
        used = [self.names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.names]
        if not used or _is_metadata(result):
            return result
        self.uses.update(used)
        if layer is None or not layer.covers(arguments) or len(result) != self.total.samples:
            return result
        if not result.requires_grad:
            self.starts.append(result.requires_grad_())
            result = result.clone()  # what follows may work in place, which a leaf forbids

        def add(output_gradient: Tensor) -> None:
            if name := self._once(arguments["weight"]):
                self._add(name, layer.parts(self.total, arguments, output_gradient))
            if name := self._once(arguments.get("bias")):
                channels = output_gradient.movedim(-1, 1) if function is F.linear else output_gradient
                self._add(name, [Rows(channels.reshape(*channels.shape[:2], -1).sum(2))])
            arguments.clear()  # the graph keeps this function, and it the input

        result.register_hook(add)
        return result

    def _once(self, tensor: Tensor | None) -> str | None:
        name = self.names.get(id(tensor))
        return name if name is not None and self.uses[name] == 1 and name not in self.total.routes.no_layer else None

    def _add(self, name: str, parts: list[Rows | Outer]) -> None:
        if truth := self.total.routes.truth:
            rows = torch.stack([torch.cat([part.row(n) for part in parts]) for n in truth.samples])
            if not truth.confirms(name, rows):
                self.total.routes.no_layer.add(name)
                return
        for part in parts:
            part.add_to(self.total)
        self.done.add(name)


_METADATA = (bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _is_metadata(result: Any) -> bool:
    """Whether a result describes a tensor, such as its shape, rather than passing it on."""
    if isinstance(result, tuple | list):
        return all(isinstance(item, _METADATA) for item in result)
    return isinstance(result, _METADATA)
