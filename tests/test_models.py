import pytest
import torch
from torch import nn

from infomcr_dist.models import MODELS, build


@pytest.mark.parametrize(
    ("name", "classes", "image_size", "parameters"),
    [
        ("cnn", 10, 32, 1.37e6),
        ("densenet_100_12", 10, 32, 0.77e6),
        ("resnet20", 10, 32, 0.27e6),
        ("resnet50", 1000, 224, 25.6e6),
        ("wrn_18_1_5", 1000, 128, 25.9e6),
        ("wrn_28_2", 10, 32, 1.47e6),
    ],
)
def test_the_published_number_of_parameters(name: str, classes: int, image_size: int, parameters: float) -> None:
    count = sum(parameter.numel() for parameter in build(name, classes, image_size).parameters())
    assert count == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_small_and_large_images_give_logits(name: str) -> None:
    for image_size, final in ((32, 32), (128, 128)):
        model = build(name, 7, image_size).eval()
        assert model(torch.randn(2, 3, final, final)).shape == (2, 7)


@pytest.mark.parametrize("name", MODELS)
def test_the_large_stem_reduces_the_image_fourfold(name: str) -> None:
    sizes = {}
    for image_size in (64, 65):
        model = build(name, 7, image_size).eval()
        layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        layers[1].register_forward_hook(lambda m, args, out, key=image_size: sizes.update({key: args[0].shape[-1]}))
        model(torch.randn(1, 3, 64, 64))
    assert sizes == {64: 64, 65: 16}


def test_convolutions_start_with_he_variance() -> None:
    torch.manual_seed(0)
    for module in build("wrn_18_1_5", 10, 32).modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def tiny(classes: int, image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, classes))


def not_a_model(classes: int, image_size: int) -> str:
    return "no"


def test_any_model_by_import_path() -> None:
    assert build(f"{__name__}:tiny", 5, 4)(torch.randn(2, 3, 4, 4)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet2O", "got 'resnet2O'; nearest: 'resnet20'"),
        ("no_such_package:build", "model='no_such_package:build' cannot be imported"),
        (f"{__name__}:missing", "cannot be imported"),
        (f"{__name__}:not_a_model", "must return a torch module, got str"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 10, 32)
