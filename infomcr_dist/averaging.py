"""An average of the weights beside the weights: what it is, and when weights enter it."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from infomcr_dist.config import AveragingSettings


class AveragedWeights(AveragedModel):
    """A copy of a network whose weights are an average; its buffers are those of the network when it last entered.

    Args:
        model: the network.
        settings: of a kind other than none.
    """

    def __init__(self, model: nn.Module, settings: AveragingSettings) -> None:
        ema = settings.kind == "ema"
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(settings.decay) if ema else get_swa_multi_avg_fn())
        self._enters: Literal["step", "epoch"] = "step" if ema else "epoch"
        self._start_epoch = settings.start_epoch

    def after(self, what: Literal["step", "epoch"], epoch: int, model: nn.Module) -> None:
        """Take in the weights after a step of an epoch (0, 1, …), or after its last one, where they are to enter."""
        if what == self._enters and epoch >= self._start_epoch:
            self.update_parameters(model)

    @property
    def begun(self) -> bool:
        """Whether any weights have entered."""
        return bool(self.n_averaged > 0)
