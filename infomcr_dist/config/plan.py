"""The settings of a plan: those of the run, and for how many GPUs it is."""

from __future__ import annotations

from dataclasses import dataclass

from infomcr_dist.config import Config
from infomcr_dist.config.checks import require


@dataclass(frozen=True)
class PlanSettings(Config):
    """A run, and the machine it is planned for."""

    gpus: int = 1
    """Workers of the planned run, one a GPU; on CPUs, processes."""
    output: str | None = None
    """Writes OUTPUT.json; null: nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gpus >= 1, "gpus", "at least 1", self.gpus)
