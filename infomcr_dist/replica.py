"""A network's modules and its loss copied, with tensors in the place of the parameters.

The copy holds state of its own (buffers, and whatever else a forward pass may change) and shares what it does not
change. No parameter's memory is copied, and nothing that others hold is touched: deferred work such as activation
checkpointing, other threads and aliased modules see one consistent network each.
"""

import copy
import enum
import functools
import random
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_UNCHANGING = frozenset(
    {types.NoneType, bool, int, float, complex, str, bytes, type, types.BuiltinFunctionType, weakref.ref}
    | {torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format}
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What every module has, and a forward pass does not change.
_SHARED = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers", "_modules"}
_LIBRARIES = sys.stdlib_module_names | {"numpy", "torch"}


def replica(
    roots: tuple[Any, ...], tensors: Mapping[int, Tensor], *, evaluate: bool = False, dtype: torch.dtype | None = None
) -> tuple[Any, ...]:
    """Copies of `roots`, which may refer to each other.

    Modules, tensors, built-in containers, generators of random numbers and objects that a module or a root holds
    directly are copied; functions and methods are bound to the copies of the modules they refer to. Other objects and
    parameters are shared.

    Args:
        roots: A network, its loss, or anything else that refers to modules.
        tensors: What stands in the place of the tensor with an id; elsewhere the tensor itself, if a parameter, or a
            copy of it.
        evaluate: The copied modules are in eval mode.
        dtype: Floating point tensors that are not in `tensors` are converted to it.
    """
    copier = _Copier(tensors, evaluate, dtype)
    return tuple(copier.held(root) for root in roots)


class _Copier:
    def __init__(self, tensors: Mapping[int, Tensor], evaluate: bool, dtype: torch.dtype | None) -> None:
        self.known: dict[int, Any] = dict(tensors)
        self.evaluate = evaluate
        self.dtype = dtype

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind in _UNCHANGING:
            return value
        known = self.known.get(id(value))
        if known is not None:
            return known
        if isinstance(value, Tensor):
            return self._remember(value, self._tensor(value))
        if isinstance(value, nn.Module):
            return self._module(value)
        copier = _KINDS.get(kind)
        if copier is not None:
            return copier(self, value)
        return self._named_tuple(value) if isinstance(value, tuple) and hasattr(value, "_fields") else value

    def held(self, value: Any) -> Any:
        """A copy of what a module or a root holds directly: of a plain object as well."""
        new = self(value)
        return self._object(value) if new is value and _has_state(value) else new

    def _remember(self, value: Any, new: Any) -> Any:
        self.known[id(value)] = new
        return new

    def _tensor(self, value: Tensor) -> Tensor:
        if self.dtype is not None and value.is_floating_point():
            return value.detach().to(self.dtype, copy=True)
        return value if isinstance(value, nn.Parameter) or value.requires_grad else value.clone()

    def _module(self, value: nn.Module) -> nn.Module:
        new: nn.Module = self._remember(value, object.__new__(type(value)))
        state = new.__dict__
        state.update(value.__dict__)
        for name in state.keys() - _SHARED:
            if type(state[name]) not in _UNCHANGING:
                state[name] = self.held(state[name])
        for name in _HOOKS:
            if state[name]:
                state[name] = self(state[name])
        if self.evaluate:
            state["training"] = False
        return new

    def _object(self, value: Any) -> Any:
        new = self._remember(value, object.__new__(type(value)))
        for name, item in value.__dict__.items():
            new.__dict__[name] = self(item)
        return new

    def _list(self, value: list[Any]) -> list[Any]:
        new: list[Any] = self._remember(value, [])
        new.extend(map(self, value))
        return new

    def _dict(self, value: dict[Any, Any]) -> dict[Any, Any]:
        new: dict[Any, Any] = self._remember(value, value.copy())
        for key, item in value.items():
            new[key] = self(item)
        return new

    def _tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if all(type(item) in _UNCHANGING for item in value):
            return value
        new = tuple(map(self, value))
        return new if any(one is not other for one, other in zip(new, value, strict=True)) else value

    def _named_tuple(self, value: Any) -> Any:
        return type(value)(*map(self, value))

    def _set(self, value: set[Any]) -> set[Any]:
        return set(map(self, value))

    def _deque(self, value: "deque[Any]") -> "deque[Any]":
        return deque(map(self, value), value.maxlen)

    def _partial(self, value: "functools.partial[Any]") -> Any:
        keywords = {name: self(item) for name, item in value.keywords.items()}
        return functools.partial(self(value.func), *map(self, value.args), **keywords)

    def _method(self, value: types.MethodType) -> types.MethodType:
        return types.MethodType(value.__func__, self.held(value.__self__))

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        """A function that refers to modules or parameters refers to their copies; other variables of it are shared."""
        if not value.__closure__:
            return value
        self._remember(value, value)  # a function that refers to itself
        cells = [self._cell(cell) for cell in value.__closure__]
        if all(one is other for one, other in zip(cells, value.__closure__, strict=True)):
            return value
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
        new.__kwdefaults__ = value.__kwdefaults__
        new.__dict__.update(value.__dict__)
        result: types.FunctionType = self._remember(value, new)
        return result

    def _cell(self, cell: types.CellType) -> types.CellType:
        try:
            item = cell.cell_contents
        except ValueError:  # a variable that is not assigned yet
            return cell
        if not isinstance(item, nn.Module | nn.Parameter | types.FunctionType | types.MethodType):
            return cell
        new = self(item)
        return cell if new is item else types.CellType(new)


def _has_state(value: Any) -> bool:
    """Whether a plain object may be one that a forward pass changes, and may be copied without side effects."""
    kind = type(value)
    return (
        bool(getattr(value, "__dict__", None))
        and kind.__module__.partition(".")[0] not in _LIBRARIES
        and kind.__new__ is object.__new__  # type: ignore[comparison-overlap]
        and not hasattr(kind, "__del__")
        and not isinstance(value, enum.Enum | type | types.FunctionType | types.ModuleType | types.MethodType)
    )


_KINDS: dict[type, Callable[[_Copier, Any], Any]] = {
    list: _Copier._list,
    dict: _Copier._dict,
    OrderedDict: _Copier._dict,
    defaultdict: _Copier._dict,
    tuple: _Copier._tuple,
    set: _Copier._set,
    deque: _Copier._deque,
    functools.partial: _Copier._partial,
    types.MethodType: _Copier._method,
    types.FunctionType: _Copier._function,
    np.ndarray: lambda copier, value: copier._remember(value, value.copy()),
    torch.Generator: lambda copier, value: copier._remember(value, value.clone_state()),
    **dict.fromkeys(
        (random.Random, np.random.Generator, np.random.RandomState),
        lambda copier, value: copier._remember(value, copy.deepcopy(value)),
    ),
}
