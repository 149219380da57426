"""The paper's networks, by name, and any other by import path."""

import difflib
import importlib
from collections.abc import Callable

from torch import nn

from infomcr_dist.models.cnn import cnn
from infomcr_dist.models.densenet import densenet_100_12
from infomcr_dist.models.resnet import resnet20, resnet50
from infomcr_dist.models.wide_resnet import wrn_18_1_5, wrn_28_2

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "cnn": cnn,
    "densenet_100_12": densenet_100_12,
    "resnet20": resnet20,
    "resnet50": resnet50,
    "wrn_18_1_5": wrn_18_1_5,
    "wrn_28_2": wrn_28_2,
}


def build(name: str, classes: int, image_size: int) -> nn.Module:
    """A network by its name in MODELS, or by import path "package.module:function", called as
    function(classes=..., image_size=...).

    It maps images (B, 3, image_size, image_size) to logits (B, classes). Raises ValueError for an unknown name.
    """
    if classes < 2 or image_size < 1:
        raise ValueError(f"model needs at least 2 classes and 1 pixel, got {classes} classes and {image_size} pixels")
    if name in MODELS:
        return MODELS[name](classes, image_size)
    module, colon, function = name.partition(":")
    if not colon:
        nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0)[0]
        raise ValueError(f"model must be a known name or package.module:function, got {name!r}; nearest: {nearest!r}")
    try:
        builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model={name!r} cannot be imported: {error}") from error
    model = builder(classes=classes, image_size=image_size)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={name!r} must return a torch module, got {type(model).__name__}")
    return model
