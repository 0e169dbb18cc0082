"""Figures of the pages in going_deeper."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_course.figures.style import *

# What is timed (lora_course.experiments.timing); every LoRA is a blue.
TIMED = {
    "lora_lib": LORA,
    "PEFT": BLUES[1],
    "PEFT without casts": BLUES[0],
    "loralib": BLUES[6],
    "full": FULL,
    "frozen": GREY,
}


def step_times(
    panels: Mapping[str, Mapping[str, Numbers]],
    widths: Sequence[int],
    decoder: Mapping[str, tuple[float, float]],
) -> Picture:
    """Step times over full fine-tuning's, against the width: `panels` gives {method: ratios} by
    title. And the step of a large decoder, {method: (milliseconds, GB at the peak)}, as bars.
    """
    fig, axes = figure(len(panels), rows=2, height=2 * NORMAL)
    for ax in axes[1]:
        ax.remove()
    wide = fig.add_subplot(axes[1, 0].get_gridspec()[1, :])
    for ax, (title, ratios) in zip(axes[0], panels.items(), strict=True):
        for name, values in ratios.items():
            order = 3 if name == "lora_lib" else 2  # where lines coincide, the course's own is seen
            line(ax, widths, values, TIMED[name], name, zorder=order)
        ax.axhline(1, color=FULL, ls="--", label="full")
        ax.axhline(2 / 3, color=BLACK, ls=":", label="2/3 of full: the floor in FLOPs")
        log_ticks(ax, widths, base=2)
        ax.set(title=title, xlabel="width of the layers", ylim=(0, None))
        mark_recorded(ax)
    axes[0, 0].set_ylabel("step time, full = 1")
    times = {name: ms for name, (ms, _) in decoder.items()}
    ends = [f"{ms:.0f} ms, {gb:.0f} GB" for ms, gb in decoder.values()]
    bars_from_the_top(wide, times, [TIMED[name] for name in times], ends)
    wide.set(title="A step of a decoder, 4096 wide, on the GPU")
    wide.set_xlim(0, 1.2 * max(times.values()))
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    mark_recorded(wide)
    widest = widths.index(max(widths))
    told = ", ".join(
        f"{list(ratios['lora_lib'])[widest]:.2f} in the panel {title}"
        for title, ratios in panels.items()
    )
    bars = ", ".join(f"{name} {ms:.0f} ms" for name, ms in times.items())
    return Picture(
        fig,
        "deeper_step_times",
        "Below the dashed line LoRA's step is shorter than full fine-tuning's. GB: memory at its "
        "peak.",
        "Lines: step time over full fine-tuning's against the width. At the smallest each LoRA is "
        f"slower than training everything; at the largest width lora_lib is at {told}. "
        f"Bars: one step of a decoder 4096 wide on the GPU: {bars}.",
    )


# --- methods, script by script and by the number of pairs ----------------------------------------


def methods_by_script(scores: Mapping[str, Groups], scripts: Sequence[str]) -> Picture:
    """Names right on unseen towns: a block for every script, a bar for every method."""
    fig, ax = figure(height=TALL, recorded=True)
    colors = (LORA, FULL, SCRATCH, SCRATCH_LONG, HEAD, CONTEXT_TABLE, LETTER_TABLE)
    labels = [script.capitalize() for script in scripts]
    bars_with_spread(ax, labels, scores, colors[: len(scores)])
    ax.set(ylabel="names right, unseen towns", ylim=(0, 0.6))
    ax.set_title("At r = 8 LoRA comes close to full fine-tuning, and stays behind it")
    fig.legend(loc="outside lower center", ncols=3)
    return Picture(
        fig,
        "deeper_methods_by_script",
        "A line on a bar runs from the lowest to the highest of five seeds.",
        f"Blocks of bars, one for each of {', '.join(labels)}; in this order, "
        f"{means_by_name(scores)}.",
    )


def scores_by_pairs(pairs: Sequence[int], scores: Mapping[str, Groups]) -> Picture:
    """Names right against the number of training pairs (log axis), a line for every method."""
    fig, ax = figure(recorded=True)
    lines_with_spread(ax, pairs, scores, (LORA, FULL, SCRATCH, CONTEXT_TABLE), form="{:,}")
    ax.set(xlabel="Georgian pairs to learn from", ylabel="names right, unseen towns", ylim=(0, 0.6))
    ax.set_title("With few pairs, starting from the base counts most")
    ax.legend(loc="upper left")
    counts = ", ".join(f"{n:,}" for n in pairs)
    return Picture(
        fig,
        "deeper_few_pairs",
        "Bands run from the lowest to the highest of five seeds.",
        f"Lines over {counts} pairs. Names right, {means_by_name(scores)}.",
    )


# --- what full fine-tuning changes, what is forgotten --------------------------------------------


def k90_by_matrix(changes: Mapping[str, Mapping[tuple[str, int], float]], noise: float) -> Picture:
    """k90 of the change of each attention matrix: {training: {(matrix, layer): k90}}."""
    fig, ax = figure(height=TALL, recorded=True)
    for (name, means), color in zip(changes.items(), (FULL, SKY, BLACK, GREY), strict=True):
        labels = [f"{matrix}\n{layer}" for matrix, layer in means]
        line(ax, labels, list(means.values()), color, name, ls="", markevery=1)
    ax.axhline(noise, ls=":", color=BLACK, label="noise")
    ax.axhline(8, ls="--", color=GREY, label="rank 8")
    ax.set(ylabel="k90 of ΔW (of 128)", xlabel="matrix, layer", ylim=(0, 72))
    ax.set_title("Between rank 8 and noise, in each matrix")
    fig.legend(loc="outside lower center", ncols=3)
    told = "; ".join(
        f"{name} from {min(m.values()):.0f} to {max(m.values()):.0f}" for name, m in changes.items()
    )
    return Picture(
        fig,
        "deeper_k90",
        "Four trainings, sixteen matrices: all between the two lines.",
        f"Points of k90 for {len(labels)} attention matrices: {told}; noise at {noise:.0f}, rank 8 "
        "below.",
    )


def forgetting(looks, skills: Sequence[str], settings: Sequence[str], target: float) -> Picture:
    """Bits of each old skill against the bits of the new one while training (see
    `lora_course.experiments.forgetting`); a line a seed."""
    fig, axes = figure(len(skills), height=TALL, recorded=True)
    colors = dict(zip(settings, (LORA, BLUES[6], FULL), strict=True))
    tracks = looks[looks.rate.eq("chosen")].groupby(["seed", "setting"], sort=False)
    for ax, skill in zip(axes, skills, strict=True):
        for (seed, name), track in tracks:
            label = name if seed == 0 else ""
            line(ax, track.learned, track[skill], colors[name], label, lw=1.4, ms=5)
        ax.axvline(target, ls=":", color=BLACK, label="compared here")
        ax.set(title=skill, xlabel="Georgian bits (better →)", xlim=(2.5, 0.3), ylim=(0, 15))
    axes[0].set_ylabel("bits of the old skill (↑ forgotten)")
    axes[-1].legend(loc="upper left")
    return Picture(
        fig,
        "deeper_forgetting",
        "From left to right Georgian is learned. Of the three skills, names alone suffer least.",
        f"Panels for {', '.join(skills)}: bits of the old skill against Georgian bits in training, "
        "a line for each of five seeds. In all of them LoRA of rank 8 lies highest, LoRA of rank "
        "64 and full fine-tuning lower and close together.",
    )


def intruders(chance: Mapping[int, Tensor], adapter: Tensor) -> Picture:
    """Largest cosines with a singular vector of W: of random vectors by width, and of the ten
    strongest of an adapted weight."""
    fig, ax = figure()
    bins, limit = torch.linspace(0, 1, 41).tolist(), 0.3
    narrow, wide = min(chance), max(chance)
    ax.hist(chance[narrow].tolist(), bins, density=True, color=GREY, alpha=0.6,
            label=f"random vectors, width {narrow}")  # fmt: skip
    ax.hist(chance[wide].tolist(), bins, density=True, histtype="step", lw=2, color=BLACK,
            label=f"random vectors, width {wide}")  # fmt: skip
    ax.hist(adapter.tolist(), bins, density=True, histtype="step", lw=2, color=LORA,
            label="ten strongest of W + ΔW, the adapter")  # fmt: skip
    ax.axvline(limit, color=BLACK, ls="--", label=f"ε = {limit}")
    ax.set(xlabel="largest |cosine| with a singular vector of W", ylabel="density", ylim=(0, 15))
    ax.set_title(f"At width {narrow}, chance itself reaches the limit")
    ax.legend(loc="upper right")
    return Picture(
        fig,
        "deeper_intruders",
        "A limit that was made for a wide model says little in a narrow one.",
        f"Histograms of the largest cosine with a singular vector of W. At width {narrow} random "
        f"vectors lie just below the limit {limit}, mean {chance[narrow].mean():.2f}; at width "
        f"{wide} far below it, mean {chance[wide].mean():.2f}. The adapter's spread widely.",
    )


# --- the paper at our scale ----------------------------------------------------------------------


def rank_and_width(lines: Sequence[tuple[str, str, int, Sequence[int], Numbers]]) -> Picture:
    """Score over the best rank's, against r and against r / d: (where, targets, d, ranks, scores)
    a line."""
    fig, axes = figure(2, recorded=True)
    targets = list(dict.fromkeys(name for _, name, *_ in lines))
    colors = dict(zip(targets, blues(len(targets)), strict=True))
    for where, name, d, ranks, scores in lines:
        share = [score / max(scores) for score in scores]
        dash = "-" if where == "here" else "--"
        line(axes[0], ranks, share, colors[name], f"{where}: {name}", ls=dash)
        line(axes[1], [r / d for r in ranks], share, colors[name], ls=dash)
    titles = ("By rank", "rank r"), ("By share of the width", "rank over width, r / d")
    log_ticks(axes[0], ranks)
    axes[1].set_xscale("log")
    for ax, (title, label) in zip(axes, titles, strict=True):
        ax.set(title=title, xlabel=label, ylabel="score over the best rank's", ylim=(0, 1.05))
    axes[0].legend(loc="lower right")
    told = "; ".join(f"{w}, {n}: {s[0] / max(s):.2f} at r = {r[0]}" for w, n, _, r, s in lines)
    return Picture(
        fig,
        "deeper_rank_and_width",
        "GPT-3's lines are flat, ours are steep, although our ranks are the larger shares.",
        f"Score against rank, each line as a share of its best, by r and by r / d. At the lowest "
        f"rank: {told}. By r / d, GPT-3's whole table lies to the left of ours.",
    )


def subspaces(panels: Mapping[str, Mapping[str, tuple]], width: int) -> Picture:
    """φ(i, i) against i, a panel for A and one for B: {pair of runs: (sizes, seeds of each)}."""
    fig, axes = figure(2, height=TALL, recorded=True)
    for ax, (side, pairs) in zip(axes, panels.items(), strict=True):
        colors = (LORA, BLUES[6], BLUES[1], BLUES[0])
        for (pair, (sizes, groups)), color in zip(pairs.items(), colors, strict=False):
            line_with_spread(ax, sizes, groups, color, pair)
        longest = max((sizes for sizes, _ in pairs.values()), key=len)
        ax.plot(longest, [i / width for i in longest], ls=":", color=BLACK, label="chance, i / d")
        log_ticks(ax, longest, base=2)
        ax.set(title=f"{side}, the strongest i of each", xlabel="i", ylim=(0, 0.8))
        ax.set_ylabel("φ(i, i)")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return Picture(
        fig,
        "deeper_subspaces",
        "Dotted: what random subspaces share. Hold every line against it.",
        "φ(i, i) against i, a panel for A and one for B, chance dotted. Two runs on one task lie "
        "well above chance for small i; for A they reach it at 64. Runs on two tasks lie nearer.",
    )
