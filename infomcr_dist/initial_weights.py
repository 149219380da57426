"""The weights that training begins with: those of another run or of a file, with a new head."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infomcr_dist import checkpoint, models
from infomcr_dist.experiment import Experiment


def load_initial_weights(source: Path, model: nn.Module, experiment: Experiment) -> str:
    """Take over weights and buffers from ``source``, by name; the head stays as it is unless it is of these classes.

    The head is what has another shape at another number of classes. It is taken over where its shape fits and the
    source does not name other classes.

    Args:
        source: a run directory (its newest checkpoint), a checkpoint, or a file of weights (see `read_weights`).
        model: the run's network, with its initial weights.
        experiment: the run's.

    Returns:
        How many tensors were taken over and which parameters are new, to be logged.

    Raises:
        ValueError: the file cannot be read, or its names or shapes are another network's.
    """
    weights, classes = read_weights(source)
    names = experiment.dataset.classes
    head = models.parts_by_classes(experiment.config.model, len(names), experiment.image_size)
    own = model.state_dict()
    new = {
        name
        for name in head
        if name not in weights or weights[name].shape != own[name].shape or classes not in (None, names)
    }
    # Files of torch before 0.4.1 do not have the counters of BatchNorm.
    missing = [n for n in own if n not in weights and n not in new and not n.endswith("num_batches_tracked")]
    other = [n for n in weights if n not in own]
    shapes = [n for n in own if n in weights and n not in new and weights[n].shape != own[n].shape]
    for problem, found in (("lacks", missing), ("has, unlike the network,", other)):
        if found:
            raise ValueError(f"init_from: {source} {problem} {_some(found)}: {_remedy(experiment)}")
    if shapes:
        here, there = tuple(own[shapes[0]].shape), tuple(weights[shapes[0]].shape)
        raise ValueError(
            f"init_from: {source} has another shape of {_some(shapes)}, {there} where the network has {here}: "
            f"{_remedy(experiment)}"
        )
    taken = own.keys() & weights.keys() - new
    with torch.no_grad():
        for name in taken:
            own[name].copy_(weights[name])
    parameters = [name for name, _ in model.named_parameters() if name in new]
    return f"init_from: {len(taken)} tensors of {source}; new: {', '.join(parameters) or 'none'}"


def read_weights(source: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """Weights by name, and the classes they are for, where the source names them.

    Args:
        source: a run directory, a checkpoint, a ``.safetensors`` file, or what torch.save has written of a state dict,
            alone or under the key ``state_dict`` or ``model``. No code in it is run.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    if not source.exists():
        raise ValueError(f"init_from: {source} does not exist: give a run directory, a checkpoint or a file of weights")
    if source.suffix == ".safetensors":
        return _read_safetensors(source)
    if source.is_dir():
        source, content = checkpoint.load_newest(
            source, lambda text: print(text, file=sys.stderr, flush=True), "init_from"
        )
    else:
        content = checkpoint.read(source)
        if isinstance(content, dict) and "format" in content:
            content = checkpoint.load(source)
    classes = content.get("classes") if isinstance(content, dict) and "format" in content else None
    return _state_dict(source, content), classes


def _state_dict(source: Path, content: Any) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"init_from: {source} must hold a state dict, tensors by name: save model.state_dict()")
    return dict(content)


def _read_safetensors(source: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise ValueError(f"init_from: {source} needs safetensors: pip install 'infomcr_dist[export]'") from None
    try:
        with safe_open(source, framework="pt") as file:
            classes = (file.metadata() or {}).get("classes")
            return {name: file.get_tensor(name) for name in file.keys()}, classes and json.loads(classes)  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"init_from: {source} is not a readable file of safetensors: {error}") from error


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _remedy(experiment: Experiment) -> str:
    size = experiment.image_size
    return f"give weights of model={experiment.config.model} for images of {size} x {size} pixels"
