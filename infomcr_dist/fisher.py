"""Curvature of a trained network from its per-sample gradients (Jia & Su, ICML 2020, Sec. 5.3 and 7.1).

xi = J J^T (Eq. 5), with J (N', W) the gradients of the one-hot cross entropy of N' un-augmented training images.
gamma_hat = mean over T draws of ln det xi (Eq. 6); lower generalizes better. (The authors' script prints the sum of
ln of the singular values of J, which is half of it.)
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from infomcr_dist.functional import Batch, FunctionalLoss, LossFunction, Params

BLOCK_BYTES = 256 * 2**20  # of J held at a time


@dataclass(frozen=True)
class Spectrum:
    """What one Gram matrix xi (N', N') says; the last four are of the eigenvalues of xi / N', those of the Fisher."""

    log_determinant: float  # ln det xi; nan if xi is not positive definite
    frobenius: float  # |I|_F^2, the sum of squares
    spectral_radius: float
    trace: float
    smallest_eigenvalue: float


@dataclass(frozen=True)
class Estimate:
    """Mean and standard error over the draws that are not singular; `trials` counts all draws."""

    mean: float
    standard_error: float
    trials: int
    singular: int
    smallest_eigenvalue: float = math.nan  # of xi / N', over all draws


def gradient_gram(loss_fn: LossFunction, params: Params, batch: Batch, chunk: int | None = None) -> Tensor:
    """xi = J J^T, (N, N) float64 (Eq. 5): inner products of the gradients of the N samples of `batch`.

    Row n of J is the gradient of `loss_fn(params, (images[n:n+1], labels[n:n+1]))` with respect to `params`. A model
    behind `functional_loss` runs in eval mode: with batch statistics a sample has no gradient of its own. J is never
    held as a whole: `chunk` samples (default: all) are differentiated at a time, for as many parameters as fit.
    """
    images, labels = batch
    if len(images) < 1 or len(images) != len(labels):
        raise ValueError(f"batch must hold as many labels as images, at least one, got {len(labels)} and {len(images)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    leaves = {name: tensor.detach() for name, tensor in params.items()}
    gram = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)
    with _evaluation(loss_fn):
        for names in _groups(leaves, len(images)):
            jacobian = _jacobian(loss_fn, leaves, names, batch, chunk)
            for rows in jacobian.values():
                flat = rows.flatten(1).double()
                gram += flat @ flat.T
    return gram


def spectrum(gram: Tensor) -> Spectrum:
    """ln det xi by Cholesky, and the eigenvalues' summary, of one Gram matrix (N', N'), in float64."""
    gram = gram.double()
    factor, failed = torch.linalg.cholesky_ex(gram)
    log_determinant = math.nan if failed else float(2 * factor.diagonal().log().sum())
    eigenvalues = torch.linalg.eigvalsh(gram) / len(gram)
    return Spectrum(
        log_determinant,
        float(eigenvalues.square().sum()),
        float(eigenvalues[-1]),
        float(eigenvalues.sum()),
        float(eigenvalues[0]),
    )


def estimate(values: Sequence[float], smallest_eigenvalue: float = math.nan) -> Estimate:
    """Mean and standard error of one value a draw; nan counts as singular and enters neither."""
    regular = torch.tensor([value for value in values if not math.isnan(value)], dtype=torch.float64)
    mean = float(regular.mean()) if len(regular) else math.nan
    error = float(regular.std() / math.sqrt(len(regular))) if len(regular) > 1 else math.nan
    return Estimate(mean, error, len(values), len(values) - len(regular), smallest_eigenvalue)


def gamma_hat(grams: Iterable[Tensor]) -> Estimate:
    """gamma_hat (Eq. 6): the mean of ln det xi over the Gram matrices xi of T draws of N' samples each.

    A matrix that is not positive definite is counted in `singular` and left out of the mean, not clipped.
    Raises ValueError without any matrix.
    """
    spectra = [spectrum(gram) for gram in grams]
    if not spectra:
        raise ValueError("grams must hold at least one matrix, got none")
    return estimate([s.log_determinant for s in spectra], min(s.smallest_eigenvalue for s in spectra))


@contextmanager
def _evaluation(loss_fn: LossFunction) -> Iterator[None]:
    modules = list(loss_fn.model.modules()) if isinstance(loss_fn, FunctionalLoss) else list[nn.Module]()
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _groups(params: Params, samples: int) -> Iterator[list[str]]:
    """Names of parameters whose rows of J fit BLOCK_BYTES together; a larger one stands alone."""
    group: list[str] = []
    size = 0
    for name, tensor in params.items():
        rows = samples * tensor.numel() * tensor.element_size()
        if group and size + rows > BLOCK_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += rows
    if group:
        yield group


def _jacobian(loss_fn: LossFunction, params: Params, names: list[str], batch: Batch, chunk: int | None) -> Params:
    """Per-sample gradients (N, *shape) of the named parameters."""
    fixed = {name: tensor for name, tensor in params.items() if name not in names}

    def sample_loss(chosen: Params, image: Tensor, label: Tensor) -> Tensor:
        return loss_fn(fixed | chosen, (image[None], label[None]))

    chosen = {name: params[name] for name in names}
    rows: Params = vmap(grad(sample_loss), in_dims=(None, 0, 0), chunk_size=chunk)(chosen, *batch)
    return rows
