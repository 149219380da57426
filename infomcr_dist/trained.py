"""The network of a checkpoint, with what its images need."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from infomcr_dist import checkpoint, models
from infomcr_dist.config import Config
from infomcr_dist.experiment import open_data
from pipelines.options import from_dict

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Trained:
    """A trained network."""

    path: Path
    """Of its checkpoint"""
    config: Config
    """Of its run"""
    model: nn.Module
    """In eval mode"""
    classes: list[str]
    image_size: int
    """Side of its square images, pixels"""
    mean: Triple
    """Per RGB channel, of pixels in 0..1: the network is given (pixel/255 - mean)/std"""
    std: Triple
    epochs: float
    """Epochs it was trained for"""


def load_trained(
    source: Path, model: str | None, device: torch.device, weights: Literal["current", "averaged"] = "current"
) -> Trained:
    """The network of a checkpoint, or of a run directory's newest one that is whole.

    Args:
        source: a checkpoint or a run directory.
        model: import path of a network that is not ours; no code is imported on a checkpoint's word.
        device: where the network is to be.
        weights: those of the last step, or the run's average.

    Raises:
        ValueError: there is no such checkpoint, or its network cannot be built or is not the one of ``model``.
    """
    path, state = checkpoint.load_newest(source, lambda text: print(text, file=sys.stderr, flush=True))
    config = from_dict(Config, state["config"])
    if ":" in config.model and config.model != model:
        raise ValueError(f"model: {path} has {config.model} imported: give model={config.model} if that code is yours")
    classes, image_size = state["classes"], state["image_size"]
    network = models.build(config.model, len(classes), image_size, config.frozen)
    checkpoint.restore_weights(network, state, path, weights == "averaged")
    about = state if "mean" in state else vars(open_data(config.data.path))  # one of before it was kept
    return Trained(
        path=path,
        config=config,
        model=network.to(device).eval(),
        classes=classes,
        image_size=image_size,
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        epochs=state["epochs"],
    )
