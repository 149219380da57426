"""Residual networks (He et al., CVPR 2016): ResNet-20 for CIFAR."""

from torch import Tensor, nn
from torch.nn import functional as F

from infomcr_dist.models.layers import convolution, initialize, stem


class PaddedShortcut(nn.Module):
    """Option A: subsample by the stride and pad new channels with zeros, without parameters."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.padding, self.stride = (0, 0, 0, 0, added // 2, added - added // 2), stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, BatchNorm after each, and the given shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = convolution(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = convolution(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, blocks, global average pooling and a linear classifier: (B, 3, H, W) to logits (B, classes)."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], features: int, classes: int) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.Sequential(*blocks)
        self.classifier = nn.Linear(features, classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(images)).mean(dim=(2, 3)))
        return logits


def resnet20(classes: int, image_size: int) -> ResNet:
    """ResNet-20: three stages of three basic blocks, widths 16, 32, 64, shortcuts of option A; 0.27 M parameters."""
    blocks: list[nn.Module] = []
    inputs = 16
    for outputs in (16, 32, 64):
        for _ in range(3):
            stride = 1 if inputs == outputs else 2
            shortcut = nn.Identity() if inputs == outputs else PaddedShortcut(outputs - inputs, stride)
            blocks.append(BasicBlock(inputs, outputs, stride, shortcut))
            inputs = outputs
    return ResNet(stem(16, image_size), blocks, 64, classes)
