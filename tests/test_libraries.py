"""Networks of timm and torchvision by name: built for the data's classes, and fit for the regularizer and γ̂."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist import regularized_backward
from infomcr_dist.functional import functional_loss, trainable_parameters
from infomcr_dist.gram import gradient_gram
from infomcr_dist.models import build, parts_by_classes
from infomcr_dist.preflight import check_model

_OPERATORS: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Both libraries, or none of these tests.

    A build of torchvision for CUDA does not load its operators beside a torch for CPUs, and then fails to declare what
    they return; the networks here use none of them.
    """
    if not torch.version.cuda and not hasattr(torch.ops.torchvision, "nms"):
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _OPERATORS.append(operators)
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")


SIZE = 32
NETWORKS = {
    "timm:test_resnet": "fc",
    "timm:test_convnext,drop_path_rate=0.1": "head.fc",
    "timm:test_vit,img_size=32": "head",
    "torchvision:shufflenet_v2_x0_5": "fc",
}
"""The smallest of their families, with the name of their last layer"""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_regularized_step_and_gamma_of_a_network_by_name(name: str) -> None:
    torch.manual_seed(0)
    model = build(name, 5, SIZE).train()
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.arange(4)
    check_model(model, nn.CrossEntropyLoss(), images, labels, classes=5, sub_batches=2, metric=False)
    model.eval()
    params = trainable_parameters(model)
    found = gradient_gram(functional_loss(model), params, (images[:2], labels[:2]))
    jacobian = torch.stack([flat(model, params, images[i : i + 1], labels[i : i + 1]) for i in range(2)]).double()
    torch.testing.assert_close(found, jacobian @ jacobian.T, rtol=1e-3, atol=1e-4 * float(found.diagonal().max()))


def flat(model: nn.Module, params: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """The gradient as one vector."""
    loss = F.cross_entropy(model(images), labels)
    grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in grads])


def test_timm_s_own_kind_of_batch_norm_is_regularized_by_the_definition() -> None:
    """The mean of (1 + beta) g_i - beta h_i, with h_i at w - alpha g_i, each by a pass of its own in float64; and
    running statistics as two passes over half a batch each would leave them."""
    torch.manual_seed(0)
    model = build("timm:test_efficientnet", 5, SIZE).double().train()
    assert any("BatchNormAct" in type(module).__name__ for module in model.modules())
    images, labels, alpha, beta = torch.randn(4, 3, SIZE, SIZE).double(), torch.arange(4), 1e-3, 3.0
    expected, other = 0, copy.deepcopy(model)
    params = trainable_parameters(other)
    weights = torch.cat([p.detach().flatten() for p in params.values()])
    for i in (0, 2):
        part = images[i : i + 2], labels[i : i + 2]
        g = flat(other, params, *part)
        nn.utils.vector_to_parameters(weights - alpha * g, params.values())
        expected += ((1 + beta) * g - beta * flat(other, params, *part)) / 2
        nn.utils.vector_to_parameters(weights, params.values())
    regularized_backward(model, F.cross_entropy, images, labels, alpha=alpha, beta=beta, sub_batches=2)
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    counts = [buffer for name, buffer in model.named_buffers() if "num_batches" in name]
    assert {int(count) for count in counts} == {1}


@pytest.mark.parametrize("name", ["timm:test_vit,img_size=32", "torchvision:shufflenet_v2_x0_5"])
def test_the_head_and_its_classes(name: str) -> None:
    assert parts_by_classes(name, 5, SIZE) == {f"{NETWORKS[name]}.{kind}" for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnet18x", "cannot be built: RuntimeError: Unknown model .resnet18x"),
        ("torchvision:resnet18x", "cannot be built: ValueError: Unknown model resnet18x"),
    ],
)
def test_a_network_that_the_library_does_not_have(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 5, SIZE)
