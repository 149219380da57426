"""Densely connected networks (Huang et al., CVPR 2017): DenseNet-BC with growth rate 12 and depth 100."""

import torch
from torch import Tensor, nn

from infomcr_dist.models.layers import classifier, convolution, stem
from infomcr_dist.models.resnet import assemble


class DenseLayer(nn.Module):
    """Appends `growth` channels to its input: convolutions 1x1 to 4 * growth and 3x3, each after BatchNorm and ReLU."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.added = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            convolution(inputs, 4 * growth, 1),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            convolution(4 * growth, growth, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.added(x)], dim=1)


def densenet_100_12(classes: int, image_size: int) -> nn.Sequential:
    """DenseNet-BC, k = 12, depth 100: three blocks of 16 layers, channels halved between them; 0.77 M parameters."""
    growth, width = 12, 24
    blocks: list[nn.Module] = []
    for block in range(3):
        if block:
            blocks += [nn.BatchNorm2d(width), nn.ReLU(), convolution(width, width // 2, 1), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(16):
            blocks.append(DenseLayer(width, growth))
            width += growth
    head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), *classifier(width, classes))
    return assemble(stem(24, image_size, activated=False), blocks, head)
