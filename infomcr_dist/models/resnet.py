"""Residual networks (He et al., CVPR 2016): ResNet-20 for CIFAR and ResNet-50 for ImageNet."""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist.models.layers import classifier, convolution, initialize, stem


class PaddedShortcut(nn.Module):
    """Option A: subsample by the stride and pad new channels with zeros, without parameters."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.padding, self.stride = (0, 0, 0, 0, added // 2, added - added // 2), stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Option B: the identity where the shape stays, else a 1x1 convolution with BatchNorm."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """ReLU(residual(x) + shortcut(x))."""

    def __init__(self, residual: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.residual, self.shortcut = residual, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def basic_block(inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> Block:
    """Two 3x3 convolutions, with BatchNorm after each."""
    residual = nn.Sequential(
        convolution(inputs, outputs, 3, stride),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        convolution(outputs, outputs, 3),
        nn.BatchNorm2d(outputs),
    )
    return Block(residual, shortcut)


def bottleneck_block(inputs: int, width: int, stride: int) -> Block:
    """1x1, 3x3 and 1x1 convolutions to 4 * width channels; the stride is that of the 3x3 (as in most implementations
    since; the paper has it in the first 1x1)."""
    residual = nn.Sequential(
        convolution(inputs, width, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        convolution(width, width, 3, stride),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        convolution(width, 4 * width, 1),
        nn.BatchNorm2d(4 * width),
    )
    return Block(residual, projection(inputs, 4 * width, stride))


def assemble(stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> nn.Sequential:
    """Images (B, 3, H, W) to logits (B, classes), with He's initialisation."""
    model = nn.Sequential(OrderedDict(stem=stem, blocks=nn.Sequential(*blocks), head=head))
    initialize(model)
    return model


def resnet20(classes: int, image_size: int) -> nn.Sequential:
    """ResNet-20: three stages of three basic blocks, widths 16, 32, 64, shortcuts of option A; 0.27 M parameters."""
    blocks: list[nn.Module] = []
    inputs = 16
    for outputs in (16, 32, 64):
        for _ in range(3):
            stride = 1 if inputs == outputs else 2
            shortcut = nn.Identity() if inputs == outputs else PaddedShortcut(outputs - inputs, stride)
            blocks.append(basic_block(inputs, outputs, stride, shortcut))
            inputs = outputs
    return assemble(stem(16, image_size), blocks, classifier(64, classes))


def resnet50(classes: int, image_size: int) -> nn.Sequential:
    """ResNet-50: bottleneck blocks, 3, 4, 6 and 3 to a stage; 25.6 M parameters at 1000 classes."""
    blocks: list[nn.Module] = []
    inputs = 64
    for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for i in range(count):
            blocks.append(bottleneck_block(inputs, width, 2 if width > 64 and i == 0 else 1))
            inputs = 4 * width
    return assemble(stem(64, image_size), blocks, classifier(2048, classes))
