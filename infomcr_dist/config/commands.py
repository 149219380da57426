"""The settings of the commands that do not train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from infomcr_dist.config.checks import require


@dataclass(frozen=True)
class MeasureSettings:
    """How checkpoints are measured, and on what."""

    data: str | None = None
    """Data set directory; null: that of each model's training."""
    model: str | None = None
    """Import path package.module:function of a network that is not ours; no code is imported on a checkpoint's word."""
    weights: Literal["current", "averaged"] = "current"
    """averaged: the run's average, with the statistics of BatchNorm that it was last evaluated with."""
    trials: int = 100
    """Trials averaged (T)."""
    samples: int = 100
    """Training images per trial (N')."""
    images: int = 10_000
    """Size of the pool of training images that the trials draw from, and over which robustness is averaged."""
    logit_scale: float | None = None
    """Scale each image's logits to logits / (‖logits‖₂ · logit_scale) first, to compare models of unequal training loss
    (Table 3; 0.04 there); null: no scaling."""
    log_volume: float | None = None
    """ln V of the neighbourhood in Theorem 1; null: that of a ball whose radius is a hundredth of the weights' norm."""
    delta: float = 0.05
    """Theorem 1 holds with probability 1 − delta."""
    seed: int = 0
    """Seed of the trials."""
    batch_size: int = 250
    """Images per batch of a worker."""
    engine: Literal["auto", "horovod", "torch"] = "auto"
    """Whose workers these are: Horovod's (horovodrun) or torch.distributed's (torchrun); auto: by the environment."""
    threads: int | None = None
    """CPU threads a worker computes with; null: OMP_NUM_THREADS, else its share of the cores that may be used."""
    output: str = "measure"
    """Writes OUTPUT.json and OUTPUT.png."""

    def __post_init__(self) -> None:
        for name in ("trials", "samples", "images", "batch_size"):
            if getattr(self, name) < (2 if name == "samples" else 1):
                raise ValueError(f"{name} must be at least {2 if name == 'samples' else 1}, got {getattr(self, name)}")
        require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
        if self.images < self.samples:
            raise ValueError(f"images must be at least samples, got {self.images} and {self.samples}")


@dataclass(frozen=True)
class ReportSettings:
    """Where a report is written."""

    output: str = "report"
    """Writes OUTPUT.html and OUTPUT.png."""


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and where to."""

    model: str | None = None
    """Import path package.module:function of a network that is not ours; no code is imported on a checkpoint's word."""
    weights: Literal["current", "averaged"] = "current"
    """averaged: the run's average, with the statistics of BatchNorm that it was last evaluated with."""
    output: str = "model"
    """Writes OUTPUT.safetensors and OUTPUT.onnx."""


@dataclass(frozen=True)
class PredictSettings:
    """How images are classified, and where the classes are written."""

    model: str | None = None
    """Import path package.module:function of a network that is not ours; no code is imported on a checkpoint's word."""
    weights: Literal["current", "averaged"] = "current"
    """averaged: the run's average, with the statistics of BatchNorm that it was last evaluated with."""
    csv: str | None = None
    """Writes a table to this file, a row an image; null: prints a line an image."""
    threads: int | None = None
    """CPU threads to compute with; null: OMP_NUM_THREADS, else the cores that may be used."""

    def __post_init__(self) -> None:
        require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)
