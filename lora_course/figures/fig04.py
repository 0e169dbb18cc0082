"""Figures of notebook 04: training."""

from collections.abc import Mapping, Sequence
from statistics import mean

from lora_course.figures.style import *


def sequence(latin: str, target: str) -> Picture:
    """One training sequence as boxes; blue are the tokens that the loss counts."""
    fig, ax = figure(height=1.7)
    tokens = ["BOS", *latin, "SEP", *target, "EOS"]
    first = len(latin) + 2
    for x, token in enumerate(tokens):
        color, ink = (LORA, "white") if x >= first else (PALE, "black")
        box(ax, x, 0, 0.92, 1, color, token, color=ink, size=12 if len(token) > 1 else 17)
    ax.text(0, 1.35, "the model reads this", size=13)
    ax.text(first, 1.35, "and learns to write this", color=LORA, size=13)
    ax.set(xlim=(-0.1, len(tokens)), ylim=(-0.1, 1.9))
    ax.axis("off")
    return Picture(
        fig,
        "04_sequence",
        "BOS begins, SEP says “now in the other script”, EOS ends. The loss counts the blue part.",
        f"A row of boxes: BOS, the letters of {latin}, SEP, the letters of {target}, EOS. Those up "
        "to SEP are grey and only read; those behind SEP are blue, and the loss counts them alone.",
    )


TOP = 8  # of the axis of losses


def clinic(runs: Mapping[str, dict]) -> Picture:
    """Losses of the healthy run and of each broken one, in a panel of its own; the healthy run
    stands dashed behind every other."""
    fig, axes = figure(columns=3, rows=-(-len(runs) // 3), height=TALL)
    for ax, (name, run) in zip(axes.flat, runs.items(), strict=True):
        ax.plot(runs["healthy"]["losses"], color=GREY, ls="--")
        ax.plot(run["losses"], color=LORA)
        title = name if name == "healthy" else f"run {name}"
        ax.set(title=title, ylim=(0, TOP), xlabel="step", ylabel="loss")
        ax.label_outer()
    high = [name for name, run in runs.items() if max(run["losses"]) > TOP]
    gone = f" Out of the frame for a while: {', '.join(high)}." if high else ""
    ends = ", ".join(f"{n} {r['losses'][0]:.1f} to {r['losses'][-1]:.1f}" for n, r in runs.items())
    return Picture(
        fig,
        "04_clinic",
        f"Dashed: the healthy run, behind each of the others.{gone}",
        f"Small panels of loss over {len(run['losses'])} steps, one a run, the healthy run dashed "
        f"behind each. From the first step to the last: {ends}.",
    )


def comparison(curves: Mapping[str, Numbers], ranks: Mapping[int, tuple], full: tuple) -> Picture:
    """The lesson's three panels: learning curves, score against parameters, parameter counts.

    `curves`: losses of live runs by name (LoRA, full fine-tuning); `ranks`: rank → (trainable
    parameters, names right of every seed); `full`: the same for full fine-tuning.
    """
    fig, (curve, score, count) = figure(3)
    title = "LoRA comes near full fine-tuning with a fraction of its parameters"
    fig.suptitle(title, x=0.02, ha="left", weight="bold")
    for (name, losses), color in zip(curves.items(), (LORA, FULL), strict=True):
        smooth = [mean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
        line(curve, range(1, len(losses) + 1), smooth, color, name)
    curve.set(title="Loss, live", xlabel="step", ylim=(0, None))
    curve.legend()
    sizes = [trainable for trainable, _ in ranks.values()]
    line_with_spread(score, sizes, [s for _, s in ranks.values()], LORA)
    star(score, full[0], mean(full[1]), FULL)
    score.text(full[0], mean(full[1]) - 0.06, "full", color=FULL, ha="center")
    score.set_xscale("log")
    score.set(title="Names right", xlabel="trainable parameters", ylim=(0, 0.65))
    score.set(xlim=(sizes[0] / 1.6, full[0] * 2.2))
    counts = {f"r={rank}": n for rank, (n, _) in ranks.items()} | {"full": full[0]}
    colors = [LORA] * len(sizes) + [FULL]
    bars_from_the_top(count, counts, colors, [f"{n:,}" for n in counts.values()])
    count.set(title="Trainable parameters", xlim=(0, 1.7 * full[0]))
    mark_recorded(score)
    told = ", ".join(f"{mean(s):.2f} at r = {r}" for r, (_, s) in ranks.items())
    fell = "; ".join(f"{name} {y[0]:.1f} to {mean(y[-10:]):.1f}" for name, y in curves.items())
    return Picture(
        fig,
        "lora_comparison",
        "The star is full fine-tuning. The bars are drawn to scale.",
        f"Three panels. Losses of the live runs, from the first step to the last: {fell}. Names "
        f"right against trainable parameters: LoRA {told}; full fine-tuning {mean(full[1]):.2f}. "
        f"Bars: from {sizes[0]:,} at r = {min(ranks)} to {full[0]:,} for full fine-tuning.",
    )


def rates(scores: Mapping[str, Mapping[float, Numbers]], best: Mapping[str, float]) -> Picture:
    """Names right against the learning rate, for LoRA and full fine-tuning: {rate: seeds} each;
    a star at the rate that was chosen on validation."""
    fig, ax = figure(recorded=True)
    for (name, by_rate), color in zip(scores.items(), (LORA, FULL), strict=True):
        line_with_spread(ax, list(by_rate), list(by_rate.values()), color, name)
        star(ax, best[name], mean(by_rate[best[name]]), color)
    ticks = sorted({rate for by_rate in scores.values() for rate in by_rate})
    log_ticks(ax, ticks)
    ax.set(title="LoRA wants a higher learning rate", xlabel="learning rate", ylabel="names right")
    ax.set(ylim=(0.4, 0.6))
    ax.legend(loc="lower right")
    told = "; ".join(f"{name} is best at {rate:g}" for name, rate in best.items())
    return Picture(
        fig,
        "04_rates",
        "Stars: the best rate on towns kept apart for this choice. Bands: five seeds.",
        f"Two lines over the learning rate, which rises and falls for each method: {told}.",
    )


def trained_or_cut(ranks: Sequence[int], cut: Groups, trained: Mapping[int, Numbers]) -> Picture:
    """Names right of LoRA trained at rank r, {rank: seeds}, and of full fine-tuning whose every ΔW
    is cut to rank r, one group of seeds a rank."""
    fig, ax = figure(recorded=True)
    xs = range(len(ranks))
    shown = [i for i in xs if ranks[i] in trained]
    line_with_spread(ax, shown, [trained[ranks[i]] for i in shown], LORA, "trained at rank r")
    line_with_spread(ax, xs, cut, FULL, "all weights trained, then cut to rank r")
    eight = ranks.index(8)
    up, down = mean(trained[8]), mean(cut[eight])
    style = dict(size=17, weight="bold", va="center")
    ax.text(eight - 0.12, up + 0.05, f"{up:.2f}", color=LORA, ha="right", **style)
    ax.text(eight + 0.15, down - 0.01, f"{down:.2f}", color=FULL, **style)
    ax.plot([eight, eight], [down, up], color=BLACK, ls=":")
    ax.set_title("Eight directions nearly suffice, if you train at eight")
    ax.set_xticks(xs, map(str, ranks))
    ax.set(xlabel="rank r (of 128)", ylabel="names right, unseen towns", ylim=(-0.03, 0.65))
    ax.legend(loc="lower right")
    return Picture(
        fig,
        "lora_trained_or_cut",
        "The same rank, two ways to get there.",
        f"Two lines over the rank. LoRA trained at rank 8 writes {up:.2f} of unseen names right; "
        f"full fine-tuning cut to rank 8 afterwards {down:.2f}. From rank 32 on five seeds cannot "
        "tell them apart.",
    )


def methods(scores: Mapping[str, float]) -> Picture:
    """Names right by method, in the order full fine-tuning, LoRA, context table, from
    scratch."""
    fig, ax = figure(height=3, recorded=True)
    colors = (FULL, LORA, CONTEXT_TABLE, SCRATCH)
    ends = [f"{score:.0%}" for score in scores.values()]
    bars_from_the_top(ax, scores, colors, ends, thick=0.7, padding=4, fontsize=16)
    ax.set_title("LoRA comes close to full fine-tuning, and stays behind it")
    ax.set(xlabel="names right on unseen towns, mean of six scripts", xlim=(0, 0.52))
    told = ", ".join(f"{name} {score:.0%}" for name, score in scores.items())
    return Picture(
        fig,
        "04_methods",
        "Five seeds in each of six scripts, 500 steps each; counting takes one look at the pairs.",
        f"Bars of the share of unseen towns that is written right, mean of six scripts: {told}.",
    )
