"""What the families share: stems for small and large images, and He's initialisation."""

from torch import nn


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def stem(width: int, image_size: int) -> nn.Sequential:
    """3x3 convolution up to 64 pixels (CIFAR); above, 7x7 with stride 2 and max-pooling (ImageNet)."""
    if image_size <= 64:
        return nn.Sequential(convolution(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(
        convolution(3, width, 7, stride=2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)
    )


def initialize(model: nn.Module) -> None:
    """He et al. (2015): convolutions normal with variance 2 / fan-out; BatchNorm scale 1 and shift 0; linear bias 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
