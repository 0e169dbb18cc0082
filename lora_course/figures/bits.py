"""Figures of the page on weights in few bits."""

from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import Tensor

from lora_course.figures.style import (
    BLACK,
    BLUES,
    GREY,
    MARKS,
    NORMAL,
    TALL,
    Picture,
    bars_with_spread,
    figure,
    line,
    mark_recorded,
)

QUANTILES, EVEN, FLOATS = BLUES[4], GREY, BLACK
KINDS = {
    "float": ("floats", FLOATS),
    "normal": ("quantiles", QUANTILES),
    "even": ("evenly spaced", EVEN),
}


def levels_used(relative: Tensor, levels: Mapping[str, Tensor]) -> Picture:
    """Where levels lie among the weights, each divided by the largest of its block, and how many
    weights lie nearest to each; `levels` by kind, "normal" and "even"."""
    fig, (left, right) = figure(2)
    left.hist(relative.flatten().tolist(), 80, density=True, color=BLUES[0])
    told, highest = [], []
    for row, (kind, values) in enumerate(levels.items()):
        name, color = KINDS[kind]
        y = [-0.12 - 0.14 * row] * len(values)
        left.plot(values, y, ls="", marker=MARKS[color][0], ms=6, color=color, label=name)
        between = (values[1:] + values[:-1]) / 2
        codes = torch.bucketize(relative.flatten(), between)
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
        "Quantiles lie closest where most weights are; their use is more even, and not even.",
        "Left: a bell of weights, and below it sixteen marks, quantiles dense in the middle, the "
        f"others evenly spaced. Right: shares of the weights for each code, {'; '.join(told)}.",
    )


def memory_and_errors(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]],
    kilobytes: Mapping[int, float],
) -> Picture:
    """Error rate against bits a weight: {title: {kind: {bits: error rate of each seed}}}, a kind
    being "float", "normal" or "even"; `kilobytes` of the layers by bits."""
    fig, axes = figure(len(panels), height=TALL)
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
        mark_recorded(ax)
    axes[0].set_ylabel("error rate, unseen towns")
    axes[0].legend(loc="upper left")
    return Picture(
        fig,
        "bits_memory_and_errors",
        "On the right, lines run from the lowest to the highest of five seeds.",
        f"Points of error rate against bits a weight. {'. '.join(told)}.",
    )


def seven_b(peaks: Mapping[str, Sequence[float]], cases: Sequence[str], title: str) -> Picture:
    """Gigabytes at the peak, a block of bars for each case, a bar for each kind of base."""
    fig, ax = figure(height=NORMAL)
    colors = (FLOATS, QUANTILES, BLUES[1])
    groups = {name: [[value] for value in values] for name, values in peaks.items()}
    bars_with_spread(ax, cases, groups, colors[: len(groups)])
    for bars in ax.containers:
        ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=12)
    ax.set(ylabel="GB at the peak")
    ax.set_title(title)
    ax.legend(loc="upper left")
    mark_recorded(ax)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{value:.1f}" for value in values)
        for name, values in peaks.items()
    )
    return Picture(
        fig,
        "bits_seven_b",
        "The base takes a quarter; what a step computes on the way takes as much as before.",
        f"Blocks of bars for {', '.join(cases)}: gigabytes at the peak, {told}.",
    )
