import math

import pytest
import torch

from infomcr_dist.fisher import estimate, gamma_hat, spectrum


def test_spectrum_of_known_eigenvalues() -> None:
    eigenvalues = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    got = spectrum(basis @ eigenvalues.diag() @ basis.T)
    assert got.log_determinant == pytest.approx(math.log(12), rel=1e-12)
    assert got.trace == pytest.approx(3.0, rel=1e-12)
    assert got.spectral_radius == pytest.approx(2.0, rel=1e-12)
    assert got.frobenius == pytest.approx((1 + 4 + 36) / 9, rel=1e-12)
    assert got.smallest_eigenvalue == pytest.approx(1 / 3, rel=1e-12)


def test_the_fisher_baselines_are_those_of_the_big_matrix() -> None:
    # xi / N' = J Jᵀ / N' has the non-zero eigenvalues of the Fisher matrix Jᵀ J / N' (W, W).
    jacobian = torch.randn(5, 40, dtype=torch.float64)
    fisher = jacobian.T @ jacobian / 5
    got = spectrum(jacobian @ jacobian.T)
    assert got.frobenius == pytest.approx(float(fisher.square().sum()), rel=1e-12)
    assert got.spectral_radius == pytest.approx(float(torch.linalg.matrix_norm(fisher, 2)), rel=1e-12)
    assert got.trace == pytest.approx(float(fisher.trace()), rel=1e-12)


def test_gamma_hat_is_the_mean_log_determinant() -> None:
    roots = torch.randn(6, 4, 9, dtype=torch.float64)
    grams = roots @ roots.mT
    expected = torch.linalg.slogdet(grams).logabsdet
    got = gamma_hat(iter(grams))
    assert got.mean == pytest.approx(float(expected.mean()), rel=1e-12)
    assert got.standard_error == pytest.approx(float(expected.std() / math.sqrt(6)), rel=1e-12)
    assert (got.trials, got.singular) == (6, 0)
    assert got.smallest_eigenvalue == pytest.approx(float(torch.linalg.eigvalsh(grams).min() / 4), rel=1e-9)


def test_a_log_determinant_far_below_the_smallest_float_is_exact() -> None:
    assert gamma_hat([torch.eye(100) * 1e-12]).mean == pytest.approx(100 * math.log(1e-12), rel=1e-7)


def test_matrices_that_are_not_positive_definite_are_counted_not_clipped() -> None:
    got = gamma_hat([torch.eye(2), torch.diag(torch.tensor([1.0, -3.0])), torch.ones(2, 2)])
    assert (got.mean, got.trials, got.singular) == (0.0, 3, 2)
    assert math.isnan(got.standard_error)
    assert got.smallest_eigenvalue == pytest.approx(-1.5)
    nothing = estimate([math.nan, math.nan])
    assert math.isnan(nothing.mean)
    assert (nothing.trials, nothing.singular) == (2, 2)


def test_no_matrix_is_an_error() -> None:
    with pytest.raises(ValueError, match="grams must hold at least one matrix, got none"):
        gamma_hat([])
