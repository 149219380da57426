"""Losses as means over a batch: which elements count, and what is refused."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist.functional import Criterion


def check_criterion(criterion: Criterion, model: nn.Module) -> None:
    """Refuse, with a ValueError, a loss that is no mean or that has parameters of its own to train."""
    settings = _settings(criterion)
    if settings.get("reduction", "mean") != "mean":
        raise ValueError(f"criterion must be a mean over its batch, got reduction={settings['reduction']!r}")
    if isinstance(criterion, nn.Module):
        known = {id(parameter) for parameter in model.parameters()}
        if any(parameter.requires_grad and id(parameter) not in known for parameter in criterion.parameters()):
            raise ValueError("criterion must have no trainable parameters: make them part of model")


def check_mean(criterion: Criterion, output: Any, labels: Tensor, loss: Tensor) -> None:
    """Refuse, with a ValueError, a loss that is a sum: its last operation is one, or it adds up over two halves.

    Args:
        criterion: The loss; a copy of it, if it has state.
        output: What the model returned.
        labels: Those of the batch.
        loss: `criterion(output, labels)`.
    """
    reduction = getattr(loss.grad_fn, "_saved_reduction", None)  # of the losses of torch: 1 is the mean, 2 the sum
    if reduction == 2:
        raise ValueError("criterion must be a mean over its batch, got reduction='sum'")
    if reduction == 1 or not isinstance(output, Tensor) or len(output) != len(labels) or len(labels) < 2:
        return
    half = len(labels) // 2
    try:
        with torch.no_grad():
            parts = sum(criterion(output[some], labels[some]) for some in (slice(half), slice(half, None)))
    except Exception:  # a criterion that takes only batches of one size
        return
    whole = float(loss.detach())
    if abs(float(parts) - whole) < 1e-3 * abs(whole):
        raise ValueError("criterion must be a mean over its batch: over half a batch it is half as large")


def shares(criterion: Criterion, labels: Sequence[Tensor]) -> Sequence[float | Tensor]:
    """How much each part of a batch counts in the mean over all of it.

    Cross entropy and the negative log-likelihood of class indices leave `ignore_index` aside and may weight classes;
    to any other loss all labels count alike.

    Args:
        criterion: The loss.
        labels: Those of each part.

    Returns:
        A share of each part. They add up to 1, or are all 0 where nothing counts, and are scalar tensors on the device
        of the labels where it would take a wait for the device to know that all labels count alike.
    """
    counted = _counts(criterion, labels)
    if counted is None:
        total = sum(map(len, labels))
        return [len(part) / total for part in labels]
    return list(counted / counted.sum().clamp_min(torch.finfo(counted.dtype).tiny))


def _counts(criterion: Criterion, labels: Sequence[Tensor]) -> Tensor | None:
    settings = _settings(criterion)
    ignored, weight = settings.get("ignore_index"), settings.get("weight")
    if labels[0].is_floating_point() or (ignored is None and weight is None):
        return None
    found = torch.stack([_count(part, ignored, weight) for part in labels])
    if weight is None and found.device.type == "cpu" and found.tolist() == [part.numel() for part in labels]:
        return None
    return found


def _count(labels: Tensor, ignored: int | None, weight: Tensor | None) -> Tensor:
    valid = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
    if weight is None:
        return valid.sum().double()
    return (weight.double()[labels.where(valid, 0)] * valid).sum()


def _settings(criterion: Any) -> dict[str, Any]:
    """`reduction`, `ignore_index` and `weight` of a loss, as far as it shows them."""
    if isinstance(criterion, functools.partial):
        return _settings(criterion.func) | criterion.keywords
    if criterion in (F.cross_entropy, F.nll_loss):
        parameters = inspect.signature(criterion).parameters
        return {"ignore_index": parameters["ignore_index"].default}
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
        return {"ignore_index": criterion.ignore_index, "weight": criterion.weight, "reduction": criterion.reduction}
    return {"reduction": criterion.reduction} if isinstance(criterion, nn.modules.loss._Loss) else {}
