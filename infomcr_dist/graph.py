"""What a loss depends on, read from its autograd graph."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_COMPILED = "CompiledFunctionBackward"
# Functions of torch whose second derivative is known to be wrong (weight_norm fails gradgradcheck in torch 2.13).
_WRONG_TWICE = {"WeightNormInterfaceBackward0"}


@dataclass
class Dependencies:
    """`reached`: the values of `ends` at which the graph arrives. `leaves`: other tensors that it differentiates."""

    reached: set[Any] = field(default_factory=set)
    leaves: list[Tensor] = field(default_factory=list)
    low_precision: torch.dtype | None = None
    unproven: set[str] = field(default_factory=set)
    """Functions whose second derivative is not torch's, or known to be wrong."""


def accumulators(tensors: Mapping[Any, Tensor]) -> dict[Node, Any]:
    """Where the graph of a loss ends at each of `tensors`, for `dependencies`."""
    return {torch.autograd.graph.get_gradient_edge(tensor).node: name for name, tensor in tensors.items()}


def dependencies(roots: Iterable[Tensor], ends: Mapping[Node, Any]) -> Dependencies:
    """Walk the graphs of `roots` down to `ends`, nodes with a name each. Linear in the size of the graph."""
    found = Dependencies()
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Node] = set(waiting)
    while waiting:
        node = waiting.pop()
        if node in ends:
            found.reached.add(ends[node])
            continue
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.leaves.append(leaf)
            continue
        _look_at(node, found)
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
    return found


def _look_at(node: Any, found: Dependencies) -> None:
    for metadata in node._input_metadata:
        if metadata.dtype in _LOW_PRECISION:
            found.low_precision = metadata.dtype
    name = node.name()
    if name in _WRONG_TWICE:
        found.unproven.add(name)
    elif isinstance(node, torch.autograd.function.BackwardCFunction) and not name.startswith("_DDPSink"):
        if name == _COMPILED:  # whose own operations do not show
            found.low_precision = next(
                (t.dtype for t in node.saved_tensors if t is not None and t.dtype in _LOW_PRECISION),
                found.low_precision,
            )
        found.unproven.add(name)
