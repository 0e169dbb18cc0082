"""Figures of notebook 06: hyperparameters."""

import torch
from torch import nn

from lora_course.figures.style import FULL, LORA, blues, figure, line
from lora_lib.lora import LoRALinear


def visualize_lora_hyperparameters():
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
    left.set(xscale="log", yscale="log")
    left.set_xticks(ranks, map(str, ranks))
    left.minorticks_off()
    left.set(title=f"Trainable parameters, width {d}", xlabel="rank r", ylabel="parameters")
    left.legend()
    alphas = torch.arange(1, 65)
    for rank, color in zip((4, 8, 16), blues(3), strict=True):
        line(right, alphas, alphas / rank, color, f"r = {rank}")
    right.set(title="Scaling α / r", xlabel="α", ylabel="scaling")
    right.legend()
    return fig
