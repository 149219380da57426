"""The numbers of a run that a study's table may show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """How a table shows a number: its title, the factor that gives its unit, the format of its digits."""

    title: str
    factor: float = 1.0
    format: str = ".2f"


COLUMNS = {
    "test_error": Column("test error, %", 100),
    "test_top5_error": Column("test top-5 error, %", 100),
    "test_loss": Column("test loss", format=".4f"),
    "train_error": Column("train error, %", 100),
    "train_top5_error": Column("train top-5 error, %", 100),
    "train_loss": Column("train loss", format=".5f"),
    "gap": Column("gap, %", 100),
    "top5_gap": Column("top-5 gap, %", 100),
    "gamma_hat": Column("γ̂", format=".1f"),
    "frobenius": Column("Frobenius norm", format=".3g"),
    "spectral_radius": Column("spectral radius", format=".3g"),
    "trace": Column("Fisher trace", format=".3g"),
    "robustness": Column("robustness", format=".3g"),
    "penalty_share": Column("β‖g − h‖ / ‖g‖", format=".3f"),
    "plain_step": Column("plain step, ms", 1e3, ".1f"),
    "regularized_step": Column("regularized step, ms", 1e3, ".1f"),
    "step_ratio": Column("regularized / plain"),
}
METRICS = ("gamma_hat", "frobenius", "spectral_radius", "robustness")
"""The four of Figures 2-4."""
MEASURED = (*METRICS, "trace", "penalty_share")
"""Columns that come from a measurement; the others are in a run's records."""
