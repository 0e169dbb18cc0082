"""Figures of the page that compares variants of LoRA."""

from collections.abc import Mapping, Sequence
from statistics import mean

from lora_course.figures.style import *


def _colors(names: Sequence[str]) -> dict[str, str]:
    """The colors of LoRA, the first name, and of full fine-tuning; a blue for every variant."""
    others = [name for name in names[1:] if name != "full fine-tuning"]
    blues = (shade for shade in BLUES[1:] if shade != LORA)
    return {names[0]: LORA, "full fine-tuning": FULL} | dict(zip(others, blues, strict=False))


def variants_at_rates(panels: Mapping[str, Mapping[str, Numbers]], low: float = 0.4) -> Picture:
    """Names right on unseen towns, a panel for each way to choose the rate: {panel: {method:
    seeds}}. The first method is what the others are held against; a mean below `low` is written."""
    fig, axes = figure(len(panels), height=NORMAL, recorded=True)
    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    colors = _colors(names)
    for ax, (label, methods) in zip(axes, panels.items(), strict=True):
        for name, seeds in methods.items():
            y, color = names.index(name), colors[name]
            if mean(seeds) < low:
                ax.text(low, y, f"← {mean(seeds):.3f}", va="center", size=12)
                continue
            ax.plot([min(seeds), max(seeds)], [y, y], color=color, lw=3, alpha=0.6)
            ax.plot([mean(seeds)], [y], color=color, marker=MARKS[color][0], ms=10)
        ax.axvline(mean(methods[names[0]]), color=GREY, ls=":", zorder=0)
        ax.set(title=label, xlim=(low - 0.01, 0.6), ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), names if ax is axes[0] else [""] * len(names))
    fig.supxlabel("names right, unseen towns", size=13)
    told = "; ".join(
        f"{label}: " + ", ".join(f"{name} {mean(seeds):.2f}" for name, seeds in methods.items())
        for label, methods in panels.items()
    )
    return Picture(
        fig,
        "deeper_variants",
        "A mark is the mean of five seeds, its line runs from the lowest to the highest; dotted: "
        f"LoRA's mean. The axis begins at {low:g}.",
        f"Panels with one row for each method, names right. {told}.",
    )


def variants_by_rate(rates: Numbers, scores: Mapping[str, Groups]) -> Picture:
    """Names right on unseen towns against the one rate that all share: {method: seeds by rate}."""
    fig, ax = figure(height=TALL, recorded=True)
    colors = _colors(list(scores))
    lines_with_spread(ax, rates, scores, [colors[name] for name in scores])
    ax.set(xlabel="learning rate, the same for all", ylabel="names right, unseen towns")
    ax.set(ylim=(-0.02, 0.62), title="Each has its own best rate, and its own cliff")
    fig.legend(loc="outside lower center", ncols=3)
    shared = ", ".join(f"{lr:g}" for lr in rates)
    return Picture(
        fig,
        "deeper_variants_by_rate",
        "Bands run from the lowest to the highest of five seeds.",
        f"Lines over the rates {shared}. Names right, {means_by_name(scores)}.",
    )
