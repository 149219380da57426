import pytest
import torch
from torch import nn
from torch.nn import functional as F

from infomcr_dist.functional import add_scaled, dot, functional_loss, gradient, moved, trainable_parameters


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(64, 5)).double()


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(7, 3, 6, 6, dtype=torch.float64), torch.arange(7) % 5


def test_the_loss_and_its_gradient_are_those_of_the_module() -> None:
    model, batch = small_net(), small_batch()
    params = trainable_parameters(model)
    loss = functional_loss(model)(params, batch)
    expected = F.cross_entropy(model(batch[0]), batch[1])
    assert torch.equal(loss, expected)
    for one, other in zip(
        gradient(loss, params).values(), torch.autograd.grad(expected, list(params.values())), strict=True
    ):
        assert torch.equal(one, other)


def test_the_loss_depends_on_the_parameters_it_is_given_not_on_those_of_the_module() -> None:
    model, batch = small_net(), small_batch()
    shifted = {name: tensor + 0.1 for name, tensor in trainable_parameters(model).items()}
    loss = functional_loss(model)(shifted, batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert torch.equal(loss, F.cross_entropy(model(batch[0]), batch[1]))


def test_buffers_stay_untouched_in_training_mode() -> None:
    model = small_net()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    functional_loss(model)(trainable_parameters(model), small_batch())
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_frozen_parameter_is_not_trainable_and_keeps_its_value() -> None:
    model, batch = small_net(), small_batch()
    expected = functional_loss(model)(trainable_parameters(model), batch)
    model[0].requires_grad_(False)
    params = trainable_parameters(model)
    assert "0.weight" not in params
    assert torch.equal(functional_loss(model)(params, batch), expected)


def test_a_shared_parameter_appears_once_and_moves_everywhere() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    batch = (torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))
    params = trainable_parameters(model)
    assert sorted(params) == ["0.bias", "0.weight", "2.bias"]
    got = gradient(functional_loss(model, F.mse_loss)(params, batch), params)
    F.mse_loss(model(batch[0]), batch[1]).backward()
    assert all(torch.equal(got[name], params[name].grad) for name in params)


def test_arithmetic_on_dictionaries() -> None:
    w = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    g = {"a": torch.tensor([10.0, 20.0])}
    away = moved(w, g, 0.5)
    assert torch.equal(away["a"], torch.tensor([-4.0, -8.0]))
    assert away["b"] is w["b"]
    total: dict[str, torch.Tensor] = {}
    add_scaled(total, g, 2.0)
    add_scaled(total, {"a": torch.ones(2), "b": torch.ones(1)}, 3.0)
    assert torch.equal(total["a"], torch.tensor([23.0, 43.0]))
    assert torch.equal(total["b"], torch.tensor([3.0]))
    assert torch.equal(g["a"], torch.tensor([10.0, 20.0]))
    assert dot(w, g) == 50.0


def test_gradient_leaves_out_what_the_scalar_does_not_depend_on() -> None:
    params = {"used": torch.ones(2, requires_grad=True), "unused": torch.ones(2, requires_grad=True)}
    assert list(gradient(params["used"].sum(), params)) == ["used"]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_module_is_respected(training: bool) -> None:
    model, batch = small_net().train(training), small_batch()
    loss = functional_loss(model)(trainable_parameters(model), batch)
    images = batch[0]
    h = model[0](images)
    mean, var = (h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)) if training else (torch.zeros(4), torch.ones(4))
    h = (h - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
    assert torch.allclose(loss, F.cross_entropy(model[4](F.silu(h).flatten(1)), batch[1]), rtol=1e-12)
