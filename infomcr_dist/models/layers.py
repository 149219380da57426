"""What the families share: convolutions, stems for small and large images, and He's initialisation."""

from torch import nn


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the image size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def stem(width: int, image_size: int, activated: bool = True) -> nn.Sequential:
    """3x3 convolution up to 64 pixels (CIFAR); above, 7x7 with stride 2 and max-pooling (ImageNet). BatchNorm and ReLU
    follow the convolution unless the blocks begin with them (`activated=False`)."""
    small = image_size <= 64
    layers: list[nn.Module] = [convolution(3, width, 3) if small else convolution(3, width, 7, stride=2)]
    if activated:
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    if not small:
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
    return nn.Sequential(*layers)


def classifier(features: int, classes: int) -> nn.Sequential:
    """Global average pooling and a linear layer: (B, features, H, W) to logits (B, classes)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes))


def initialize(model: nn.Module) -> None:
    """He et al. (2015): convolutions normal with variance 2 / fan-out; BatchNorm scale 1, all shifts and biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
