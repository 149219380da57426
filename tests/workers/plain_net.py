"""Networks given to the trainer by import path. Without BatchNorm, a batch may be split at will."""

import time

from torch import Tensor, nn


def build(classes: int, image_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def build_with_norm(classes: int, image_size: int) -> nn.Module:
    """With the buffers of BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def build_large(classes: int, image_size: int) -> nn.Module:
    """50,000 weights for images of 16 × 16, in steps as short as those of `build`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, 64), nn.SiLU(), nn.Linear(64, classes))


class Pause(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            time.sleep(0.08)
        return images


def build_slow(classes: int, image_size: int) -> nn.Module:
    """The same numbers, in steps of a length that a test can strike within."""
    return nn.Sequential(Pause(), *build(classes, image_size))
