"""Draws architecture.png: what a batch passes on its way, and the modules that do it.

python docs/figures/architecture.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

DARK, GREY = "#222222", "#5c5c5c"
DATA, MATHS, OUTSIDE = ("#D7E9F7", "#0072B2"), ("#FBE3CF", "#D55E00"), ("#DDF1EA", "#007A5A")
"""Fill and edge: data, mathematics, the world outside"""
STAGES = (
    ("shards", "pipelines.format\npipelines.prepare", "WebDataset tars,\nindexed and hashed", DATA),
    ("pipeline", "pipelines.sampler\npipelines.loaders", "exact order; decode,\ncrop, flip", DATA),
    (
        "train step",
        "infomcr_dist.step\ninfomcr_dist.regularizer",
        "penalty first, backward last;\n$\\nabla[L + \\beta R]$",
        MATHS,
    ),
    ("one allreduce", "infomcr_dist.world\ninfomcr_dist.engines", "overlapped with\nthe backward", OUTSIDE),
    ("metrics", "infomcr_dist.records\ninfomcr_dist.telemetry", "console, JSON lines,\nPrometheus", OUTSIDE),
)
ASIDE = (
    (2, "functional, gram, curvature", "pure functions of tensors:\nγ̂, Fisher, the bound", MATHS),
    (3, "checkpoint, signals, watchdog", "saved, stopped and\nresumed at any step", OUTSIDE),
    (4, "report, study, doctor", "what reads the records,\nand what checks a job", OUTSIDE),
)
WIDTH, STRIDE = 3.5, 4.0


def box(axes: Axes, x: float, y: float, height: float, colors: tuple[str, str]) -> None:
    """A rounded box."""
    fill, edge = colors
    shape = FancyBboxPatch(
        (x, y), WIDTH, height, boxstyle="round,pad=0,rounding_size=0.15", facecolor=fill, edgecolor=edge, linewidth=1.8
    )
    axes.add_patch(shape)


def draw() -> Figure:
    """The row of stages, and what stands beside them."""
    figure = Figure(figsize=(13, 3.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.25, 4 * STRIDE + WIDTH + 0.25), ylim=(-0.15, 5.75))
    axes.axis("off")
    middle = WIDTH / 2
    for i, (name, modules, text, colors) in enumerate(STAGES):
        x = i * STRIDE
        box(axes, x, 2.6, 3.0, colors)
        axes.text(x + middle, 5.1, name, ha="center", va="center", fontsize=16, weight="bold", color=DARK)
        axes.text(x + middle, 4.28, text, ha="center", va="center", fontsize=11, color=DARK)
        axes.text(x + middle, 3.2, modules, ha="center", va="center", fontsize=9.5, family="monospace", color=GREY)
        if i:
            arrow = {"arrowstyle": "-|>", "color": DARK, "linewidth": 2.2, "mutation_scale": 18}
            axes.annotate("", (x - 0.03, 4.1), (x - STRIDE + WIDTH + 0.03, 4.1), arrowprops=arrow)
    for i, modules, text, colors in ASIDE:
        x = i * STRIDE
        box(axes, x, 0.1, 1.7, colors)
        axes.text(x + middle, 1.2, text, ha="center", va="center", fontsize=11, color=DARK)
        axes.text(x + middle, 0.45, modules, ha="center", va="center", fontsize=8.5, family="monospace", color=GREY)
        axes.plot([x + middle] * 2, [1.83, 2.57], color=GREY, linewidth=1.4, linestyle=":")
    axes.text(0, 1.35, "A batch enters on the left and never turns back.", fontsize=13, color=DARK)
    legend = (("data", DATA), ("mathematics: pure functions", MATHS), ("the world outside: one module each", OUTSIDE))
    for i, (text, (_, edge)) in enumerate(legend):
        axes.text(0, 0.85 - 0.38 * i, "■", fontsize=12, color=edge, va="center")
        axes.text(0.32, 0.85 - 0.38 * i, text, fontsize=11, color=DARK, va="center")
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("architecture.png"), dpi=120, pil_kwargs={"optimize": True})
