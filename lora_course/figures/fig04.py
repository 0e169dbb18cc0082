"""Figures of notebook 04: training."""

from collections.abc import Mapping, Sequence
from statistics import mean

from lora_course.figures.style import (
    CONTEXT_TABLE,
    FULL,
    GREY,
    HEAD,
    LETTER_TABLE,
    LORA,
    MARKS,
    SCRATCH,
    SCRATCH_LONG,
    TALL,
    bars_with_spread,
    figure,
    line,
    line_with_spread,
    mark_recorded,
)


def comparison(curves: Mapping[str, Sequence[float]], ranks: Mapping[int, tuple], full: tuple):
    """The lesson's three panels: learning curves, score against parameters, parameter counts.

    `curves`: losses of live runs by name (LoRA, full fine-tuning, from scratch); `ranks`: rank →
    (trainable parameters, exact match of every seed); `full`: the same for full fine-tuning.
    """
    fig, (curve, score, count) = figure(3)
    colors = (LORA, FULL, SCRATCH)[: len(curves)]
    for (name, losses), color in zip(curves.items(), colors, strict=True):
        smooth = [mean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
        line(curve, range(1, len(losses) + 1), smooth, color, name)
    curve.set(title="Loss (live)", xlabel="step", ylabel="nats", ylim=(0, None))
    curve.legend()
    sizes = [trainable for trainable, _ in ranks.values()]
    line_with_spread(score, sizes, [s for _, s in ranks.values()], LORA, "LoRA, by rank")
    line(score, [full[0]], [mean(full[1])], FULL, "full fine-tuning", ls="", ms=13)
    score.set_xscale("log")
    score.set(title="Exact match", xlabel="trainable parameters", ylim=(0, 0.62))
    score.legend(loc="lower right")
    names, counts = [f"r={rank}" for rank in ranks] + ["full"], [*sizes, full[0]]
    bars = count.barh(names, counts, color=[LORA] * len(sizes) + [FULL])
    bars[-1].set_hatch(MARKS[FULL][1])
    count.bar_label(bars, [f"{n:,}" for n in counts], padding=3, fontsize=12)
    count.set(title="Trainable parameters", xlim=(0, 1.6 * full[0]), xticks=[])
    count.invert_yaxis()
    mark_recorded(score)
    return fig


def methods_by_script(scores: Mapping[str, Sequence[Sequence[float]]], scripts: Sequence[str]):
    """Exact match on unseen towns: a block for every script, a bar for every method."""
    fig, ax = figure(height=TALL)
    colors = (LORA, FULL, SCRATCH, SCRATCH_LONG, HEAD, CONTEXT_TABLE, LETTER_TABLE)
    labels = [script.capitalize() for script in scripts]
    bars_with_spread(ax, labels, scores, colors[: len(scores)])
    ax.set(ylabel="exact match, unseen towns", ylim=(0, 0.6))
    ax.set_title("At r = 8 LoRA comes close to full fine-tuning, and stays behind it")
    fig.legend(loc="outside lower center", ncols=3)
    mark_recorded(ax)
    return fig


def scores_by_pairs(pairs: Sequence[int], scores: Mapping[str, Sequence[Sequence[float]]]):
    """Exact match against the number of training pairs (log axis), a line for every method."""
    fig, ax = figure()
    colors = (LORA, FULL, SCRATCH, CONTEXT_TABLE)
    for (name, groups), color in zip(scores.items(), colors, strict=True):
        line_with_spread(ax, pairs, groups, color, name)
    ax.set_xscale("log")
    ax.set_xticks(pairs, [f"{n:,}" for n in pairs])
    ax.minorticks_off()
    ax.set(xlabel="Georgian pairs to learn from", ylabel="exact match, unseen towns", ylim=(0, 0.6))
    ax.set_title("With few pairs, starting from the base counts most")
    ax.legend(loc="upper left")
    mark_recorded(ax)
    return fig


def clinic(runs: Mapping[str, dict]):
    """Losses of the healthy run and of each broken one, in a panel of its own; the healthy run
    stands dashed behind every other."""
    fig, axes = figure(columns=3, rows=-(-len(runs) // 3), height=TALL)
    for ax, (name, run) in zip(axes.flat, runs.items(), strict=True):
        ax.plot(runs["healthy"]["losses"], color=GREY, ls="--")
        ax.plot(run["losses"], color=LORA)
        title = name if name == "healthy" else f"run {name}"
        ax.set(title=title, ylim=(0, 8), xlabel="step", ylabel="loss, nats")
        ax.label_outer()
    return fig
