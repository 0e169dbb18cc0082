"""Figures of the page on batch size, run length and capacity."""

from collections.abc import Mapping, Sequence

from lora_course.figures.style import *

SHADES = [BLUES[k] for k in (0, 2, 3, 6)]  # of four ranks, with markers unlike full's
COLORS = {"LoRA r=64": BLUES[5], "LoRA r=8": LORA, "full": FULL}
Scores = Mapping[str, Numbers]  # "method, value" → the score of each seed


def bits_against(
    name: str, panels: Sequence[tuple[str, str, Sequence[int], Scores]], caption: str
) -> Picture:
    """Bits on unseen towns, a line for each method: (title, what the x-axis is, its values, the
    bits) a panel."""
    fig, axes = figure(len(panels), recorded=True)
    axes = [axes] if len(panels) == 1 else axes
    told = []
    for ax, (title, label, xs, bits) in zip(axes, panels, strict=True):
        groups = {method: [list(bits[f"{method}, {x}"]) for x in xs] for method in COLORS}
        lines_with_spread(ax, xs, groups, COLORS.values(), base=2)
        over = f"{label} {', '.join(map(str, xs))}"
        told += [f"{title}, {method}, {over}: {means(mine)}" for method, mine in groups.items()]
        ax.set(title=title, xlabel=label, ylim=(0, 3.2))
    axes[0].set_ylabel("bits per character, unseen towns")
    axes[0].legend(loc="upper left" if len(panels) == 1 else "upper right")
    return Picture(fig, name, caption, f"Lines of bits. {'; '.join(told)}.")


def best_rates(
    steps: Sequence[int], rates: Mapping[str, Sequence[tuple[float, float, float]]]
) -> Picture:
    """The best learning rate against the number of steps, on logarithmic axes: {method: [(next
    lower, best, next higher rate that was tried) of each number]}."""
    fig, ax = figure(height=TALL, recorded=True)
    for k, (method, tried) in enumerate(rates.items()):
        xs = [n * 1.05 ** (k - 1) for n in steps]  # side by side, where they coincide
        below, best, above = zip(*tried, strict=True)
        line(ax, xs, best, COLORS[method], method)
        ax.vlines(xs, below, above, color=COLORS[method], alpha=0.4, lw=5)
    ax.set_yscale("log")
    log_ticks(ax, steps)
    shown = sorted({rate for tried in rates.values() for three in tried for rate in three})
    ax.set_yticks(shown, [f"{rate:g}" for rate in shown])
    ax.set(title="The rate that is best", xlabel="steps of 64 pairs", ylabel="learning rate")
    fig.legend(loc="outside lower center", ncols=len(rates))
    told = "; ".join(
        f"{method}: {', '.join(f'{best:g}' for _, best, _ in tried)}"
        for method, tried in rates.items()
    )
    return Picture(
        fig,
        "deeper_best_rates",
        "A bar reaches to the next rates that were tried: the true best lies somewhere in it.",
        f"Best learning rates in runs of {', '.join(map(str, steps))} steps, {told}.",
    )


def capacity(pairs: Mapping[str, int], unseen: Scores, learned: Mapping[str, Numbers]) -> Picture:
    """Against the number of pairs ({how a level names it: number}), a line for each rank and one
    for all weights: bits on unseen towns, and {label: loss on each number of pairs themselves}."""
    fig, (left, right) = figure(2, height=TALL, recorded=True)
    counts, told = list(pairs.values()), []
    for (label, losses), color in zip(learned.items(), (*SHADES, FULL), strict=True):
        groups = [list(unseen[f"{label}, {n}"]) for n in pairs]
        line_with_spread(left, counts, groups, color, label)
        line(right, counts, losses, color)
        kept = ", ".join(f"{loss:.2f}" for loss in losses)
        told.append(f"{label}: unseen {means(groups)}, learned {kept}")
    for ax, title, what in (
        (left, "Unseen towns", "bits per character"),
        (right, "The pairs themselves", "loss at the end of training"),
    ):
        log_ticks(ax, counts, form="{:,}")
        ax.set(title=title, xlabel="Georgian pairs to learn from", ylabel=what, ylim=(0, None))
    fig.legend(loc="outside lower center", ncols=len(learned))
    return Picture(
        fig,
        "deeper_capacity",
        "Left, what carries over to other towns; right, what is kept of the pairs.",
        f"Two panels of lines over {', '.join(f'{n:,}' for n in counts)} pairs. {'; '.join(told)}.",
    )
