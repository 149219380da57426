"""The settings of what a run does beside its steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from infomcr_dist.config.checks import require


@dataclass(frozen=True)
class EvaluationSettings:
    """Top-1 and top-5 error on the test images and on the un-augmented training images."""

    every_epochs: int = 1
    """Epochs between evaluations on the test images; 0: only at the end."""
    train_every_epochs: int = 0
    """Epochs between evaluations on the training images; 0: only at the end."""
    transform: Literal["none", "center_crop"] = "none"
    """Input of evaluation and metric: the whole image, or its central 7/8, resized to data.image_size."""
    batch_size: int = 250
    """Images per batch of a worker."""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "train_every_epochs"):
            require(getattr(self, name) >= 0, f"evaluation.{name}", "at least 0", getattr(self, name))
        require(self.batch_size >= 1, "evaluation.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class MetricSettings:
    """The metric γ̂ (Jia & Su 2020, Eq. 6), on un-augmented training images."""

    every_epochs: int | None = None
    """Epochs between estimates; 0: only at the end; null: as often as max_time_fraction allows."""
    max_time_fraction: float = 0.02
    """Largest fraction of the run's time spent on estimates before the end, where every_epochs is null."""
    trials: int = 100
    """Trials averaged (T); 0: no metric."""
    samples: int = 100
    """Training images per trial (N')."""
    images: int = 10_000
    """Size of the pool of training images, drawn once, that the trials draw from."""

    def __post_init__(self) -> None:
        every = self.every_epochs
        require(every is None or every >= 0, "metric.every_epochs", "at least 0, or null", every)
        fraction = self.max_time_fraction
        require(0 < fraction < 1, "metric.max_time_fraction", "between 0 and 1", fraction)
        require(self.trials >= 0, "metric.trials", "at least 0", self.trials)
        require(self.samples >= 2, "metric.samples", "at least 2", self.samples)
        require(self.images >= self.samples, "metric.images", "at least metric.samples", self.images)


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints of a run, in addition to that of the step at which it is stopped."""

    every_epochs: int = 1
    """Epochs between checkpoints; the last epoch is always saved."""
    every_steps: int | None = None
    """Steps between checkpoints within an epoch; null: none."""
    keep: int = 2
    """Number of newest checkpoints kept; the one with the lowest error on the evaluated images is kept as well."""

    def __post_init__(self) -> None:
        require(self.every_epochs >= 1, "checkpoint.every_epochs", "at least 1", self.every_epochs)
        steps = self.every_steps
        require(steps is None or steps >= 1, "checkpoint.every_steps", "at least 1, or null", steps)
        require(self.keep >= 1, "checkpoint.keep", "at least 1", self.keep)


@dataclass(frozen=True)
class TelemetrySettings:
    """Where metrics go."""

    port: int | None = 9500
    """Port of the Prometheus endpoint of local rank 0; each further one takes the next. null: no endpoint."""
    address: str = "127.0.0.1"
    """Address that the endpoint binds to; 0.0.0.0 lets other machines scrape it."""
    pushgateway: str | None = None
    """HOST:PORT of a Pushgateway to which rank 0 pushes its metrics when the run ends; null: none."""
    logger: Literal["tensorboard", "mlflow", "wandb"] | None = None
    """What rank 0 logs the numbers of its records with; each is an extra of the package. null: nothing."""

    def __post_init__(self) -> None:
        valid = self.port is None or 1 <= self.port <= 65535
        require(valid, "telemetry.port", "between 1 and 65535, or null", self.port)
        if self.pushgateway is not None and not re.fullmatch(r"([\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}", self.pushgateway):
            raise ValueError("telemetry.pushgateway must be HOST:PORT, without a scheme, a user or a password")


@dataclass(frozen=True)
class ProfileSettings:
    """A profile of some steps, by torch's profiler."""

    steps: tuple[int, ...] | None = None
    """Two numbers of updates: rank 0 profiles the steps from when the first is done until the second is, and writes
    trace.json and operators.txt into the run's directory. null: none."""

    def __post_init__(self) -> None:
        valid = self.steps is None or (len(self.steps) == 2 and 0 <= self.steps[0] < self.steps[1])
        require(valid, "profile.steps", "two increasing numbers, at least 0, or null", self.steps and list(self.steps))
