"""Curvature of a trained network from its per-sample gradients (Jia & Su, ICML 2020, Sec. 5.3 and 7.1).

xi = J J^T (Eq. 5), with J (N', W) the gradients of the one-hot cross entropy of N' un-augmented training images.
gamma_hat = mean over T draws of ln det xi (Eq. 6); lower generalizes better. (The authors' script prints the sum of
ln of the singular values of J, which is half of it.)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infomcr_dist.gram import gradient_gram

__all__ = ["Estimate", "Spectrum", "estimate", "gamma_hat", "gradient_gram", "spectrum"]


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
