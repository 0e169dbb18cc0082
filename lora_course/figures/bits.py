"""Figures of the page on weights in few bits."""

from collections.abc import Mapping
from statistics import mean

import torch
from torch import Tensor

from lora_course.figures.style import *

QUANTILES, EVEN, FLOATS = BLUES[4], GREY, BLACK
KINDS = {
    "float": ("floats", FLOATS),
    "normal": ("quantiles", QUANTILES),
    "even": ("evenly spaced", EVEN),
}


def levels_used(weights: Tensor, levels: Mapping[str, Tensor]) -> Picture:
    """Where levels lie among the weights, each divided by the largest of its block, and how many
    weights lie nearest to each; `levels` by kind, "normal" and "even"."""
    blocks = weights.view(-1, 64)
    relative = (blocks / blocks.abs().amax(dim=1, keepdim=True)).flatten()
    fig, (left, right) = figure(2)
    left.hist(relative.tolist(), 80, density=True, color=BLUES[0])
    told, highest = [], []
    for row, (kind, values) in enumerate(levels.items()):
        name, color = KINDS[kind]
        y = [-0.12 - 0.14 * row] * len(values)
        left.plot(values, y, ls="", marker=MARKS[color][0], ms=6, color=color, label=name)
        between = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(relative, between)
        share = (codes.bincount(minlength=len(values)) / codes.numel()).tolist()
        xs = [code + 0.42 * (row - 0.5) for code in range(len(values))]
        right.bar(xs, share, 0.4, color=color, hatch=MARKS[color][1], label=name)
        highest.append(max(share))
        told.append(f"{name} from {min(share):.3f} to {max(share):.3f}")
    left.set(title="Sixteen levels", xlabel="weight / largest of its block", yticks=[])
    right.axhline(1 / 16, color=BLACK, ls=":", label="1/16")
    right.set(title="How often each is used", xlabel="code", ylabel="share of the weights")
    right.set(xticks=range(0, len(values), 5), ylim=(0, 1.25 * max(highest)))
    right.legend(loc="upper left")
    left.set_ylim(top=1.2 * left.get_ylim()[1])
    left.legend(loc="upper left")
    return Picture(
        fig,
        "bits_levels",
        "Quantiles lie closest where most weights are, so their codes are used more evenly.",
        "Left: a bell of weights, and below it sixteen marks, quantiles dense in the middle, the "
        f"others evenly spaced. Right: shares of the weights for each code, {'; '.join(told)}.",
    )


def memory_and_errors(
    panels: Mapping[str, Mapping[str, Mapping[int, Numbers]]], kilobytes: Mapping[int, float]
) -> Picture:
    """Error rate against bits a weight: {title: {kind: {bits: error rate of each seed}}}, a kind
    being "float", "normal" or "even"; `kilobytes` of the layers by bits."""
    fig, axes = figure(len(panels), height=TALL, recorded=True)
    places = list(kilobytes)
    highest = max(
        max(e) for p in panels.values() for by_bits in p.values() for e in by_bits.values()
    )
    told = []
    for ax, (title, groups) in zip(axes, panels.items(), strict=True):
        for (kind, by_bits), shift in zip(groups.items(), (0, -0.1, 0.1), strict=True):
            name, color = KINDS[kind]
            xs = [places.index(bits) + shift for bits in by_bits]
            for x, errors in zip(xs, by_bits.values(), strict=True):
                ax.plot([x, x], [min(errors), max(errors)], color=color, lw=1.6)
            line(ax, xs, list(map(mean, by_bits.values())), color, name, ls="")
            scores = (f"{mean(errors):.3f} at {bits}" for bits, errors in by_bits.items())
            told.append(f"{title}, {name}: {', '.join(scores)} bits")
        ticks = [f"{bits} bits\n{kilobytes[bits]:,.0f} kB" for bits in places]
        ax.set_xticks(range(len(places)), ticks)
        ax.set(title=title, xlim=(-0.5, len(places) - 0.5), ylim=(0, 1.1 * highest))
    axes[0].set_ylabel("error rate, unseen towns")
    axes[0].legend(loc="upper left")
    return Picture(
        fig,
        "bits_memory_and_errors",
        "On the right, lines run from the lowest to the highest of five seeds.",
        f"Points of error rate against bits a weight. {'. '.join(told)}.",
    )


def seven_b(rows) -> Picture:
    """Memory at the peak of a training step, as bars, and its time: a block of bars for each case,
    a bar for each kind of base (a data frame, see `lora_course.experiments.quantised_7b`)."""
    fig, ax = figure(height=TALL, recorded=True)
    kinds = list(rows.base.unique())
    cases = list(rows[["rows", "mode"]].drop_duplicates().itertuples(index=False, name=None))
    told = []
    for k, (kind, color) in enumerate(zip(kinds, (FLOATS, QUANTILES, BLUES[1]), strict=False)):
        mine = rows[rows.base.eq(kind)].set_index(["rows", "mode"]).loc[cases]
        ys = [i + 0.27 * (k - (len(kinds) - 1) / 2) for i in range(len(cases))]
        bars = ax.barh(ys, mine.peak_gb, 0.25, color=color, hatch=MARKS[color][1], label=kind)
        labels = [f"{gb:.1f} GB, {ms:.0f} ms" for gb, ms in zip(mine.peak_gb, mine.ms, strict=True)]
        ax.bar_label(bars, labels, padding=4, fontsize=12)
        told.append(f"{kind}: {'; '.join(labels)}")
    names = [
        f"{n} row{'s' * (n > 1)}" + "\ncheckpointed" * (mode == "checkpointed") for n, mode in cases
    ]
    ax.set_yticks(range(len(cases)), names)
    ax.set(xlabel="GB at the peak of a step", xlim=(0, 1.3 * rows.peak_gb.max()))
    ax.set_title("A model of seven billion, LoRA r = 16, rows of 512 tokens")
    ax.grid(axis="y", visible=False)
    ax.invert_yaxis()
    fig.legend(loc="outside lower center", ncols=3)
    return Picture(
        fig,
        "bits_seven_b",
        "Quantising saves about the same gigabytes in every case; a step then takes longer.",
        f"Bars for {', '.join(names)}: {'. '.join(told)}.".replace("\n", ", "),
    )
