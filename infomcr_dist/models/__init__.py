"""The paper's networks, by name, and any other by import path."""

import ast
import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infomcr_dist.functional import functional_loss
from infomcr_dist.models.cnn import cnn
from infomcr_dist.models.densenet import densenet_100_12
from infomcr_dist.models.frozen import freeze
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


_CLASSES = ("classes", "num_classes", "n_classes")
_IMAGE_SIZE = ("image_size", "img_size")
_LIBRARIES = {"timm": "create_model", "torchvision": "models.get_model"}
"""Those whose networks are given by name, and what makes them"""
_OF_WEIGHTS = ("pretrained", "weights", "weights_backbone", "checkpoint_path")
_WORDS = {"true": True, "false": False, "null": None, "none": None}


def build(name: str, classes: int, image_size: int, frozen: Sequence[str] = ()) -> nn.Module:
    """A network that maps images (B, 3, image_size, image_size) to logits (B, classes).

    It is to be given images in the memory format channels_last, as loaders give them. One by import path that cannot
    take them (it may call `view` on what a convolution returns) makes them contiguous first.

    Args:
        name: A name in MODELS; `timm:NAME` or `torchvision:NAME` of a network of these libraries, where they are
            installed; or an import path with arguments, "package.module:function,argument,name=value":
            `torchvision.models:resnet18`, `timm:create_model,resnet18d,pretrained=true`. The function is given the
            classes as `classes` or `num_classes` and the image size as `image_size` or `img_size`, where it takes
            them by these names and the arguments do not give them.
        classes: Number of classes, at least 2.
        image_size: Height and width of an image, in pixels.
        frozen: Parts that are not trained, see `freeze`.

    Raises:
        ValueError: An unknown name, a library that is not installed, a function that cannot be imported, raises, or
            returns something else than a torch module with a parameter to train, a module that does not return such
            logits, and a frozen part that there is not.
    """
    return freeze(_build(name, classes, image_size), frozen)


def parts_by_classes(name: str, classes: int, image_size: int) -> set[str]:
    """Names of the parameters and buffers whose shape depends on the number of classes: those of the head.

    Args: as of `build`.
    """
    with torch.random.fork_rng(devices=[]):
        first = _build(name, classes, image_size).state_dict()
        try:
            second = _build(name, classes + 1, image_size).state_dict()
        except ValueError:  # a network of a fixed number of classes
            return set()
    return {key for key, tensor in first.items() if key not in second or second[key].shape != tensor.shape}


def _build(name: str, classes: int, image_size: int) -> nn.Module:
    if classes < 2 or image_size < 1:
        raise ValueError(f"model needs at least 2 classes and 1 pixel, got {classes} classes and {image_size} pixels")
    if name in MODELS:
        return MODELS[name](classes, image_size)
    path, *arguments = name.split(",")
    module, colon, function = path.partition(":")
    maker = _LIBRARIES.get(module)
    if maker is not None and function != maker:
        if not re.fullmatch(r"[\w.]+", function):
            raise ValueError(f"model={name!r} must be {module}:NAME of a network of {module}, got {function!r}")
        if given := [item for item in arguments if item.partition("=")[0] in _OF_WEIGHTS]:
            raise ValueError(
                f"model={name!r} names a network without weights, got {given[0]}: give the file that holds them as "
                "init_from=FILE"
            )
        function, arguments = maker, [function, *arguments]
    if not colon:
        nearest = difflib.get_close_matches(name, MODELS, n=1, cutoff=0)[0]
        raise ValueError(f"model must be a known name or package.module:function, got {name!r}; nearest: {nearest!r}")
    try:
        builder = functools.reduce(getattr, function.split("."), importlib.import_module(module))
    except Exception as error:
        raise ValueError(f"model={name!r} cannot be imported: {_one_line(error)}{_remedy(module, error)}") from error
    try:
        model = _call(builder, arguments, classes, image_size)
    except Exception as error:
        raise ValueError(f"model={name!r} cannot be built: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={name!r} must return a torch module, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model={name!r} has nothing to train: no parameter requires a gradient")
    try:
        _check_logits(name, model, classes, image_size, torch.channels_last)
    except ValueError:
        _check_logits(name, model, classes, image_size, torch.contiguous_format)
        model.register_forward_pre_hook(_contiguous)
    return model


def _remedy(library: str, error: Exception) -> str:
    if library not in _LIBRARIES:
        return ""
    if isinstance(error, ModuleNotFoundError):
        return f": pip install 'infomcr_dist[{library}]'"
    return f": install the build of torchvision that is made for torch {torch.__version__}"


def _contiguous(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].contiguous()


def _call(builder: Any, arguments: list[str], classes: int, image_size: int) -> Any:
    positional = [_value(argument) for argument in arguments if "=" not in argument]
    named = {key: _value(text) for key, _, text in (item.partition("=") for item in arguments if "=" in item)}
    try:
        signature = inspect.signature(builder)
    except ValueError:  # of a builtin
        return builder(*positional, **named)
    parameters = signature.parameters
    given = signature.bind_partial(*positional, **named).arguments.keys() | named
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for names, value in ((_CLASSES, classes), (_IMAGE_SIZE, image_size)):
        if given & set(names):
            continue
        known = [candidate for candidate in names if candidate in parameters]
        if known:
            named[known[0]] = value
        elif anything and names is _CLASSES:  # torchvision and timm hand it on
            named["num_classes"] = value
    return builder(*positional, **named)


def _value(text: str) -> Any:
    """A number, true, false, null or a text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_logits(
    name: str, model: nn.Module, classes: int, image_size: int, memory_format: torch.memory_format
) -> None:
    """In training and in eval mode, on copies of the modules, which leave their state and the random numbers alone."""
    parameter = next(model.parameters())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        images = torch.rand(2, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
        images = images.contiguous(memory_format=memory_format)
        for evaluate in (False, True):
            try:
                logits = functional_loss(model, evaluate=evaluate).logits({}, images)
            except Exception as error:
                raise ValueError(
                    f"model={name!r} cannot take images of {image_size} x {image_size} pixels: {_one_line(error)}"
                ) from error
            if not isinstance(logits, Tensor) or logits.shape != (2, classes):
                got = f"a tensor {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
                mode = "eval" if evaluate else "training"
                raise ValueError(
                    f"model={name!r} must return logits (B, {classes}) of B images, got {got} for B = 2 in {mode} mode"
                )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
