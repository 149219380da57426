"""Which sub-batches of a step are penalized, and what is left for a plain pass."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from infomcr_dist.criteria import shares
from infomcr_dist.functional import Batch, Criterion

Estimator = Literal["fused", "sampled", "reference"]


class Split(NamedTuple):
    """L = loss_weight * (sum over `penalized`) + rest_weight * (mean over `rest`), where the sub-batches count as much
    as `relative` says."""

    penalized: list[Batch]
    relative: list[float | Tensor]
    loss_weight: float
    rest: Batch | None
    rest_weight: float | Tensor
    rest_fraction: float
    """Of the images."""


def split_batch(
    images: Tensor, labels: Tensor, criterion: Criterion, count: int, estimator: Estimator, num_sampled: int | None
) -> Split:
    """The parts of a batch of so many sub-batches.

    Raises:
        ValueError: An estimator and a number of sampled sub-batches that do not fit.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator must be one of {', '.join(get_args(Estimator))}, got {estimator!r}")
    if estimator != "sampled" and num_sampled is not None:
        raise ValueError(
            f"num_sampled needs estimator='sampled', got num_sampled={num_sampled} and estimator={estimator!r}"
        )
    if estimator == "sampled" and (num_sampled is None or not 1 <= num_sampled <= count):
        raise ValueError(f"num_sampled must be from 1 to the number of sub-batches, {count}, got {num_sampled}")
    size = len(images) // count
    batches = list(zip(images.split(size), labels.split(size), strict=True))
    counted = shares(criterion, [part for _, part in batches])
    relative = [count * share if isinstance(share, Tensor) else 1.0 for share in counted]
    if estimator == "fused":
        return Split(batches, relative, 1 / count, None, 0.0, 0.0)
    if estimator == "reference":
        return Split(batches, relative, 0.0, (images, labels), 1.0, 1.0)
    order = torch.randperm(count).tolist()
    rest = sorted(order[num_sampled:])
    return Split(
        [batches[i] for i in order[:num_sampled]],
        [relative[i] for i in order[:num_sampled]],
        1 / count,
        (torch.cat([batches[i][0] for i in rest]), torch.cat([batches[i][1] for i in rest])) if rest else None,
        sum(relative[i] for i in rest) / count,
        len(rest) / count,
    )
