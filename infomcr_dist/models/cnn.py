"""A plain network of convolutions: All-CNN-C (Springenberg et al., ICLR 2015 workshop).

Jia & Su describe their plain CNN in an appendix that is not at hand; this is the best known one of its size and error.
"""

from torch import nn

from infomcr_dist.models.layers import initialize


def cnn(classes: int, image_size: int) -> nn.Sequential:
    """All-CNN-C: nine convolutions with ReLU, the last two 1x1, and dropout, without BatchNorm; 1.37 M parameters at 10
    classes. Above 64 pixels the first convolution is 7x7 with stride 4."""
    first = nn.Conv2d(3, 96, 3, padding=1) if image_size <= 64 else nn.Conv2d(3, 96, 7, stride=4, padding=3)
    layers: list[nn.Module] = [nn.Dropout(0.2), first, nn.ReLU()]
    for inputs, outputs, kernel, stride in (
        (96, 96, 3, 1),
        (96, 96, 3, 2),
        (96, 192, 3, 1),
        (192, 192, 3, 1),
        (192, 192, 3, 2),
        (192, 192, 3, 1),
        (192, 192, 1, 1),
        (192, classes, 1, 1),
    ):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2), nn.ReLU()]
        if stride == 2:
            layers.append(nn.Dropout(0.5))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    initialize(model)
    return model
