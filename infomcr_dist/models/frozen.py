"""Parts of a network that are not trained."""

import difflib
import types
from collections.abc import Sequence

from torch import nn


def freeze(model: nn.Module, parts: Sequence[str]) -> nn.Module:
    """Freeze parts of a network, in place: their parameters require no gradient, their modules stay in eval mode.

    A frozen module is a fixed function of its input: BatchNorm normalizes by its running statistics, which stay as
    they are, and dropout drops nothing, also while the rest of the network is in training mode.

    Args:
        model: The network.
        parts: Names of modules or of single parameters, as in `named_modules` and `named_parameters`: `layer1` is all
            of `layer1`, and nothing of `layer10`.

    Returns:
        The network.

    Raises:
        ValueError: There is no such part, or nothing is left to train.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for part in parts:
        if part in modules and part:
            module = modules[part]
            module.requires_grad_(False)
            module.train = types.MethodType(_stay_in_eval_mode, module)
            module.eval()
        elif part in parameters:
            parameters[part].requires_grad_(False)
        else:
            known = [name for name in modules | parameters if name]
            nearest = difflib.get_close_matches(part, known, n=1, cutoff=0)
            raise ValueError(f"frozen must name parts of the network, got {part!r}; nearest: {', '.join(nearest)}")
    if parts and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"frozen must leave something to train, got {list(parts)}: that is the whole network")
    return model


def _stay_in_eval_mode(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)
