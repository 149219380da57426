import random
import warnings
from typing import Any

import pytest
import torch
from cases.library import Wrapped, batch_statistics, data, net, recurrent
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist.models import build
from infomcr_dist.preflight import check_model


def check(model: nn.Module, criterion: Any = F.cross_entropy, **settings: Any) -> None:
    x, y = data()
    dtype = next(model.parameters()).dtype
    check_model(model, criterion, x.to(dtype), y, **({"classes": 5, "sub_batches": 4} | settings))


def failing_in_training(model: Wrapped, x: Tensor) -> Tensor:
    if model.training and len(x) == 4:
        raise IndexError("index 3 is out\nof range")
    return model.net(x)


def failing_in_eval(model: Wrapped, x: Tensor) -> Tensor:
    if not model.training:
        raise KeyError("scale")
    return model.net(x)


SEEN: list[float] = []


def remembering(logits: Tensor, labels: Tensor) -> Tensor:
    SEEN.append(0.1)
    return F.cross_entropy(logits * sum(SEEN), labels)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"derivative": "exact"},
        {"estimator": "sampled", "num_sampled": 1},
        {"estimator": "reference"},
        {"sub_batches": None, "sub_batch_size": 8},
        {"metric": False},
    ],
    ids=str,
)
def test_a_network_that_works_is_left_as_it_is(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.2), net())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    check(model, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_a_network_of_ours_under_autocast() -> None:
    model = build("resnet20", 10, 32)
    with torch.autocast("cpu", torch.bfloat16):
        check_model(model, F.cross_entropy, torch.randn(8, 3, 32, 32), torch.arange(8), classes=10, sub_batch_size=4)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (net(), {"classes": 7}, r"model must return logits \(16, 7\), got a tensor \(16, 5\)"),
        (Wrapped(lambda model, x: {"logits": model.net(x)}), {}, r"model must return logits \(16, 5\), got dict"),
        (
            Wrapped(lambda model, x: model.missing(x)),
            {},
            "the forward pass does not work with this model: Attr",
        ),
        (
            Wrapped(failing_in_training),
            {},
            "the regularized step does not work with this model: IndexError: index 3 is out of range",
        ),
        (Wrapped(failing_in_eval), {}, "the Gram matrix of gamma_hat does not work with this model: KeyError: 'scale'"),
        (batch_statistics(), {}, "the Gram matrix of gamma_hat does not work with this model: BatchNorm must use"),
        (net(), {"sub_batches": 3}, "the regularized step does not work with this model: sub_batches must divide"),
        (
            net(),
            {"criterion": nn.CrossEntropyLoss(reduction="sum")},
            "the plain step does not work with this model: ",
        ),
        (net(), {"criterion": remembering}, "two forward passes over the same images at the same weights must agree"),
        (net().requires_grad_(False), {}, "must have parameters that require a gradient"),
    ],
)
def test_what_does_not_work_is_reported_in_one_line(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        check(model, **settings)
    assert "\n" not in str(refused.value)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_works_slowly_gives_a_warning() -> None:
    with pytest.warns(UserWarning, match="one backward pass a sample, which is slow"):
        check(recurrent())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(recurrent(), metric=False)
