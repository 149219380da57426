import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist.curvature import (
    Estimate,
    estimate,
    gamma,
    gamma_hat,
    generalization_bound,
    logit_scaled,
    robustness,
    spectrum,
)
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram


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


def test_gamma_of_a_fisher_matrix_that_is_known() -> None:
    # W orthogonal gradients of squared length W: the Fisher matrix is the identity, gamma = 0.
    assert gamma(gamma_hat([9 * torch.eye(9)]), 9, 9) == pytest.approx(0, abs=1e-12)
    # Any spectrum, all of it seen (N' = W): ln det (xi / W).
    root = torch.randn(6, 6, dtype=torch.float64)
    xi = root @ root.T
    assert gamma(gamma_hat([xi]), 6, 6) == pytest.approx(float(torch.logdet(xi / 6)), rel=1e-12)
    assert gamma(Estimate(-979.3, 1.0, 100, 0), 270_000, 100) == pytest.approx(
        270_000 / 100 * -979.3 + 270_000 * math.log(1 / 270_000)
    )


def test_logit_scale_makes_gamma_hat_blind_to_the_scale_of_the_logits() -> None:
    torch.manual_seed(0)
    net, images, labels = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64), torch.arange(4) % 3
    loss = functional_loss(net, logit_scaled())((params := trainable_parameters(net)), (images, labels))
    unit = F.normalize(net(images), dim=1)
    torch.testing.assert_close(loss, F.cross_entropy(unit / 0.04, labels))
    with torch.no_grad():
        for parameter in params.values():
            parameter *= 10
    torch.testing.assert_close(functional_loss(net, logit_scaled())(params, (images, labels)), loss)
    assert gradient_gram(functional_loss(net, logit_scaled()), params, (images, labels)).shape == (4, 4)


def softmax_jacobians(model: nn.Module, images: Tensor) -> Tensor:
    """(N, classes, inputs), one image at a time."""
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: model(x).softmax(1)[0], image[None]).flatten(1) for image in images
    ]
    return torch.stack(jacobians)


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_robustness_is_the_squared_spectral_norm_of_the_softmax_jacobian(classes: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, classes)
    ).double()
    with torch.no_grad():
        model[5].weight *= 20  # from uniform to peaked outputs
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    model(images)
    got = robustness(model, images)
    assert model.training
    expected = torch.linalg.matrix_norm(softmax_jacobians(model.eval(), images), 2) ** 2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-12 * float(expected.max()))


def test_robustness_of_a_linear_model_with_two_classes_has_a_closed_form() -> None:
    # J = p (1 - p) (1, -1)^T (w_1 - w_2)^T, so its norm is p (1 - p) sqrt(2) |w_1 - w_2|.
    model, images = nn.Linear(5, 2), torch.randn(3, 5)
    p = model(images).softmax(1)[:, 0].double()
    difference = (model.weight[0] - model.weight[1]).double()
    expected = 2 * (p * (1 - p)) ** 2 * difference.square().sum()
    torch.testing.assert_close(robustness(model, images), expected.detach(), rtol=1e-5, atol=0)


def test_robustness_of_a_constant_is_zero() -> None:
    model = nn.Linear(5, 3)
    nn.init.zeros_(model.weight)
    assert torch.equal(robustness(model, torch.randn(2, 5)), torch.zeros(2, dtype=torch.float64))


def test_robustness_of_saturated_outputs_is_that_of_float64() -> None:
    """Where the winning logit leads by 70 to 115, J J^T in float32 is rounding, of either sign, or nothing at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32, bias=False), nn.ReLU(), nn.Linear(32, 6, bias=False))
    images = torch.randn(400, 5)
    best = model(images).detach().topk(2).values
    images *= (torch.linspace(70, 115, 400) / (best[:, 0] - best[:, 1]))[:, None]
    got = robustness(model, images)
    # Of J^2 it is twice the rounding of the logits, which are sums of float32; below 1e-35, J itself underflows.
    tolerance = 2 * 4 * torch.finfo(torch.float32).eps * float(model(images).detach().abs().max())
    expected = robustness(model.double(), images.double())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-70)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Model(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.head, self.wrap = nn.Linear(5, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.head(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(lambda out: {"logits": out}), r"returns logits \(N, classes\), got dict"),
        (Model(Once.apply), "robustness needs a second derivative that torch does not have"),
        (nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3, track_running_stats=False)), "running statistics"),
    ],
)
def test_robustness_refuses_what_it_cannot_take(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        robustness(model, torch.randn(4, 5))
    assert "\n" not in str(refused.value)


def test_robustness_of_a_recurrent_network_and_under_inference_mode() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(3, 6, batch_first=True), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model, images = Recurrent().double(), torch.randn(5, 7, 3, dtype=torch.float64)
    expected = torch.linalg.matrix_norm(softmax_jacobians(model, images), 2) ** 2
    torch.testing.assert_close(robustness(model, images), expected, rtol=1e-8, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(robustness(model, images.clone()), expected, rtol=1e-8, atol=0)


def test_the_bound_term_by_term() -> None:
    got = generalization_bound(
        gamma=-40.0, train_loss=0.3, minimum_loss=0.1, parameters=20, samples=1000, log_volume=-30.0, delta=0.1
    )
    a = 20 * math.exp(-30.0) ** (2 / 20) * math.pi ** (1 / 20) * math.exp(-40.0 / 20) / (4 * math.pi * math.e)
    assert got.curvature_term == pytest.approx(2 * a, rel=1e-12)
    assert (got.train_loss, got.loss_term) == (0.3, 0.2)
    assert got.confidence_term == pytest.approx(math.log(20_000))
    assert got.bound == pytest.approx(0.3 + 2 * math.sqrt((0.2 + 2 * a + math.log(20_000)) / 999), rel=1e-12)
    assert got.complexity == pytest.approx(got.bound - 0.3)


def test_the_bound_of_a_large_network_neither_underflows_nor_overflows() -> None:
    common: dict[str, Any] = {"train_loss": 0.0, "minimum_loss": 0.0, "parameters": 26_000_000, "samples": 1_000_000}
    small = generalization_bound(gamma=-4e8, log_volume=-1e9, **common)
    assert 0 < small.curvature_term < 1
    assert generalization_bound(gamma=1e11, log_volume=0.0, **common).bound == math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1}, "parameters and samples must be at least 1 and 2, got 20 and 1"),
        ({"delta": 0.0}, "delta must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_input_of_the_bound(change: dict[str, float], message: str) -> None:
    common = {"gamma": 0.0, "train_loss": 0.0, "minimum_loss": 0.0, "parameters": 20, "samples": 9, "log_volume": 0.0}
    with pytest.raises(ValueError, match=message):
        generalization_bound(**(common | change))


def test_bad_input_of_the_conversions() -> None:
    with pytest.raises(ValueError, match="parameters and samples must be at least 1, got 0 and 100"):
        gamma(Estimate(1.0, 1.0, 1, 0), 0, 100)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        logit_scaled(scale=0.0)
