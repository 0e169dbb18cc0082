"""Figures of notebook 02: one layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_course.figures.style import *


def nine_numbers(B: Tensor, A: Tensor) -> Picture:
    """A column B and a row A of whole numbers, and their product as a table between them."""
    fig, ax = figure(height=3.6)
    product = B @ A
    rows, columns = product.shape
    for i in range(rows):
        _cell(ax, -1.3, i, B[i, 0].item(), LORA, "white")
        for j in range(columns):
            _cell(ax, j, i, product[i, j].item(), "#EEEEEE", BLACK)
    for j in range(columns):
        _cell(ax, j, -1.3, A[0, j].item(), BLUES[0], BLACK)
    ax.text(columns + 0.3, -0.8, f"A listens: {columns} numbers in", va="center")
    ax.text(-1.6, rows / 2, f"B speaks: {rows} numbers out", va="center", ha="right")
    ax.text(columns + 0.3, rows / 2, f"B A: {rows} × {columns}", va="center")
    ax.set(xlim=(-7.2, columns + 6.2), ylim=(rows + 0.1, -1.5), aspect="equal")
    ax.set_title(f"{rows + columns} numbers make {rows * columns}")
    ax.axis("off")
    return Picture(
        fig,
        "02_nine_numbers",
        "Each entry of the table is the number at the left of its row times the one above it.",
        f"A multiplication table. Above it the row A = {tuple(A[0].tolist())}, at its left the "
        f"column B = {tuple(B[:, 0].tolist())}; inside, {rows} × {columns} products. "
        f"Its last row is {tuple(product[-1].tolist())}.",
    )


def _cell(ax, x: float, y: float, number: int, color: str, ink: str) -> None:
    box(ax, x + 0.04, y + 0.04, 0.92, 0.92, color, f"{number}".replace("-", "−"), color=ink)


def landscape(paths: Mapping[str, Sequence[tuple[float, float]]]) -> Picture:
    """The squared error (2 + B A − 5)² over the numbers A and B, and where descent leads.

    `paths`: (A, B) step by step, by name; one that never moves is drawn as a cross.
    """
    from matplotlib.patheffects import withStroke

    fig, ax = figure()
    halo, end = [withStroke(linewidth=3, foreground="white")], 2.6
    a, b = torch.meshgrid(*[torch.linspace(-end, end, 60)] * 2, indexing="xy")
    ax.contourf(a, b, (2 + a * b - 5).abs(), levels=12, cmap="Greys", alpha=0.7)
    ax.contour(a, b, a * b, levels=[3], colors=[BLACK], linewidths=2.5, linestyles="--")
    ax.text(2.5, 2.3, "B A = 3: no error", size=13, weight="bold", ha="right", path_effects=halo)
    still = {name: path[0] for name, path in paths.items() if path[0] == path[-1]}
    moving = {name: path for name, path in paths.items() if name not in still}
    for (name, path), color in zip(moving.items(), blues(len(moving) + 2)[1:], strict=False):
        xs, ys = zip(*path, strict=True)
        line(ax, xs, ys, color, markevery=1, ms=6)
        right = path[0][0] >= 0
        place = {"xytext": (12, -14) if right else (-12, 10), "ha": "left" if right else "right"}
        text = ax.annotate(name, path[0], textcoords="offset points", **place)
        text.set_path_effects(halo)
    for name, (x, y) in still.items():
        ax.plot(x, y, "X", color=BLACK, ms=13)
        text = ax.annotate(f"{name}: stays", (x, y), xytext=(12, 10), textcoords="offset points")
        text.set_path_effects(halo)
    ax.set(title="Two zeros never move" if still else "The error over A and B")
    ax.set(xlabel="A", ylabel="B", xlim=(-end, end), ylim=(-end, end))
    ax.grid(visible=False)
    ends = {name: f"A = {path[-1][0]:.2f}, B = {path[-1][1]:.2f}" for name, path in paths.items()}
    told = "; ".join(f"from {name} to {place}" for name, place in ends.items())
    return Picture(
        fig,
        "02_landscape",
        "The darker, the larger the error. The valley is dashed; each track begins at its label.",
        "A map of the error over A and B. A dashed valley, where B A = 3 without error, runs "
        "through two opposite corners; between them lies a saddle at (0, 0). "
        f"Tracks of descent lead {told}.".replace("-", "−"),
    )


def growing_strengths(history: Sequence[Tensor], true: Numbers) -> Picture:
    """Singular values of B A before every step of training, a line each; dotted, those to be
    found. `history`: the values, largest first."""
    fig, ax = figure()
    found, last = len(true), len(history) - 1
    ax.hlines(true, 0, last, color=GREY, ls=":", lw=1.6)
    for k, color in enumerate(reversed(blues(found))):
        ys = [values[k].item() for values in history]
        line(ax, range(last + 1), ys, color)
        ax.text(last * 1.015, ys[-1], f"{ys[-1]:.2f}", va="center")
    rest = [values[found:].max().item() for values in history]
    line(ax, range(last + 1), rest, BLACK)
    ax.text(last * 1.015, rest[-1], f"the other {len(history[0]) - found}", va="center")
    ax.set(title="The strongest direction is learned first", xlabel="step", ylabel="strength σ")
    ax.set(ylim=(-0.2, max(true) + 0.4), xlim=(0, last * 1.2))
    ends = ", ".join(f"{value:.2f}" for value in history[-1][:found].tolist())
    return Picture(
        fig,
        "02_growing_strengths",
        "The singular values of B A in training. Dotted: the strengths of the teacher's change.",
        f"Lines over {last} steps of training: the singular values of B A rise from near zero one "
        f"after another, the largest first, and end at {ends}; dotted lines stand at "
        f"{', '.join(f'{s:g}' for s in true)}. The largest of the others ends at {rest[-1]:.2f}.",
    )
