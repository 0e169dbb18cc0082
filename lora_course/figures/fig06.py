"""Figures of notebook 06: hyperparameters."""

from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import nn

from lora_course.figures.style import *
from lora_lib.lora import LoRALinear


def visualize_lora_hyperparameters() -> Picture:
    """The lesson's last figure: LoRA's parameters against the rank, its scaling against alpha.

    Parameters are counted on real layers: W_q and W_v of 4 layers of width 256.
    """
    fig, (left, right) = figure(2)
    d, matrices = 256, 8
    ranks = [2**k for k in range(8)]
    layer = nn.Linear(d, d, bias=False)
    counts = [matrices * LoRALinear(layer, rank=r).num_trainable_params for r in ranks]
    line(left, ranks, counts, LORA, "LoRA factors")
    left.axhline(matrices * d * d, color=FULL, ls="--", label="all of W_q and W_v")
    left.set(title=f"Trainable parameters, width {d}", xlabel="rank r", ylabel="parameters")
    left.set_yscale("log")
    log_ticks(left, ranks)
    left.legend()
    alphas = torch.arange(1, 65)
    for rank, color in zip((4, 8, 16), blues(3), strict=True):
        line(right, alphas, alphas / rank, color, f"r = {rank}")
    right.set(title="Scaling α / r", xlabel="α", ylabel="scaling")
    right.legend()
    return Picture(
        fig,
        "lora_hyperparameters",
        "What needs no experiment: a count, and a division.",
        f"Left: LoRA parameters against rank on logarithmic axes, a line from {counts[0]:,} "
        f"at rank 1 to {counts[-1]:,} at rank {ranks[-1]}, where it meets the count of the full "
        "matrices. Right: the scaling α / r against α, three lines, steeper for lower ranks.",
    )


def rate_and_rank(
    rows: Mapping[str, Mapping[int, Mapping[float, float]]], full_rate: float
) -> Picture:
    """Validation bits against the learning rate: a row a rule of α, a panel a rank; a star at the
    best. `rows`: rule → {rank: {rate: bits}}; `full_rate` is the best one for all weights."""
    ranks = list(next(iter(rows.values())))
    fig, axes = figure(len(ranks), len(rows), height=1.2 * TALL)
    stars = {}
    for axs, (rule, by_rank) in zip(axes, rows.items(), strict=True):
        for ax, (rank, bits) in zip(axs, by_rank.items(), strict=True):
            best = min(bits, key=bits.get)
            stars[rule, rank] = best
            ax.axvline(full_rate, color=FULL, ls="--")
            line(ax, list(bits), list(bits.values()), LORA, markevery=1, ms=6)
            star(ax, best, bits[best], LORA, mec=BLACK)
            log_ticks(ax, (1e-3, 1e-2))
            ax.set(title=f"r = {rank}, best {best:g}", ylim=(0.42, 1.25), xlim=(4e-4, 0.1))
            ax.label_outer()
        axs[0].set_ylabel(f"{rule}\nbits")
        axs[0].text(1.2 * full_rate, 0.47, "all\nweights", color=FULL, weight="bold", size=12)
    heading(fig, "With α = 2r the best rate falls as the rank grows; with α = 16 it stays")
    fig.supxlabel("learning rate (recorded, one seed each)", fontsize=13)
    told = "; ".join(
        f"{rule}: " + ", ".join(f"{stars[rule, rank]:g} at r = {rank}" for rank in ranks)
        for rule in rows
    )
    return Picture(
        fig,
        "06_rate_and_rank",
        "A star, and the number above each panel: the best rate. Dashed: the best for all weights.",
        "Small panels of validation bits against the learning rate, each a valley with a star "
        f"at its lowest point; a row for each rule of α, a column for each rank. Best: {told}. "
        f"A dashed line in every panel stands at {full_rate:g}, the best rate for all weights.",
    )


def one_rate_for_all(ranks: Sequence[int], fixed: Mapping[float, Groups], tuned: Groups) -> Picture:
    """Names right against rank: at two rates for all ranks, and at a rate for each."""
    fig, (left, right) = figure(2, recorded=True)
    lines_with_spread(left, ranks, {f"rate {r:g}": v for r, v in fixed.items()}, blues(2), base=2)
    left.legend()
    lines_with_spread(right, ranks, {"": tuned}, [LORA], base=2)
    for ax, title in ((left, "One rate for all ranks"), (right, "A rate for each")):
        ax.set(title=title, xlabel="rank", ylabel="names right", ylim=(-0.02, 0.6))
    told = "; ".join(
        f"at {rate:g} {mean(v[0]):.2f} at r = {ranks[0]} and {mean(v[-1]):.2f} at r = {ranks[-1]}"
        for rate, v in fixed.items()
    )
    return Picture(
        fig,
        "06_one_rate_for_all",
        "Left, one rate for all ranks; right, a rate tuned for each. Bands: five seeds.",
        f"Two panels of names right against rank. Left, at one rate for all: {told}. Right, with a "
        f"rate tuned for each rank: from {mean(tuned[0]):.2f} up to {mean(tuned[-1]):.2f}.",
    )


def equal_budget(scores: Mapping[str, Numbers]) -> Picture:
    """Names right by choice of targets, at an equal number of parameters: {label: seeds}."""
    fig, ax = figure(recorded=True)
    bars_with_spread(ax, list(scores), {"equal budget": list(scores.values())}, [LORA])
    ax.bar_label(
        ax.containers[0], [f"{mean(s):.2f}" for s in scores.values()], padding=8, fontsize=14
    )
    ax.set(title="Where the rank is spent counts, too", ylabel="names right", ylim=(0, 0.65))
    told = ", ".join(f"{label.split(chr(10))[0]} {mean(s):.2f}" for label, s in scores.items())
    return Picture(
        fig,
        "06_targets",
        "As near to one budget as whole ranks come. A line: lowest to highest of five seeds.",
        f"Bars of names right for choices of targets at an equal number of parameters: {told}.",
    )


def alpha_valleys(bits: Mapping[float, Mapping[float, float]]) -> Picture:
    """Validation bits against the learning rate, a line for each α; a star at the best."""
    fig, ax = figure(recorded=True)
    best = {}
    for (alpha, by_rate), color in zip(bits.items(), blues(len(bits)), strict=True):
        line(ax, list(by_rate), list(by_rate.values()), color, f"α = {alpha:g}")
        best[alpha] = min(by_rate, key=by_rate.get)
        star(ax, best[alpha], by_rate[best[alpha]], color, mec=BLACK)
    log_ticks(ax, (2e-3, 5e-3, 1e-2, 2e-2, 5e-2))
    ax.set(title="At r = 8: a larger α wants a lower rate, and that is all", ylim=(0.5, 0.7))
    ax.set(xlabel="learning rate", ylabel="validation bits")
    ax.legend(loc="upper right")
    told = ", ".join(f"{bits[a][rate]:.2f} at {rate:g} for α = {a:g}" for a, rate in best.items())
    return Picture(
        fig,
        "06_alpha_and_rate",
        "Three valleys, one floor. A line leaves the frame where steps are too large or too small.",
        f"Validation bits against the learning rate for several α at r = 8; lowest points: {told}.",
    )
