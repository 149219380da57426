"""The networks and batches that checks take, and the trainer's step on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infomcr_dist.config import OptimizerSettings
from infomcr_dist.first_order import FirstOrder
from infomcr_dist.graphs import Graphs
from infomcr_dist.models import build
from infomcr_dist.optimizers import build_optimizer
from infomcr_dist.step import PenaltySettings, train_step
from infomcr_dist.world import SingleProcess

ALPHA, BETA, RHO = 1e-4, 10.0, 3e-3


@dataclass(frozen=True)
class Case:
    """A network and its batch."""

    model: str
    image_size: int
    classes: int
    batch_size: int
    sub_batch_size: int = 16

    @property
    def sub_batches(self) -> int:
        """M."""
        return self.batch_size // self.sub_batch_size

    def network(self, device: str) -> nn.Module:
        """With the same weights every time."""
        torch.manual_seed(0)
        model = build(self.model, self.classes, self.image_size)
        return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """The same every time; images (B, 3, H, W), labels (B,)."""
        random = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=random)
        labels = torch.randint(self.classes, (self.batch_size,), generator=random)
        return images.to(device, memory_format=torch.channels_last), labels.to(device)


def graphs_of(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, bf16: bool, streams: int, compiled: bool = False
) -> Graphs:
    """The steps of a network as graphs; on a CPU, the same passes without graphs."""
    device = next(model.parameters()).device
    images, labels = case.batch(str(device))
    few = 2 * case.sub_batch_size
    passes = FirstOrder(
        model, nn.CrossEntropyLoss(), images[:few], labels[:few], bf16=bf16, streams=streams, compile=compiled
    )
    return Graphs(passes, model, optimizer, SingleProcess(), None)


def step(
    case: Case,
    device: str,
    penalty: PenaltySettings | None,
    *,
    bf16: bool = True,
    streams: int | None = None,
    compiled: bool = False,
) -> Callable[[], object]:
    """The trainer's step: kernel by kernel, or by graphs on so many streams."""
    model, batch = case.network(device), case.batch(device)
    optimizer = build_optimizer(OptimizerSettings(learning_rate=1e-4), model)
    graphs = None if streams is None else graphs_of(case, model, optimizer, bf16, streams, compiled)
    criterion, world = nn.CrossEntropyLoss(), SingleProcess()

    def call() -> object:
        return train_step(
            model, criterion, optimizer, world, batch, loss_scale=1.0, penalty=penalty, bf16=bf16, graphs=graphs
        )

    if graphs is not None:
        call()  # kernel by kernel
        call()  # recorded
    return call
