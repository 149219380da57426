"""Draws idea.png, the figure of the README: sub-batches, their gradients, and where the penalty leads.

    python docs/figures/idea.py

Nothing is sketched: the gradients, the probing steps and both paths are computed on a small landscape.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito: distinct for every kind of colour vision
DARK, GREY, RED = "#222222", "#767676", "#D55E00"
SHARP, FLAT = np.array([-1.05, 0.15]), np.array([1.25, -0.1])
WIDTHS = (0.42, 1.15)
SHIFTS = 0.3 * np.array([[1.0, 0.25], [-0.2, 1.0], [-1.0, -0.3], [0.2, -0.95]])
"""The loss of a sub-batch is the landscape, shifted: that is where their gradients come to differ."""
START, ALPHA, BETA, RATE, STEPS = np.array([-0.6, 1.0]), 0.1, 15.0, 0.02, 900

Path2D = np.ndarray


def loss(w: np.ndarray) -> np.ndarray:
    """A sharp valley and a flat one of nearly equal depth; w (..., 2)."""
    valleys = zip((SHARP, FLAT), WIDTHS, (1.0, 0.97), strict=True)
    return 1.02 - sum(depth * np.exp(-((w - c) ** 2).sum(-1) / (2 * s**2)) for c, s, depth in valleys)


def gradient(w: np.ndarray) -> np.ndarray:
    """Its gradient at w (2,)."""
    h = 1e-5
    return np.array([(loss(w + h * e) - loss(w - h * e)) / (2 * h) for e in np.eye(2)])


def step(w: np.ndarray, beta: float) -> np.ndarray:
    """The mean of the sub-batches' gradients, and β times the mean of g - h (Algorithm 1)."""
    g = np.array([gradient(w - shift) for shift in SHIFTS])
    h = np.array([gradient(w - ALPHA * g_i - shift) for g_i, shift in zip(g, SHIFTS, strict=True)])
    return (g + beta * (g - h)).mean(0)


def descend(beta: float) -> Path2D:
    """Gradient descent from START, (STEPS + 1, 2)."""
    path = [START]
    for _ in range(STEPS):
        path.append(path[-1] - RATE * step(path[-1], beta))
    return np.array(path)


def contours(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    """The landscape, averaged over the sub-batches."""
    grid = np.stack(np.meshgrid(np.linspace(*x, 90), np.linspace(*y, 60)), axis=-1)
    mean = np.mean([loss(grid - shift) for shift in SHIFTS], axis=0)
    levels = np.linspace(mean.min(), mean.max(), 11)
    axes.contourf(*np.moveaxis(grid, -1, 0), mean, levels=levels, cmap="Greys", alpha=0.2)
    axes.contour(*np.moveaxis(grid, -1, 0), mean, levels=levels, colors="#9a9a9a", linewidths=0.5)
    axes.set(xlim=x, ylim=y, xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_visible(False)


def arrow(axes: Axes, start: np.ndarray, end: np.ndarray, color: str, width: float = 2.4) -> None:
    """An arrow from point to point."""
    style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 15}
    axes.annotate("", end, start, arrowprops=style)


def draw_batch(axes: Axes) -> None:
    """A worker's batch, cut into sub-batches."""
    axes.set(xlim=(0, 9.9), ylim=(0.4, 7.4), aspect="equal")
    axes.axis("off")
    shades = np.random.default_rng(3).uniform(0.35, 1.0, 16)
    for i in range(4):
        x = 0.35 + 2.4 * i
        for k in range(4):
            box = (x + 1.0 * (k % 2), 5.0 - 1.0 * (k // 2))
            axes.add_patch(Rectangle(box, 0.86, 0.86, facecolor=COLORS[i], alpha=float(shades[4 * i + k])))
        frame = FancyBboxPatch((x - 0.08, 3.92), 2.02, 2.02, boxstyle="round,pad=0.06", fill=False, edgecolor=COLORS[i])
        axes.add_patch(frame)
        axes.text(x + 0.93, 6.35, f"$B_{i + 1}$", ha="center", fontsize=15, color=COLORS[i])
        arrow(axes, np.array([x + 0.93, 3.55]), np.array([x + 0.93, 2.35]), COLORS[i], 1.8)
        axes.text(x + 0.93, 1.35, f"$g_{i + 1}$", ha="center", fontsize=15, color=COLORS[i])


def draw_gradients(axes: Axes) -> None:
    """The gradients of the sub-batches at a point near the sharp minimum and at one near the flat minimum."""
    contours(axes, (-2.0, 2.6), (-1.5, 1.75))
    for w, name in ((SHARP + np.array((0.02, 0.06)), "sharp"), (FLAT + np.array((0.1, 0.1)), "flat")):
        for shift, color in zip(SHIFTS, COLORS, strict=True):
            arrow(axes, w, w - 0.55 * gradient(w - shift), color)
        axes.plot(*w, "o", color=DARK, markersize=5)
        axes.text(w[0], -1.2, name, ha="center", fontsize=13, color=DARK)


def draw_paths(axes: Axes) -> None:
    """Gradient descent with and without the penalty, from one start."""
    contours(axes, (-2.0, 2.6), (-1.5, 1.75))
    for beta, color, label, place in (
        (0.0, GREY, "plain", SHARP + np.array((-0.02, -0.62))),
        (BETA, RED, "regularized", FLAT + np.array((0.05, -0.5))),
    ):
        path = descend(beta)
        axes.plot(*path.T, color=color, linewidth=2.6)
        arrow(axes, path[-60], path[-1], color, 2.6)
        axes.plot(*path[-1], "o", color=color, markersize=7)
        axes.text(*place, label, ha="center", fontsize=13, color=color, weight="bold")
    axes.plot(*START, "o", color=DARK, markersize=5)
    axes.text(START[0] + 0.14, START[1] + 0.14, "$w$ at the first rate drop", fontsize=12, color=DARK)


def draw() -> Figure:
    """All three panels."""
    figure = Figure(figsize=(13, 4.05), facecolor="white", layout="constrained")
    panels = (
        (draw_batch, "1  The gradients of a batch's parts …"),
        (draw_gradients, "2  … diverge in a sharp minimum"),
        (draw_paths, "3  Penalized, SGD finds a flat one"),
    )
    for axes, (panel, title) in zip(figure.subplots(1, 3), panels, strict=True):
        panel(axes)
        axes.set_title(title, fontsize=15, color=DARK, loc="left")
    step = r"$\nabla L(B) + \beta\;\frac{1}{M}\sum_i\,(g_i - h_i)$,   $h_i$ the gradient of $B_i$ at $w - \alpha g_i$"
    figure.supxlabel(f"one regularized step:  {step}", fontsize=15, color=DARK)
    return figure


if __name__ == "__main__":
    mpl.rcParams["mathtext.fontset"] = "cm"
    draw().savefig(Path(__file__).with_name("idea.png"), dpi=120, pil_kwargs={"optimize": True})
