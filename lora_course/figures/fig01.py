"""Figures of notebook 01: the problem, rank, a real change."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lora_course.figures.style import (
    BLACK,
    FULL,
    GREY,
    LORA,
    SKY,
    figure,
    line,
    line_with_spread,
    mark_recorded,
)
from lora_lib.rank import cumulative_energy, k90


def rank_intuition(values: Tensor, cumulative: Tensor, true_rank: int, shown: int = 50):
    """The lesson's first figure: singular values of a simulated change, and their energy."""
    fig, (left, right) = figure(2)
    shown = min(shown, len(values))
    components = range(1, shown + 1)
    left.bar(components, values[:shown].tolist(), color=SKY)
    left.axvline(true_rank + 0.5, color=BLACK, ls="--", label=f"true rank {true_rank}")
    left.set(title="Singular values", xlabel=f"component (of {len(values)})", ylabel="σ")
    left.legend()
    line(right, components, cumulative[:shown].tolist(), SKY, markevery=1, ms=5)
    right.axhline(0.99, color=GREY, ls=":", label="99 %")
    right.axvline(true_rank, color=BLACK, ls="--", label=f"rank {true_rank}")
    right.set(title="Energy held by the first k", xlabel="k", ylabel="share of Σσ²", ylim=(0, 1.04))
    right.legend(loc="lower right")
    return fig


def energy_curves(spectra: Mapping[str, Tensor], colors: Sequence[str]):
    """Running energy of several matrices' singular values, with k90 marked on each."""
    fig, ax = figure()
    for (name, values), color in zip(spectra.items(), colors, strict=True):
        energy = cumulative_energy(values)
        k = k90(values)
        steps = range(1, len(energy) + 1)
        line(ax, steps, energy, color, f"{name}: k90 = {k}", markevery=[k - 1], ms=11)
    ax.axhline(0.9, color=BLACK, ls=":")
    ax.set(title="How few directions hold 90 % of the energy?", xlabel="singular values kept, k")
    ax.set(ylabel="share of Σσ²", ylim=(0, 1.03), xlim=(0, None))
    ax.legend(loc="lower right")
    return fig


def cut_curve(ranks: Sequence[int], cut: Sequence[Sequence[float]], trained=None):
    """Exact match of a fully fine-tuned model whose every ΔW is cut to rank r, one group of seeds
    a rank; `trained`: the same for LoRA trained at rank r, as {rank: seeds}."""
    fig, ax = figure()
    xs = range(len(ranks))
    line_with_spread(ax, xs, cut, FULL, "full fine-tuning, its ΔW cut to rank r")
    title = "Cut to a low rank, full fine-tuning's change is worth little"
    if trained:
        shown = [i for i in xs if ranks[i] in trained]
        groups = [trained[ranks[i]] for i in shown]
        line_with_spread(ax, shown, groups, LORA, "LoRA, trained at rank r")
        title = "A low rank is enough when you train at it, not when you cut to it"
    ax.set_title(title)
    ax.set_xticks(xs, map(str, ranks))
    ax.set(xlabel="rank r (of 128)", ylabel="exact match, unseen towns", ylim=(-0.02, 0.62))
    ax.legend(loc="lower right")
    mark_recorded(ax)
    return fig
