"""Figures of notebook 05: merging."""

from collections.abc import Mapping

from torch import nn

from lora_course.directions import lora_by_path
from lora_course.figures.style import *


def two_ways() -> Picture:
    """What an adapted layer computes, unmerged and merged."""
    fig, axes = figure(2, height=3)
    drawn = {
        "Unmerged: three products": (
            ((2, 1.2, 3.4, PALE, "W"), (2, -0.8, 1.3, LORA, "A"), (4.1, -0.8, 1.3, LORA, "s · B")),
            ((0.9, 0.6, 2, 1.6), (0.9, 0.4, 2, -0.4), (3.3, -0.4, 4.1, -0.4),
             (5.4, 1.6, 6.4, 0.6), (5.4, -0.4, 6.4, 0.4)),
        ),
        "Merged: one": (
            ((2, 0.1, 3.4, BLUE, "W + s · B A"),),
            ((0.9, 0.5, 2, 0.5), (5.4, 0.5, 6.4, 0.5)),
        ),
    }  # fmt: skip
    for ax, (title, (boxes, arrows)) in zip(axes, drawn.items(), strict=True):
        for x, y, width, color, word in boxes:
            ink = "black" if color == PALE else "white"
            box(ax, x, y, width, 0.8, color, word, size=16, color=ink)
        for x, y, to_x, to_y in arrows:
            ax.annotate("", (to_x, to_y), (x, y), arrowprops=dict(arrowstyle="->", lw=1.6))
        for x, name in ((0.6, "x"), (6.7, "h")):
            ax.text(x, 0.5, name, size=18, ha="center", va="center")
        ax.set(title=title, xlim=(0, 7), ylim=(-1.1, 2.2))
        ax.axis("off")
    return Picture(
        fig,
        "05_two_ways",
        "The same h, from three products or from one.",
        "Two drawings. Unmerged, x goes through W, and beside it through A and B, and the two ways "
        "are added to h. Merged, x goes through a single matrix, W + s · B A.",
    )


def change_sizes(model: nn.Module) -> Picture:
    """‖ΔW‖ / ‖W‖ of every adapted layer of a model, by kind of layer, a bar each."""
    fig, ax = figure()
    ratios = {
        path: (layer.delta_weight().norm() / layer.original.weight.norm()).item()
        for path, layer in lora_by_path(model).items()
    }
    kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in ratios))
    colors, x, ticks, most = blues(len(kinds)), 0, {}, max(ratios, key=ratios.get)
    for kind, color in zip(kinds, colors, strict=True):
        mine = {path: r for path, r in ratios.items() if path.endswith(kind)}
        bars = ax.bar(range(x, x + len(mine)), list(mine.values()), 0.85, color=color)
        ax.bar_label(bars, [f"{r:.2f}" if path == most else "" for path, r in mine.items()])
        ticks[x + (len(mine) - 1) / 2] = kind
        x += len(mine) + 1
    ax.axhline(1, color=BLACK, ls=":")
    ax.text(0, 1.03, "as large as W")
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.grid(axis="x", visible=False)
    least, top = min(ratios, key=ratios.get), max(1, ratios[most]) + 0.2
    ax.set(title="The change is not small", ylabel="‖ΔW‖ / ‖W‖", ylim=(0, top))
    return Picture(
        fig,
        "05_change_sizes",
        "A bar for each adapted layer; in each group the four blocks, from the first to the last.",
        f"Bars of the size of ΔW over that of W for {len(ratios)} layers, from {ratios[least]:.2f} "
        f"({least}) to {ratios[most]:.2f} ({most}). A dotted line marks 1: as large as W.",
    )


def drift(errors: Mapping[str, Mapping[str, Numbers]]) -> Picture:
    """Relative error of W over cycles of adding and subtracting: {dtype: {adapters: errors}}."""
    fig, ax = figure()
    for (dtype, by_adapters), color in zip(errors.items(), (SKY, BLUE), strict=True):
        for (adapters, found), style in zip(by_adapters.items(), ("-", ":"), strict=True):
            cycles = range(1, len(found) + 1)
            hollow = {} if style == "-" else {"mfc": "white"}
            line(ax, cycles, found, color, f"{dtype}, {adapters}", ls=style, **hollow)
    ax.set(title="Subtracting does not bring the weight back", yscale="log")
    ax.set(xlabel="cycles of adding and subtracting", ylabel="relative error of W")
    ax.legend(loc="center right")
    told = "; ".join(
        f"{dtype}, {adapters}: {found[0]:.1g} after one cycle, {found[-1]:.1g} after {len(found)}"
        for dtype, by_adapters in errors.items()
        for adapters, found in by_adapters.items()
    )
    return Picture(
        fig,
        "05_drift",
        "The error of W after adding and subtracting, again and again. A kept copy has none.",
        f"Relative error of a weight over cycles of merging and unmerging by subtraction. {told}.",
    )


def volume(scores: Mapping[float, float]) -> Picture:
    """Names right against the volume λ of the adapter."""
    fig, ax = figure()
    line(ax, list(scores), list(scores.values()), LORA, markevery=1)
    ax.axvline(1, color=BLACK, ls=":")
    ax.text(1.02, 0.04, "as trained")
    ax.text(0.02, 0.04, "the base")
    ax.set(title="A wrong volume raises no error", xlabel="λ", ylabel="names right")
    ax.set(ylim=(-0.02, max(scores.values()) + 0.1), xlim=(-0.05, max(scores) + 0.05))
    told = ", ".join(f"{score:.2f} at {v:g}" for v, score in scores.items())
    return Picture(
        fig,
        "05_volume_knob",
        "Names right, of the first 100 unseen towns. Far from λ = 1 the names are lost.",
        f"A line: names right of 100 unseen Georgian towns against the volume λ: {told}.",
    )
