"""Layers whose per-sample parameter gradients follow from their input and output gradient."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Arguments = dict[str, Any]
CONVOLUTION = {"stride": 1, "padding": 0, "dilation": 1}


class Total(Protocol):
    """The sum that the parts are added to, with memory that they use in turn."""

    samples: int

    def buffer(self, use: str, shape: Sequence[int], like: Tensor) -> Tensor: ...
    def add(self, rows: Tensor) -> None: ...
    def add_outer(self, inputs: Callable[[slice], Tensor], outputs: Tensor) -> None: ...


class Rows(NamedTuple):
    """A block of columns of J, (N, any)."""

    rows: Tensor

    def row(self, sample: int) -> Tensor:
        return self.rows[sample].flatten()

    def add_to(self, total: Total) -> None:
        total.add(self.rows)


class Outer(NamedTuple):
    """A block of columns of J whose rows are the matrices outputs_n inputs_n^T."""

    inputs: Callable[[slice], Tensor]
    outputs: Tensor

    def row(self, sample: int) -> Tensor:
        return (self.outputs[sample] @ self.inputs(slice(sample, sample + 1))[0].mT).flatten()

    def add_to(self, total: Total) -> None:
        total.add_outer(self.inputs, self.outputs)


def _convolution(total: Total, arguments: Arguments, output_gradient: Tensor) -> list[Rows | Outer]:
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
    parts: list[Rows | Outer] = []
    for images, gradients in zip(padded.chunk(groups, dim=1), outputs.chunk(groups, dim=1), strict=True):

        def patches(some: slice, images: Tensor = images) -> Tensor:
            chosen = images[some]
            windows = chosen.as_strided((len(chosen), *shape), strides, chosen.storage_offset())
            copies = total.buffer("patches", windows.shape, chosen).copy_(windows)
            return copies.view(len(chosen), -1, outputs.shape[2])

        parts.append(Outer(patches, gradients))
    return parts


def _linear(total: Total, arguments: Arguments, output_gradient: Tensor) -> list[Rows | Outer]:
    inputs, outputs = (
        tensor.reshape(total.samples, -1, tensor.shape[-1]).mT for tensor in (arguments["input"], output_gradient)
    )
    return [Outer(lambda some: inputs[some], outputs)]


def _batch_norm(total: Total, arguments: Arguments, output_gradient: Tensor) -> list[Rows | Outer]:
    mean, variance = arguments["running_mean"], arguments["running_var"]
    inputs, outputs = (tensor.reshape(*tensor.shape[:2], -1) for tensor in (arguments["input"], output_gradient))
    products = torch.einsum("ncp,ncp->nc", inputs, outputs)
    return [Rows((products - mean * outputs.sum(2)) / (variance + arguments.get("eps", 1e-5)).sqrt())]


def _pair(value: int | Sequence[int]) -> Sequence[int]:
    return (value, value) if isinstance(value, int) else value if len(value) == 2 else (value[0], value[0])


def _covers_convolution(arguments: Arguments) -> bool:
    return arguments["input"].dim() == 4 and not isinstance(arguments.get("padding"), str)


def _covers_batch_norm(arguments: Arguments) -> bool:
    return arguments.get("weight") is not None


class Layer(NamedTuple):
    """Names of positional arguments, which calls are covered, and the parts of J of the weight."""

    names: list[str]
    covers: Callable[[Arguments], bool]
    parts: Callable[[Total, Arguments, Tensor], list[Rows | Outer]]


LAYERS: dict[Any, Layer] = {
    torch.conv2d: Layer(
        ["input", "weight", "bias", "stride", "padding", "dilation", "groups"], _covers_convolution, _convolution
    ),
    F.linear: Layer(["input", "weight", "bias"], lambda arguments: arguments["input"].dim() > 1, _linear),
    F.batch_norm: Layer(
        ["input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"],
        _covers_batch_norm,
        _batch_norm,
    ),
}
