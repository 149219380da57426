import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist.fisher import estimate, gamma_hat, gradient_gram, spectrum
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.models import build


def batch_of(size: int, pixels: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, pixels, pixels, dtype=torch.float64, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


def one_backward_per_sample(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """xi by holding J, from the module itself in eval mode."""
    rows = []
    for image, label in zip(*batch, strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    jacobian = torch.stack(rows)
    return jacobian @ jacobian.T


def warmed(model: nn.Module) -> nn.Module:
    """Running statistics that are not 0 and 1."""
    model(batch_of(16, 8, seed=2)[0])
    return model


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_the_gram_of_a_network_is_that_of_its_per_sample_gradients(chunk: int | None) -> None:
    torch.manual_seed(0)
    model = warmed(build("resnet20", 10, 32).double())
    batch = batch_of(5)
    gram = gradient_gram(functional_loss(model), trainable_parameters(model), batch, chunk)
    assert gram.dtype == torch.float64
    assert model.training
    expected = one_backward_per_sample(model.eval(), batch)
    torch.testing.assert_close(gram, expected, rtol=1e-10, atol=1e-12 * float(expected.max()))


def test_the_gram_of_any_other_function() -> None:
    # l_n = (wᵀx_n − y_n)² / 2 has the gradient (wᵀx_n − y_n) x_n.
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    w = torch.randn(4, dtype=torch.float64)
    gram = gradient_gram(lambda params, batch: ((batch[0] @ params["w"] - batch[1]) ** 2).mean() / 2, {"w": w}, (x, y))
    residual = x @ w - y
    torch.testing.assert_close(gram, torch.outer(residual, residual) * (x @ x.T), rtol=1e-12, atol=1e-14)


def test_frozen_parameters_do_not_enter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.SiLU(), nn.Linear(8, 10)).double()
    model[1].requires_grad_(False)
    batch = batch_of(4)
    hidden = F.silu(model[1](batch[0].flatten(1)))
    error = F.softmax(model(batch[0]), 1) - F.one_hot(batch[1], 10)
    gram = gradient_gram(functional_loss(model), trainable_parameters(model), batch)
    torch.testing.assert_close(gram, (error @ error.T) * (hidden @ hidden.T + 1))


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, p, b: gradient_gram(f, p, (b[0][:0], b[1][:0])), "at least one, got 0 and 0"),
        (lambda f, p, b: gradient_gram(f, p, (b[0], b[1][:2])), "as many labels as images, at least one, got 2 and 3"),
        (lambda f, p, b: gradient_gram(f, p, b, chunk=0), "chunk must be at least 1, got 0"),
        (lambda f, p, b: gamma_hat([]), "grams must hold at least one matrix, got none"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double()
    with pytest.raises(ValueError, match=message):
        call(functional_loss(model), trainable_parameters(model), batch_of(3))
