"""Figures of notebook 01: the problem, rank, a real change."""

from collections.abc import Mapping, Sequence
from statistics import mean

import torch
from torch import Tensor

from lora_course.figures.style import *
from lora_lib.rank import cumulative_energy, k90, low_rank_part


def memory(full_gb: float, lora_gb: float) -> Picture:
    """What training seven billion weights takes, and what LoRA does instead."""
    fig, (bars, idea) = figure(2, height=3.5)
    drawn = bars.bar(
        ["all weights", "LoRA"], [full_gb, lora_gb], 0.6, color=[FULL, LORA], hatch=["//", ""]
    )
    bars.bar_label(drawn, [f"{full_gb:.0f} GB", ""], padding=3, fontsize=15)
    bars.text(1, lora_gb / 2, f"{lora_gb:.1f} GB", color="white", ha="center", va="center", size=14)
    for height, card in ((24, "gaming card"), (80, "data-centre card")):
        bars.axhline(height, color=BLACK, ls=":")
        bars.text(2.2, height + 3.5, f"{card}, {height} GB", ha="right")
    bars.set(title="Memory to train 7 billion weights", ylim=(0, 130), xlim=(-0.5, 2.2), yticks=[])
    bars.grid(visible=False)
    _draw_factors(idea)
    return Picture(
        fig,
        "01_memory",
        "Training all weights fits on neither card; LoRA fits on both. Activations come on top.",
        f"Left, bars: training all of 7 billion weights takes {full_gb:.0f} GB, LoRA {lora_gb:.1f} "
        "GB; lines mark a gaming card of 24 GB and a data-centre card of 80 GB. Right, a drawing: "
        "the large frozen matrix W, plus a tall thin matrix B times a flat thin matrix A, which "
        "are trained.",
    )


def _draw_factors(ax) -> None:
    """W, and beside it B and A, as rectangles."""
    box(ax, 0, 0, 4, 4, PALE, "W\nfrozen", size=15)
    box(ax, 5.2, 0, 0.5, 4, LORA)
    box(ax, 6.4, 3.5, 4, 0.5, LORA)
    words = dict(ha="center", va="center", size=15)
    ax.text(4.6, 2, "+", **{**words, "size": 22})
    ax.text(5.45, -0.5, "B", color=LORA, **words)
    ax.text(8.4, 2.9, "A", color=LORA, **words)
    ax.text(8.4, 1.4, "only these\nare trained", color=LORA, **words)
    ax.set_title("LoRA: two thin matrices beside W")
    ax.set(xlim=(-0.2, 10.6), ylim=(-0.9, 4.2), aspect="equal")
    ax.axis("off")


def rank_pictures(pictures: Mapping[str, Tensor], ranks: Sequence[int]) -> Picture:
    """Pictures, (n, n) each, and below each what the sum of its r strongest tables shows."""
    fig, axes = figure(len(pictures), 1 + len(ranks), height=1.4 * TALL)
    fig.set_layout_engine("compressed")
    needed = {name: int(torch.linalg.matrix_rank(p)) for name, p in pictures.items()}
    for column, (name, picture) in zip(axes.T, pictures.items(), strict=True):
        low, high = picture.min().item(), picture.max().item()
        for ax, rank in zip(column, (None, *ranks), strict=True):
            shown = picture if rank is None else low_rank_part(picture, rank)
            ax.imshow(shown.numpy(), cmap="gray_r", vmin=low, vmax=high)
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
            ax.spines[:].set(visible=True, color=PALE)
        column[0].set_title(f"{name}\nrank {needed[name]}", fontsize=13, loc="center")
    for ax, rank in zip(axes[:, 0], (None, *ranks), strict=True):
        label = "picture" if rank is None else f"r = {rank}"
        ax.set_ylabel(label, rotation=0, ha="right", va="center")
    told = ", ".join(f"{name} {rank}" for name, rank in needed.items())
    return Picture(
        fig,
        "01_rank_pictures",
        "Each row adds more column × row tables. Rank is not what looks complicated.",
        f"A grid of black and white pictures, rebuilt from their {', '.join(map(str, ranks))} "
        f"strongest column times row tables. They are exact at their rank: {told}. Below it, what "
        "is missing shows as blur, ripples or a coarser noise.",
    )


def rank_intuition(values: Tensor, cumulative: Tensor, true_rank: int) -> Picture:
    """The lesson's first figure: singular values of a simulated change, and their energy."""
    fig, (left, right) = figure(2)
    bars, points = min(50, len(values)), min(20, len(values))
    left.bar(range(1, bars + 1), values[:bars].tolist(), color=SKY)
    left.axvline(true_rank + 0.5, color=BLACK, ls="--", label=f"true rank {true_rank}")
    left.set(title="Strength of each direction", xlabel=f"direction (of {len(values)})", ylabel="σ")
    left.legend()
    line(right, range(1, points + 1), cumulative[:points].tolist(), SKY, markevery=1, ms=5)
    right.axhline(0.9, color=GREY, ls=":", label="90 %")
    right.axvline(true_rank, color=BLACK, ls="--", label=f"rank {true_rank}")
    right.set(title="Energy held by the first k", xlabel="k", ylabel="share of Σσ²", ylim=(0, 1.04))
    right.legend(loc="lower right")
    return Picture(
        fig,
        "lora_rank_intuition",
        f"Built from {true_rank} tables, it has {true_rank} directions and no more.",
        f"Two panels on a simulated change of rank {true_rank}. Left, bars: of the first {bars} "
        f"singular values the first {true_rank} stand high and all others are at zero. Right, a "
        f"line: the energy that the first k hold rises to 1 at k = {true_rank} and stays there.",
    )


def energy_curves(spectra: Mapping[str, Tensor], colors: Sequence[str]) -> Picture:
    """Running energy of several matrices' singular values, with k90 marked on each."""
    fig, ax = figure()
    found = {name: k90(values) for name, values in spectra.items()}
    for (name, values), color in zip(spectra.items(), colors, strict=True):
        energy, k = cumulative_energy(values), found[name]
        steps = range(1, len(energy) + 1)
        line(ax, steps, energy, color, f"{name}: k90 = {k}", markevery=[k - 1], ms=11)
    ax.axhline(0.9, color=BLACK, ls=":")
    ax.set(title="How many directions hold 90 % of the energy?", xlabel="directions kept, k")
    ax.set(ylabel="share of Σσ²", ylim=(0, 1.03), xlim=(0, None))
    ax.legend(loc="lower right")
    told = "; ".join(f"{name}: {k}" for name, k in found.items())
    return Picture(
        fig,
        "01_real_change",
        "The real change lies between rank 8 and noise.",
        "Energy held by the first k singular values, a rising line for each matrix, and a dotted "
        f"line at 90 %. The lines cross it at these k. {told}.",
    )


def cut_curve(ranks: Sequence[int], cut: Groups) -> Picture:
    """Names right of a fully fine-tuned model whose every ΔW is cut to rank r, one group of seeds
    a rank."""
    fig, ax = figure(recorded=True)
    xs = range(len(ranks))
    line_with_spread(ax, xs, cut, FULL)
    ax.set_title("Cut to rank 8 or less, the change is worth little")
    ax.set_xticks(xs, map(str, ranks))
    ax.set(xlabel="directions kept of every ΔW", ylabel="names right, unseen towns")
    ax.set(ylim=(-0.02, 0.62))
    told = ", ".join(f"{mean(g):.2f} at {r}" for r, g in zip(ranks, cut, strict=True))
    return Picture(
        fig,
        "01_cut_to_rank",
        "Eight directions keep hardly a name; sixteen keep nearly all that was learned.",
        "A line: the share of unseen towns that is written right when every change of full "
        f"fine-tuning is cut to rank r. Means of five seeds: {told}.",
    )
