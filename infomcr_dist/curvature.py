"""Curvature of a trained network from its per-sample gradients (Jia & Su, ICML 2020, Sec. 5.3 and 7.1).

xi = J J^T (Eq. 5), with J (N', W) the gradients of the one-hot cross entropy of N' un-augmented training images.
gamma_hat = mean over T draws of ln det xi (Eq. 6); of models of equal training loss the lower generalizes better. (The
authors' script prints the sum of ln of the singular values of J, which is half of it.)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from infomcr_dist.functional import Criterion, functional_loss
from infomcr_dist.inspection import second_derivatives
from infomcr_dist.precision import full_precision, math_attention


@dataclass(frozen=True)
class Spectrum:
    """Summary of one Gram matrix xi (N', N'); the last four are of the eigenvalues of xi / N', those of the Fisher."""

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
    """ln det xi by Cholesky, and the eigenvalues' summary, of one Gram matrix (N', N'), in float64 on the CPU."""
    gram = gram.double().cpu()
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

    Args:
        grams: The matrices, each (N', N'). One that is not positive definite is counted in `singular` and excluded
            from the mean, not clipped.

    Returns:
        Mean and standard error over the draws, in nats, and the smallest eigenvalue of xi / N' over all of them.

    Raises:
        ValueError: No matrix.
    """
    spectra = [spectrum(gram) for gram in grams]
    if not spectra:
        raise ValueError("grams must hold at least one matrix, got none")
    return estimate([s.log_determinant for s in spectra], min(s.smallest_eigenvalue for s in spectra))


def gamma(gamma_hat: Estimate, parameters: int, samples: int) -> float:
    """gamma = ln det of the Fisher information, about (W / N') gamma_hat + W ln(1 / W) (after Eq. 6).

    Args:
        gamma_hat: Its estimate.
        parameters: W, the number of parameters.
        samples: N', the number of samples of a Gram matrix.

    Raises:
        ValueError: No parameter or no sample.
    """
    if parameters < 1 or samples < 1:
        raise ValueError(f"parameters and samples must be at least 1, got {parameters} and {samples}")
    return parameters * (gamma_hat.mean / samples - math.log(parameters))


def logit_scaled(criterion: Criterion = nn.functional.cross_entropy, scale: float = 0.04) -> Criterion:
    """`criterion` of logits / (|logits| * scale), to compare gamma_hat of models of unequal training loss (Table 3).

    Args:
        criterion: `criterion(logits, labels)`, a mean over the batch.
        scale: Norm of a sample's logits becomes 1 / scale.

    Raises:
        ValueError: scale <= 0.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return lambda logits, labels: criterion(logits / (logits.norm(dim=1, keepdim=True) * scale), labels)


def robustness(model: nn.Module, images: Tensor, steps: int = 20) -> Tensor:
    """|J_x[f_w(x)]|_2^2 of each image, (N,) float64: squared spectral norm of the Jacobian (classes x inputs) of the
    softmax output in eval mode. The metric of Sec. 7.1 is the mean over the training images.

    Args:
        model: Maps images to logits (N, classes).
        images: (N, ...).
        steps: Steps of the Lanczos iteration on J J^T, of two derivatives each: exact for at most so many classes, and
            converged for 1000.

    Returns:
        (N,) float64.

    Raises:
        ValueError: The model returns something else than logits, cannot be differentiated twice, or normalizes images
            by the batch's statistics.
    """
    if any(isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules()):
        raise ValueError("robustness needs BatchNorm with running statistics: track_running_stats=True")
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        full_precision(images.device),
        math_attention(),
        second_derivatives("robustness"),
    ):
        images = images.detach().clone().requires_grad_()
        logits = functional_loss(model, evaluate=True).logits({}, images)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ValueError(f"robustness needs a model that returns logits (N, classes), got {type(logits).__name__}")
        outputs = logits.double().softmax(dim=1)
        # J^T u as a function of u: its derivative in the direction v is J v.
        argument = torch.zeros_like(outputs, requires_grad=True)
        (pulled,) = torch.autograd.grad(outputs, images, argument, create_graph=True)

        def square(direction: Tensor) -> Tensor:
            (pull,) = torch.autograd.grad(outputs, images, direction, retain_graph=True)
            return torch.autograd.grad(pulled, argument, pull, retain_graph=True)[0]

        generator = torch.Generator().manual_seed(0)
        start = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
        basis = [start / start.norm(dim=1, keepdim=True)]
        count = min(steps, outputs.shape[1])
        tridiagonal = torch.zeros(len(images), count, count, dtype=torch.float64, device=outputs.device)
        for i in range(count):
            image = square(basis[i])
            tridiagonal[:, i, i] = (image * basis[i]).sum(1)
            if i + 1 == count:
                break
            for earlier in basis * 2:  # once leaves rounding that grows
                image = image - (image * earlier).sum(1, keepdim=True) * earlier
            length = image.norm(dim=1, keepdim=True)
            # Nothing but rounding lies outside the basis; of a vanishing derivative it is all, and has either sign.
            ended = length <= 1e-12 * tridiagonal[:, 0, :1].abs()
            length = length.masked_fill(ended, 0.0)
            tridiagonal[:, i, i + 1] = tridiagonal[:, i + 1, i] = length[:, 0]
            basis.append(torch.where(ended, 0.0, image / length))
    norms: Tensor = torch.linalg.eigvalsh(tridiagonal)[:, -1]
    return norms


@dataclass(frozen=True)
class Bound:
    """Theorem 1 term by term: bound = train_loss + complexity, where complexity is
    2 sqrt((loss_term + curvature_term + confidence_term) / (N - 1))."""

    train_loss: float  # E_Q L(S, w)
    loss_term: float  # 2 L_0
    curvature_term: float  # 2 A
    confidence_term: float  # ln(2 N / delta)
    complexity: float
    bound: float


def generalization_bound(
    *,
    gamma: float,
    train_loss: float,
    minimum_loss: float,
    parameters: int,
    samples: int,
    log_volume: float,
    delta: float = 0.05,
) -> Bound:
    """The bound on the expected loss E_Q L(D, w) that holds with probability 1 - delta (Theorem 1).

    bound = train_loss + 2 sqrt((2 L_0 + 2 A + ln(2 N / delta)) / (N - 1)) with
    A = W V^(2/W) pi^(1/W) exp(gamma/W) / (4 pi e)

    Args:
        gamma: ln det of the Fisher information at w_0; see `gamma`.
        train_loss: E_Q L(S, w), in nats.
        minimum_loss: L_0 = L(S, w_0), in nats.
        parameters: W.
        samples: N, the number of training samples.
        log_volume: ln V of the neighbourhood of w_0 (V itself underflows).
        delta: Probability that the bound does not hold.

    Returns:
        The bound and its terms.

    Raises:
        ValueError: No parameter, fewer than two samples, or delta outside (0, 1].
    """
    if parameters < 1 or samples < 2:
        raise ValueError(f"parameters and samples must be at least 1 and 2, got {parameters} and {samples}")
    if not 0 < delta <= 1:
        raise ValueError(f"delta must be above 0 and at most 1, got {delta}")
    log_a = math.log(parameters / (4 * math.pi * math.e)) + (2 * log_volume + math.log(math.pi) + gamma) / parameters
    terms = (2 * minimum_loss, 2 * math.exp(log_a) if log_a < 700 else math.inf, math.log(2 * samples / delta))
    complexity = 2 * math.sqrt(sum(terms) / (samples - 1))
    return Bound(train_loss, *terms, complexity, train_loss + complexity)
