"""Wide residual networks (Zagoruyko & Komodakis, BMVC 2016): WRN-28-2-B(3,3) for CIFAR and WRN-18-1.5 for ImageNet."""

from torch import Tensor, nn

from infomcr_dist.models.layers import classifier, convolution, stem
from infomcr_dist.models.resnet import assemble, basic_block, projection


class PreactivatedBlock(nn.Module):
    """B(3,3): BatchNorm, ReLU and a 3x3 convolution, twice. The shortcut is the input, or a 1x1 convolution of the
    first activation where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.residual = nn.Sequential(
            convolution(inputs, outputs, 3, stride),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            convolution(outputs, outputs, 3),
        )
        self.shortcut = None if inputs == outputs else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activation = self.activation(x)
        residual: Tensor = self.residual(activation)
        return residual + (x if self.shortcut is None else self.shortcut(activation))


def wrn_28_2(classes: int, image_size: int) -> nn.Sequential:
    """WRN-28-2-B(3,3): three stages of four pre-activated blocks, widths 32, 64, 128; 1.5 M parameters."""
    blocks: list[nn.Module] = []
    inputs = 16
    for outputs in (32, 64, 128):
        for i in range(4):
            blocks.append(PreactivatedBlock(inputs, outputs, 2 if outputs > 32 and i == 0 else 1))
            inputs = outputs
    head = nn.Sequential(nn.BatchNorm2d(128), nn.ReLU(), *classifier(128, classes))
    return assemble(stem(16, image_size, activated=False), blocks, head)


def wrn_18_1_5(classes: int, image_size: int) -> nn.Sequential:
    """WRN-18-1.5: ResNet-18 with the widths of its four stages times 1.5; 25.9 M parameters at 1000 classes."""
    blocks: list[nn.Module] = []
    inputs = 64
    for outputs in (96, 192, 384, 768):
        for i in range(2):
            stride = 2 if outputs > 96 and i == 0 else 1
            blocks.append(basic_block(inputs, outputs, stride, projection(inputs, outputs, stride)))
            inputs = outputs
    return assemble(stem(64, image_size), blocks, classifier(768, classes))
