"""The learning rate over a run, and when and how strongly the regularizer acts.

Progress is measured in epochs, as a real number: 2.5 is the middle of the third epoch.
"""

from __future__ import annotations

import math
from typing import Any

from infomcr_dist.config import RegularizerSettings, ScheduleSettings

_STEP_DROP = 0.9
"""A rate below this share of the step before's has dropped at once: a milestone, or a plateau."""
_SLOW_DROP = 0.5
"""A rate at this share of its peak has dropped, however slowly: cosine."""


class LearningRate:
    """The learning rate at any progress; all that is not a function of progress is the count of plateau drops."""

    def __init__(self, settings: ScheduleSettings, peak: float, epochs: int, steps_per_epoch: int) -> None:
        self.settings, self.peak, self.epochs = settings, peak, epochs
        self.steps_per_epoch = steps_per_epoch
        self._drops = 0
        self._best_loss = math.inf
        self._stale_epochs = 0

    def at(self, progress: float) -> float:
        """The rate of the step that begins at this progress."""
        s = self.settings
        if progress < s.warmup_epochs:
            return self.peak * min(1.0, (progress + 1 / self.steps_per_epoch) / s.warmup_epochs)
        if s.kind == "milestones":
            return self.peak * s.factor ** sum(progress >= m for m in s.milestones)
        if s.kind == "cosine":
            done = (progress - s.warmup_epochs) / (self.epochs - s.warmup_epochs)
            return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.peak * s.factor**self._drops

    def end_epoch(self, epoch: int, training_loss: float) -> None:
        """Give a plateau schedule an epoch's mean training loss; after ``patience`` epochs without a loss lower by the
        relative ``threshold`` the rate drops, and the count begins again. Epochs of the warm-up do not count."""
        if self.settings.kind != "plateau" or epoch < self.settings.warmup_epochs:
            return
        if training_loss < self._best_loss * (1 - self.settings.threshold):
            self._best_loss, self._stale_epochs = training_loss, 0
        else:
            self._stale_epochs += 1
        if self._stale_epochs >= self.settings.patience:
            self._drops, self._stale_epochs = self._drops + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"drops": self._drops, "best_loss": self._best_loss, "stale_epochs": self._stale_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drops, self._best_loss = state["drops"], state["best_loss"]
        self._stale_epochs = state["stale_epochs"]


class TimeFraction:
    """Whether something occasional may happen now, so that it takes at most a fraction of the time, in seconds."""

    def __init__(self, fraction: float, began: float) -> None:
        self.fraction, self.began = fraction, began
        self.spent = 0.0
        self.last: float | None = None

    def allows(self, now: float, guess: float) -> bool:
        """Whether one more fits; it is expected to take what the last took, or ``guess`` before the first."""
        return self.spent + (guess if self.last is None else self.last) <= self.fraction * (now - self.began)

    def add(self, seconds: float) -> None:
        """One happened and took so long."""
        self.last = seconds
        self.spent += seconds


class PenaltyWeight:
    """β over the run: None before the regularizer is on, then a ramp to its value.

    With ``after_drop`` it is switched on at the first drop of the learning rate after the warm-up, whichever schedule
    made it: at once where the rate falls by a tenth or more from one step to the next, and at half the peak where it
    falls gradually. It stays on.
    """

    def __init__(self, settings: RegularizerSettings, warmup_epochs: float) -> None:
        self.settings, self.warmup_epochs = settings, warmup_epochs
        self.on_since: float | None = None
        self._peak_rate = 0.0
        self._last_rate = 0.0

    def at(self, progress: float, rate: float) -> float | None:
        """β for the step at this progress and rate; call it for every step, in order."""
        if self.on_since is None and self._switches_on(progress, rate):
            self.on_since = progress
        self._peak_rate, self._last_rate = max(self._peak_rate, rate), rate
        if self.on_since is None:
            return None
        s = self.settings
        if progress - self.on_since >= s.ramp_epochs:
            return s.weight
        done = (progress - self.on_since) / s.ramp_epochs
        if s.ramp == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        elif s.ramp == "steps":
            done = (math.floor(done * s.ramp_steps) + 1) / (s.ramp_steps + 1)
        return s.weight * done

    def _switches_on(self, progress: float, rate: float) -> bool:
        if self.settings.when == "after_drop":
            dropped = rate < _STEP_DROP * self._last_rate or rate <= _SLOW_DROP * self._peak_rate
            return progress > self.warmup_epochs and dropped
        if self.settings.when == "from_epoch":
            assert self.settings.epoch is not None
            return progress >= self.settings.epoch
        return self.settings.when == "always"

    def state_dict(self) -> dict[str, Any]:
        return {"on_since": self.on_since, "peak_rate": self._peak_rate, "last_rate": self._last_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.on_since, self._peak_rate = state["on_since"], state["peak_rate"]
        self._last_rate = state["last_rate"]
