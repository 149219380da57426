"""Draws the figures of docs/experiments.md from the numbers of their runs, in docs/runs; trains nothing.

python docs/figures/studies.py
"""

import csv
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from infomcr_dist.study.results import Results, draw_bars, draw_differences, draw_metrics

DOCS = Path(__file__).parent.parent


def read(name: str) -> Results:
    """The numbers of a study's runs.csv."""
    with (DOCS / "runs" / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    fields = list(rows[0])
    axes = {axis: list(dict.fromkeys(row[axis] for row in rows)) for axis in fields[: fields.index("seed")]}
    columns = fields[fields.index("state") + 1 :]
    values = np.array([[float(row[column] or math.nan) for column in columns] for row in rows])
    return Results(axes, columns, values.reshape(math.prod(map(len, axes.values())), -1, len(columns)))


def save(figure: Figure, name: str) -> None:
    """Write a figure, as a study does."""
    figure.savefig(DOCS / f"{name}.png", dpi=120)


def main() -> None:
    """Draw all figures whose runs are there."""
    columns = ["test_error", "gap", "gamma_hat"]
    for name, title in (
        ("table_1", "Table 1: test error with and without the regularizer"),
        ("batch_norm", "The penalty, and BatchNorm over sub-batches alone (beta-0)"),
    ):
        save(draw_differences(read(name), columns, "training", title, "test"), name)
    save(draw_metrics(read("scenario_3"), "Scenario III: batch size", "test"), "scenario_3")
    columns = ["plain_step", "regularized_step", "step_ratio"]
    time = read("time")
    save(draw_bars(time, columns, "Sec. 7.2.1, scaled: time of a step", "test"), "time")


if __name__ == "__main__":
    main()
