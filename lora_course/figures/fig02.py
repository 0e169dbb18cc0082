"""Figures of notebook 02: one layer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_course.figures.style import (
    BLACK,
    GREY,
    RED,
    TALL,
    Picture,
    blues,
    figure,
    line,
)


def landscape(paths: Mapping[str, Sequence[tuple[float, float]]]) -> Picture:
    """The squared error (2 + B A − 5)² over the numbers A and B, and where descent leads.

    `paths`: (A, B) step by step, by name; one that never moves is drawn as a cross.
    """
    fig, ax = figure(height=TALL)
    a, b = torch.meshgrid(
        torch.linspace(-2.6, 2.6, 200), torch.linspace(-2.6, 2.6, 200), indexing="xy"
    )
    error = (2 + a * b - 5).square()
    ax.contourf(a, b, error.sqrt(), levels=12, cmap="Greys", alpha=0.75)
    ax.contour(a, b, a * b, levels=[3], colors=[RED], linewidths=2.5, linestyles="--")
    ax.text(1.1, 2.25, "B A = 3: no error", color=RED, size=13, weight="bold", ha="right")
    moving = {name: p for name, p in paths.items() if p[0] != p[-1]}
    for (name, path), color in zip(moving.items(), blues(len(moving)), strict=True):
        xs, ys = zip(*path, strict=True)
        line(ax, xs, ys, color, name, markevery=1, ms=6)
    for name in paths.keys() - moving.keys():
        ax.plot(*paths[name][0], "X", color=BLACK, ms=13, label=name, ls="")
    ax.set(title="Two zeros never move", xlabel="A", ylabel="B", xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
    ax.grid(visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    ends = "; ".join(
        f"{n} ends at A = {p[-1][0]:.2f}, B = {p[-1][1]:.2f}" for n, p in paths.items()
    )
    return Picture(
        fig,
        "02_landscape",
        "Dark is wrong. Every start but (0, 0) slides into the valley.",
        "A map of the error over A and B. A dashed valley, where B A = 3 without error, runs "
        f"through two corners; between them lies a saddle at (0, 0). Paths of descent: {ends}.",
    )


def growing_strengths(history: Sequence[Tensor], true: Sequence[float], every: int) -> Picture:
    """Singular values of B A while it is trained, one line each; dashed, those to be found.

    `history`: the values, largest first, every so many steps.
    """
    fig, ax = figure()
    steps = [every * k for k in range(len(history))]
    for strength in true:
        ax.hlines(strength, 0, steps[-1], color=GREY, ls=":", lw=1.6)
    strongest = [values[: len(true)] for values in history]
    for k, color in enumerate(reversed(blues(len(true)))):
        ys = [values[k].item() for values in strongest]
        line(ax, steps, ys, color)
        ax.text(steps[-1] * 1.01, ys[-1], f"{ys[-1]:.2f}", va="center")
    rest = [values[len(true) :].max().item() for values in history]
    line(ax, steps, rest, BLACK)
    ax.text(steps[-1] * 1.01, rest[-1], "the other four", va="center")
    ax.set(title="The strongest direction is learned first", xlabel="step", ylabel="strength σ")
    ax.set(ylim=(-0.2, max(true) + 0.4), xlim=(0, steps[-1] * 1.16))
    found = ", ".join(f"{values:.2f}" for values in strongest[-1].tolist())
    return Picture(
        fig,
        "02_growing_strengths",
        "Dotted: the strengths that are there to be found.",
        f"Lines over {steps[-1]} steps of training: the singular values of B A rise from zero one "
        f"after another, the largest first, and end at {found}; the dotted lines stand at "
        f"{', '.join(f'{s:g}' for s in true)}. The other four of rank 8 stay at zero.",
    )
