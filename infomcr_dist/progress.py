"""What the console shows of a run: a progress bar, lines above it, and the final table."""

from __future__ import annotations

import statistics
import sys
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from infomcr_dist.config import RegularizerSettings
from infomcr_dist.curvature import Estimate
from infomcr_dist.evaluate import Errors
from infomcr_dist.records import Phase, StepRecord
from infomcr_dist.schedules import TimeFraction


class Progress:
    """The bar of rank 0 and the lines above it; on other ranks, and before `begin`, it shows nothing."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, total_steps: int, done_steps: int) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=total_steps,
            initial=done_steps,
            file=sys.stdout,
            ncols=120,
            mininterval=1.0,
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )

    def step(self, record: StepRecord) -> None:
        """Advance the bar by one update."""
        if self._bar is None:
            return
        penalty = "" if record.penalty is None else f", penalty {record.penalty:.2e}"
        speed = record.global_samples / record.step_duration_seconds
        self._bar.set_postfix_str(
            f"loss {record.loss:.3f}, rate {record.learning_rate:.3g}{penalty}, {speed:.0f} images/s", refresh=False
        )
        self._bar.update()

    def message(self, text: str) -> None:
        """Print lines above the bar."""
        if self._bar is not None:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()


@dataclass
class Durations:
    """Seconds of all steps of a run, by phase."""

    seconds: dict[Phase, array[float]] = field(default_factory=lambda: {"plain": array("d"), "regularized": array("d")})

    def add(self, phase: Phase, seconds: float) -> None:
        """Count a step."""
        self.seconds[phase].append(seconds)

    def count(self, phase: Phase) -> int:
        """Steps of a phase so far."""
        return len(self.seconds[phase])

    def median(self, phase: Phase) -> float | None:
        """Median seconds of a phase's steps; None where there was none."""
        return statistics.median(self.seconds[phase]) if self.seconds[phase] else None


def regularizer_line(settings: RegularizerSettings, epoch: int, rate: float, sub_batches: int, size: int) -> str:
    """Announces the switch-on of the regularizer."""
    infomcr = settings.method == "infomcr"
    length = f"α {settings.alpha:g}" if infomcr else f"ρ {settings.rho:g}"
    return (
        f"regularizer on in epoch {epoch}, at rate {rate:.3g}: {'' if infomcr else f'{settings.method}, '}"
        f"{settings.estimator}, {length}, β {settings.weight:g}, {sub_batches} sub-batches of {size} images a worker"
    )


def overhead_line(plain: float, regularized: float) -> str:
    """Compares the median seconds of a plain and of a regularized step."""
    return (
        f"a regularized step takes {regularized / plain:.2f} × a plain one "
        f"({regularized * 1e3:.0f} ms against {plain * 1e3:.0f} ms, medians)"
    )


def epoch_line(
    epoch: int,
    epochs: int,
    loss: float,
    test: Errors | None,
    train: Errors | None,
    gamma_hat: Estimate | None,
    metric_time: TimeFraction,
) -> str:
    """What an epoch reached; errors and metric where they were taken."""
    line = f"epoch {epoch}/{epochs}: training loss {loss:.4f}"
    for split, errors in (("test", test), ("train", train)):
        if errors is not None:
            line += f", {split} error {errors.top1_error_ratio:.2%}"
    if gamma_hat is not None:
        fraction = metric_time.spent / (time.perf_counter() - metric_time.began)
        line += f", γ̂ {plus_minus(gamma_hat)} (took {metric_time.last:.1f} s, {fraction:.1%} of the time so far)"
    return line


def average_line(test: Errors | None, train: Errors | None, gamma_hat: Estimate | None) -> str:
    """What the averaged weights reached."""
    parts = [
        f"{split} error {errors.top1_error_ratio:.2%}"
        for split, errors in (("test", test), ("train", train))
        if errors is not None
    ]
    return "averaged weights: " + ", ".join([*parts, *([] if gamma_hat is None else [f"γ̂ {plus_minus(gamma_hat)}"])])


def summary(
    directory: Path, test: Errors, train: Errors, gamma_hat: Estimate | None, samples: int, durations: Durations
) -> str:
    """The table at the end of a run; ``samples``: training images a trial of the metric."""
    rows = ["", f"{'error':<24}{'test':>10}{'train':>10}{'gap':>10}"]
    for name in ("top1_error_ratio", "top5_error_ratio"):
        a, b = getattr(test, name), getattr(train, name)
        rows.append(f"{name[:3]}-{name[3]:<20}{a:>10.2%}{b:>10.2%}{a - b:>+10.2%}")
    rows.append(f"{'loss':<24}{test.loss:>10.4f}{train.loss:>10.4f}{test.loss - train.loss:>+10.4f}")
    if gamma_hat is not None:
        note = f"   (ln|ξ|, Eq. 6; {gamma_hat.trials} trials of {samples} training images)"
        if gamma_hat.singular:
            note += f"   {gamma_hat.singular} of {gamma_hat.trials} Gram matrices are not positive definite, excluded"
        rows.append(f"{'metric γ̂':<24}{plus_minus(gamma_hat):>10}{note}")
    plain, regularized = durations.median("plain"), durations.median("regularized")
    for name, seconds in durations.seconds.items():
        if seconds:
            median = statistics.median(seconds)
            rows.append(f"{name + ' step, median':<24}{median * 1e3:>7.1f} ms   ({len(seconds)} steps)")
    if plain and regularized:
        rows.append(f"{'regularized / plain':<24}{regularized / plain:>10.2f}")
    rows += [
        "",
        f"run directory {directory}/",
        "  config.yaml     the settings of this run",
        "  records.jsonl   a record a step, an epoch, an evaluation",
        f"  checkpoints/    to resume from: resume={directory} epochs=…",
    ]
    return "\n".join(rows)


def plus_minus(gamma_hat: Estimate) -> str:
    """Mean ± standard error."""
    if gamma_hat.singular == gamma_hat.trials:
        return "not measurable"
    return f"{gamma_hat.mean:.1f} ± {gamma_hat.standard_error:.1f}"
