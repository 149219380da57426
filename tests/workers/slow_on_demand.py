"""A network, given to the trainer by import path, whose rank 1 trains slowly while the file of $SLOW exists."""

import os
import time

import plain_net
import torch
from torch import nn

from infomcr_dist.engines import launched_rank


class Slow(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(0.03)  # leaves the machine to others for most of the time
        if self.training and launched_rank(os.environ) == 1 and os.path.exists(os.environ["SLOW"]):
            time.sleep(0.1)
        return x


def build(classes: int, image_size: int) -> nn.Module:
    return nn.Sequential(Slow(), *plain_net.build(classes, image_size))
