"""The optimizer of a run: one of torch's by name, any other by import path."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from typing import Any

import torch
from torch import nn

from infomcr_dist.config import OptimizerSettings
from infomcr_dist.functional import trainable_parameters

_FUSED = (torch.optim.SGD, torch.optim.Adam)
"""Those, with AdamW, whose update on a GPU is one kernel, which skips itself where the step is not finite."""
_OURS = frozenset(("params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable"))
"""Arguments that follow from other settings and from the device."""


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a network's trainable parameters, those without weight decay in a group of their own.

    Raises:
        ValueError: there is no such optimizer, it needs more than a step's gradient, or it does not take the arguments.
    """
    kind = _class_of(settings.kind)
    parameters = inspect.signature(kind).parameters
    given: dict[str, Any] = {"lr": settings.learning_rate}
    if "weight_decay" in parameters:
        given["weight_decay"] = settings.weight_decay
    elif settings.weight_decay:
        raise ValueError(
            f"optimizer.weight_decay must be 0 with optimizer.kind={settings.kind}, which has none, "
            f"got {settings.weight_decay}"
        )
    if kind is torch.optim.SGD:
        given |= {"momentum": settings.momentum, "nesterov": settings.nesterov}
    free = {name: p for name, p in parameters.items() if name not in _OURS | given.keys() and p.kind != p.VAR_KEYWORD}
    for name, value in settings.arguments.items():
        if name not in free:
            raise ValueError(
                f"optimizer.arguments.{name} is no argument of optimizer.kind={settings.kind} to be given here, "
                f"got {value}: it takes {', '.join(free) or 'none'}"
            )
        _check_type(f"optimizer.arguments.{name}", value, free[name].default)
    trained = list(trainable_parameters(model).values())
    undecayed = [] if settings.decay_norm_and_bias else [p for p in trained if p.ndim <= 1]
    decayed = [p for p in trained if settings.decay_norm_and_bias or p.ndim > 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    if kind.__module__.startswith("torch.optim."):
        # One call for all parameters; on CPUs SGD is the same to the bit, in two thirds of the time.
        if next(model.parameters()).is_cuda and issubclass(kind, _FUSED):
            given["fused"] = True
        elif "foreach" in parameters:
            given["foreach"] = True
    try:
        optimizer = kind([group for group in groups if group["params"]], **given, **settings.arguments)
    except Exception as error:  # of a class that is not ours
        text = " ".join(str(error).split())
        arguments = "".join(f", {name}={value}" for name, value in settings.arguments.items())
        raise ValueError(f"optimizer.kind={settings.kind}{arguments}: {text}: give another value or kind") from error
    lost = sorted(settings.arguments.keys() - optimizer.defaults.keys())
    if lost:
        raise ValueError(
            f"optimizer.arguments.{lost[0]} is not in the parameter groups of optimizer.kind={settings.kind}, "
            f"which are all that Horovod takes over, got {settings.arguments[lost[0]]}: leave it out"
        )
    return optimizer


def _class_of(kind: str) -> type[torch.optim.Optimizer]:
    """A class that takes a step from dense gradients alone."""
    known = {
        name.lower(): found
        for name, found in vars(torch.optim).items()
        if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) and found is not torch.optim.Optimizer
    }
    module, colon, path = kind.partition(":")
    found: Any
    if colon:
        try:
            found = functools.reduce(getattr, path.split("."), importlib.import_module(module))
        except Exception as error:  # of code that is not ours
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"optimizer.kind={kind} cannot be imported: {type(error).__name__}: {text}") from error
        if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
            raise ValueError(f"optimizer.kind={kind} must be a subclass of torch.optim.Optimizer, got {found!r:.100}")
    elif kind in known:
        found = known[kind]
    else:
        nearest = difflib.get_close_matches(kind.lower(), known, n=1, cutoff=0)[0]
        raise ValueError(
            f"optimizer.kind must be the name of an optimizer of torch.optim in lower case or package.module:Class, "
            f"got {kind!r}; nearest: {nearest!r}"
        )
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer.kind={kind} takes several passes a step, by a closure, which a step here does not offer: "
            "give another, such as adamw"
        )
    if found is torch.optim.SparseAdam:
        raise ValueError(f"optimizer.kind={kind} takes sparse gradients, which there are none of: give adam")
    return found  # type: ignore[no-any-return]


def _check_type(setting: str, value: Any, default: Any) -> None:
    """ValueError unless the value is of the kind of its default, where that shows one."""
    if isinstance(default, bool):
        right, rule = isinstance(value, bool), "true or false"
    elif isinstance(default, int | float):
        right, rule = _is_number(value), "a number"
    elif isinstance(default, tuple):
        right = isinstance(value, list) and len(value) == len(default)
        right = right and all(_is_number(v) or (v is None and d is None) for v, d in zip(value, default, strict=True))
        rule = f"a list of {len(default)} numbers"
    else:
        return
    if not right:
        raise ValueError(f"{setting} must be {rule}, got {value}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
