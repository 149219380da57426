"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016): WRN-18-1.5 for ImageNet."""

from torch import nn

from infomcr_dist.models.layers import convolution, stem
from infomcr_dist.models.resnet import BasicBlock, ResNet


def wrn_18_1_5(classes: int, image_size: int) -> ResNet:
    """WRN-18-1.5: ResNet-18 with the widths of its four stages times 1.5; 25.9 M parameters at 1000 classes."""
    blocks: list[nn.Module] = []
    inputs = 64
    for stage, outputs in enumerate((96, 192, 384, 768)):
        for i in range(2):
            stride = 2 if stage and not i else 1
            shortcut = (
                nn.Identity()
                if inputs == outputs
                else nn.Sequential(convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
            )
            blocks.append(BasicBlock(inputs, outputs, stride, shortcut))
            inputs = outputs
    return ResNet(stem(64, image_size), blocks, 768, classes)
