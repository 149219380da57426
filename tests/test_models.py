import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


class Net(nn.Module):
    """With torchvision's and timm's names."""

    def __init__(self, width: int = 4, num_classes: int = 1000, img_size: int = 224, rate: float = 0.0) -> None:
        super().__init__()
        self.width, self.img_size = width, img_size
        self.features = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Dropout(rate))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def like_torchvision(*, weights: str | None = None, progress: bool = True, **kwargs: Any) -> nn.Module:
    assert isinstance(progress, bool)
    if weights is not None and kwargs.get("num_classes") != 1000:
        raise ValueError("The parameter 'num_classes' expected value 1000 but got 10 instead.")
    return Net(**kwargs)


def like_timm(model_name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    assert model_name == "net"
    model = Net(**kwargs)
    if pretrained:
        nn.init.ones_(model.head.weight)
        model.features.requires_grad_(False)
    return model


def without_classes(width: int) -> nn.Module:
    return Net(width, num_classes=10)


def not_a_model(classes: int, image_size: int) -> str:
    return "no"


def failing(classes: int, image_size: int) -> nn.Module:
    raise RuntimeError("no weights\nfor this size")


def frozen(classes: int, image_size: int) -> nn.Module:
    return tiny(classes, image_size).requires_grad_(False)


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = Net(num_classes=10), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self, self.net(x))


def dictionary(num_classes: int) -> nn.Module:
    return Wrapped(lambda model, out: {"logits": out})


def auxiliary(num_classes: int) -> nn.Module:
    return Wrapped(lambda model, out: (out, out) if model.training else out)


def maps(num_classes: int) -> nn.Module:
    return nn.Conv2d(3, num_classes, 1)


def large_images(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, num_classes, 64), nn.Flatten())


class Models:
    net = Net


def test_any_model_by_import_path() -> None:
    assert build(f"{__name__}:tiny", 5, 4)(torch.randn(2, 3, 4, 4)).shape == (2, 5)


@pytest.mark.parametrize(
    "name",
    [
        "Net",
        "Net,8",
        "Net,width=8,rate=0.5",
        "Models.net",
        "like_torchvision",
        "like_torchvision,progress=false,width=8",
        "like_timm,net",
        "like_timm,net,pretrained=true,img_size=32",
        "like_timm,model_name=net",
        "without_classes,8",
    ],
)
def test_builders_with_other_arguments(name: str) -> None:
    model = build(f"{__name__}:{name}", 10, 32)
    assert isinstance(model, Net)
    assert model.training
    assert model.head.out_features == 10
    assert model.width == (8 if "8" in name else 4)
    takes_size = name.startswith(("Net", "Models")) or "img_size" in name
    assert model.img_size == (32 if takes_size else 224)
    assert model.features[1].num_batches_tracked == 0
    pretrained = "pretrained=true" in name
    assert pretrained == bool((model.head.weight == 1).all())
    assert pretrained != model.features[0].weight.requires_grad


def test_the_look_at_the_logits_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    build(f"{__name__}:Net,rate=0.5", 10, 32)
    found = torch.rand(3)
    torch.manual_seed(0)
    Net(num_classes=10)
    assert torch.equal(torch.rand(3), found)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet2O", "got 'resnet2O'; nearest: 'resnet20'"),
        ("no_such_package:build", "model='no_such_package:build' cannot be imported: ModuleNotFoundError"),
        (f"{__name__}:missing", "cannot be imported: AttributeError"),
        (f"{__name__}:not_a_model", "must return a torch module, got str"),
        (f"{__name__}:failing", "cannot be built: RuntimeError: no weights for this size"),
        (f"{__name__}:Net,depth=3", r"cannot be built: TypeError: .*unexpected keyword argument 'depth'"),
        (f"{__name__}:like_timm", "cannot be built: TypeError"),
        (f"{__name__}:like_torchvision,weights=DEFAULT", "expected value 1000 but got 10 instead"),
        (f"{__name__}:frozen", "has nothing to train: no parameter requires a gradient"),
        (f"{__name__}:Net,num_classes=7", r"must return logits \(B, 10\) of B images, got a tensor \(2, 7\)"),
        (f"{__name__}:maps", r"must return logits \(B, 10\) of B images, got a tensor \(2, 10, 32, 32\)"),
        (f"{__name__}:dictionary", r"must return logits \(B, 10\) of B images, got dict"),
        (f"{__name__}:auxiliary", "got tuple for B = 2 in training mode"),
        (f"{__name__}:large_images", "cannot take images of 32 x 32 pixels: RuntimeError"),
    ],
)
def test_models_that_do_not_work_are_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        build(name, 10, 32)
    assert "\n" not in str(refused.value)


class Viewing(nn.Module):
    """Calls `view` on what a convolution returns, which has to be contiguous for it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv2d(3, 2, 3), nn.Linear(2 * 6 * 6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).view(len(x), -1))


def test_a_network_that_needs_contiguous_images_gets_them() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    plain = Viewing(5)
    with pytest.raises(RuntimeError, match="view size"):
        plain(images.contiguous(memory_format=torch.channels_last))
    torch.manual_seed(1)
    built = build(f"{__name__}:Viewing", 5, 8)
    assert torch.equal(built(images.contiguous(memory_format=torch.channels_last)), plain(images))


@pytest.mark.parametrize("name", MODELS)
def test_channels_last_changes_a_gradient_by_rounding_alone(name: str) -> None:
    torch.manual_seed(0)
    model, images, labels = build(name, 7, 16).double(), torch.randn(4, 3, 16, 16).double(), torch.arange(4)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # it draws its mask in the order of the memory
            module.p = 0.0
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        loss = nn.functional.cross_entropy(model(images.contiguous(memory_format=memory_format)), labels)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "timm:resnet18,pretrained=true",
            "names a network without weights, got pretrained=true: give .* init_from=FILE",
        ),
        ("torchvision:resnet18,weights=DEFAULT", "names a network without weights, got weights=DEFAULT: give the file"),
        ("timm:resnet18,checkpoint_path=x.pt", "names a network without weights, got checkpoint_path=x.pt"),
        ("timm:hf-hub:timm/resnet18.a1_in1k", "must be timm:NAME of a network of timm, got 'hf-hub:timm/resnet18"),
        ("timm:local-dir:/tmp", "must be timm:NAME of a network of timm, got 'local-dir:/tmp'"),
        ("torchvision:", "must be torchvision:NAME of a network of torchvision, got ''"),
    ],
)
def test_a_name_of_a_library_brings_no_weights(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, 10, 32)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_there_or_broken_has_a_remedy(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ValueError, match=rf"cannot be imported: .*: pip install 'infomcr_dist\[{library}\]'$"):
        build(f"{library}:resnet18", 10, 32)

    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(
        ValueError, match="nms does not exist: install the build of torchvision that is made for torch "
    ):
        build(f"{library}:resnet18", 10, 32)
