"""One look for every figure. Matplotlib is imported when the first figure is drawn."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from lora_lib.analysis import cumulative_energy
from lora_lib.lora import LoRALinear

# Okabe & Ito's palette, told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#222222", "#999999"

# A method has one colour in all figures.
LORA, FULL, SCRATCH, SCRATCH_LONG = BLUE, RED, GREEN, SKY
HEAD, CONTEXT_TABLE, LETTER_TABLE = PURPLE, ORANGE, GREY

STYLE = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "legend.frameon": False,
    "legend.fontsize": 12,
}


def figure(columns: int = 1, width: float | None = None, height: float = 4.2, rows: int = 1):
    """A figure and its axes (one, or an array), in the course's style."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(width or min(6.8 * columns, 13.5), height * rows), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns)


def show(fig, name: str, alt: str) -> None:
    """Display a figure with alt text. It is also written to `name`.png in the folder that the
    environment variable LORA_LIB_FIGURES names, as `make notebooks` does."""
    from IPython.display import Image, display

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    folder = os.environ.get("LORA_LIB_FIGURES")
    if folder:
        (Path(folder) / f"{name}.png").write_bytes(buffer.getvalue())
    display(Image(buffer.getvalue(), alt=alt))


def mark_recorded(ax) -> None:
    """Say on the axes that the numbers come from committed results."""
    ax.text(
        1.0, 1.01, "recorded", transform=ax.transAxes, ha="right", va="bottom", color=GREY, size=11
    )


def line_with_spread(ax, xs: Sequence[float], groups: Sequence[Sequence[float]], **style) -> None:
    """Mean of every group over its seeds as a line; the band runs from lowest to highest."""
    ax.plot(xs, [mean(g) for g in groups], **{"marker": "o"} | style)
    ax.fill_between(
        xs, [min(g) for g in groups], [max(g) for g in groups], color=style.get("color"), alpha=0.18
    )


def bars_with_spread(
    ax, labels: Sequence[str], groups: Mapping[str, Sequence[Sequence[float]]], colors: Sequence
) -> None:
    """Bars side by side: one block for each label, one colour for each group; a whisker from the
    lowest to the highest seed, where there are several."""
    width = 0.84 / len(groups)
    for k, ((name, values), color) in enumerate(zip(groups.items(), colors, strict=True)):
        xs = [i + (k - (len(groups) - 1) / 2) * width for i in range(len(labels))]
        means = [mean(v) for v in values]
        ax.bar(xs, means, width * 0.94, label=name, color=color)
        for x, v in zip(xs, values, strict=True):
            if len(v) > 1:
                ax.plot([x, x], [min(v), max(v)], color=BLACK, lw=1.6)
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(axis="x", visible=False)


# --- 01: rank ------------------------------------------------------------------------------------


def rank_intuition(values: Tensor, cumulative: Tensor, true_rank: int, shown: int = 50):
    """The lesson's first figure: singular values of a simulated change, and their energy."""
    fig, (left, right) = figure(2)
    left.bar(range(1, shown + 1), values[:shown].tolist(), color=BLUE)
    left.axvline(true_rank + 0.5, color=RED, ls="--", label=f"true rank {true_rank}")
    left.set(
        title=f"Singular values, the first {shown} of {len(values)}", xlabel="component", ylabel="σ"
    )
    left.legend()
    right.plot(range(1, shown + 1), cumulative[:shown].tolist(), marker="o", ms=4, color=BLUE)
    right.axhline(0.99, color=GREEN, ls=":", label="99 %")
    right.axvline(true_rank, color=RED, ls="--", label=f"rank {true_rank}")
    right.set(title="Energy held by the first k", xlabel="k", ylabel="share of Σσ²", ylim=(0, 1.04))
    right.legend(loc="lower right")
    return fig


def energy_curves(spectra: Mapping[str, Tensor], colors: Sequence[str]):
    """Running energy of several matrices' singular values, with k90 marked on each."""
    fig, ax = figure(1, width=9)
    for (name, values), color in zip(spectra.items(), colors, strict=True):
        energy = cumulative_energy(values)
        k = int((energy < 0.9).sum()) + 1
        ax.plot(range(1, len(energy) + 1), energy, color=color, label=f"{name}: k90 = {k}")
        ax.plot(k, energy[k - 1], "o", color=color)
    ax.axhline(0.9, color=GREY, ls=":")
    ax.set(
        xlabel="number of singular values, k", ylabel="share of Σσ²", ylim=(0, 1.03), xlim=(0, None)
    )
    ax.legend(loc="lower right")
    return fig


def cut_curve(ranks: Sequence[int], cut: Sequence[Sequence[float]], trained=None):
    """Exact match of a fully fine-tuned model whose every ΔW is cut to rank r, one group of seeds
    a rank; `trained`: the same for LoRA trained at rank r, as {rank: seeds}."""
    fig, ax = figure(1, width=9)
    xs = range(len(ranks))
    line_with_spread(ax, xs, cut, color=FULL, label="full fine-tuning, its ΔW cut to rank r")
    if trained:
        shown = [i for i in xs if ranks[i] in trained]
        groups = [trained[ranks[i]] for i in shown]
        line_with_spread(ax, shown, groups, color=LORA, label="LoRA, trained at rank r")
    ax.set_xticks(xs, map(str, ranks))
    ax.set(xlabel="rank r (of 128)", ylabel="exact match, unseen towns", ylim=(-0.02, 0.62))
    ax.legend(loc="upper left")
    mark_recorded(ax)
    return fig


# --- 06: hyperparameters -------------------------------------------------------------------------


def visualize_lora_hyperparameters():
    """The lesson's last figure: LoRA's parameters against the rank, its scaling against alpha.

    Parameters are counted on real layers: W_q and W_v of 4 layers of width 256.
    """
    fig, (left, right) = figure(2)
    d, matrices = 256, 8
    ranks = [2**k for k in range(8)]
    layer = nn.Linear(d, d, bias=False)
    counts = [matrices * LoRALinear(layer, rank=r).num_trainable_params for r in ranks]
    left.loglog(ranks, counts, marker="o", color=BLUE, label="LoRA factors")
    left.axhline(matrices * d * d, color=RED, ls="--", label="all of W_q and W_v")
    left.set_xticks(ranks, map(str, ranks))
    left.minorticks_off()
    left.set(title=f"Trainable parameters, width {d}", xlabel="rank r", ylabel="parameters")
    left.legend()
    alphas = torch.arange(1, 65)
    for rank, color in zip((4, 8, 16), (BLUE, GREEN, RED), strict=True):
        right.plot(alphas, alphas / rank, color=color, label=f"r = {rank}")
    right.set(title="Scaling α / r", xlabel="α", ylabel="scaling")
    right.legend()
    return fig


# --- 04: training --------------------------------------------------------------------------------


def comparison(curves: Mapping[str, Sequence[float]], ranks: Mapping[int, tuple], full: tuple):
    """The lesson's three panels: learning curves, score against parameters, parameter counts.

    `curves`: losses of live runs by name (LoRA, full fine-tuning, from scratch); `ranks`: rank →
    (trainable parameters, exact match of every seed); `full`: the same for full fine-tuning.
    """
    fig, (curve, score, count) = figure(3, width=13.5, height=4.4)
    colors = (LORA, FULL, SCRATCH)[: len(curves)]
    for (name, losses), color in zip(curves.items(), colors, strict=True):
        smooth = [mean(losses[max(0, i - 9) : i + 1]) for i in range(len(losses))]
        curve.plot(range(1, len(losses) + 1), smooth, color=color, label=name)
    curve.set(title="Learning curves (live)", xlabel="step", ylabel="loss, nats", ylim=(0, None))
    curve.legend()
    sizes = [trainable for trainable, _ in ranks.values()]
    line_with_spread(
        score, sizes, [s for _, s in ranks.values()], color=LORA, label="LoRA, r = 1 … 64"
    )
    score.plot(full[0], mean(full[1]), "*", ms=18, color=FULL, label="full fine-tuning")
    score.set_xscale("log")
    score.set(title="Exact match", xlabel="trainable parameters", ylim=(0, 0.62))
    score.legend(loc="lower right")
    names = [f"r={rank}" for rank in ranks] + ["full"]
    bars = count.barh(names, [*sizes, full[0]], color=[LORA] * len(sizes) + [FULL])
    count.bar_label(bars, [f"{n:,}" for n in [*sizes, full[0]]], padding=3, fontsize=11)
    count.set(title="Trainable parameters", xlim=(0, 1.35 * full[0]), xticks=[])
    count.invert_yaxis()
    mark_recorded(score)
    return fig


def methods_by_script(scores: Mapping[str, Sequence[Sequence[float]]], scripts: Sequence[str]):
    """Exact match on unseen towns: a block for every script, a bar for every method."""
    fig, ax = figure(1, width=13.5, height=4.8)
    colors = (LORA, FULL, SCRATCH, SCRATCH_LONG, HEAD, CONTEXT_TABLE, LETTER_TABLE)
    labels = [script.capitalize() for script in scripts]
    bars_with_spread(ax, labels, scores, colors[: len(scores)])
    ax.set(ylabel="exact match, unseen towns", ylim=(0, 0.74))
    ax.legend(ncols=4, loc="upper center")
    mark_recorded(ax)
    return fig


def scores_by_pairs(pairs: Sequence[int], scores: Mapping[str, Sequence[Sequence[float]]]):
    """Exact match against the number of training pairs (log axis), a line for every method."""
    fig, ax = figure(1, width=9)
    colors = (LORA, FULL, SCRATCH, CONTEXT_TABLE)
    for (name, groups), color in zip(scores.items(), colors, strict=True):
        line_with_spread(ax, pairs, groups, color=color, label=name)
    ax.set_xscale("log")
    ax.set_xticks(pairs, [f"{n:,}" for n in pairs])
    ax.minorticks_off()
    ax.set(xlabel="Georgian pairs to learn from", ylabel="exact match, unseen towns", ylim=(0, 0.6))
    ax.legend(loc="upper left")
    mark_recorded(ax)
    return fig


def clinic(runs: Mapping[str, dict]):
    """Losses of the healthy run and the broken ones, one small panel each."""
    fig, axes = figure(len(runs), width=13.5, height=3.2)
    healthy = runs["healthy"]["losses"]
    for ax, (name, run) in zip(axes, runs.items(), strict=True):
        ax.plot(healthy, color=GREY, lw=1.5)
        ax.plot(run["losses"], color=BLUE if name == "healthy" else RED)
        ax.set(title=name if name == "healthy" else f"run {name}", ylim=(0, 8), xlabel="step")
    axes[0].set_ylabel("loss, nats")
    return fig


# --- 03: the transformer -------------------------------------------------------------------------


def attention_maps(maps: Mapping[str, tuple[Tensor, str]], columns: Sequence[str]):
    """One head's attention while it writes: a panel for each (weights, what was written)."""
    fig, axes = figure(len(maps), width=13.5, height=5.4)
    for ax, (title, (weights, written)) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(weights, cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(written)), list(written))
        ax.set(title=title, xlabel="looks at", ylabel="writes")
        ax.grid(visible=False)
    fig.colorbar(image, ax=axes, shrink=0.8, label="attention weight")
    return fig


def parameters_by_target(counts: Mapping[tuple[str, int], int], total: int):
    """Trainable parameters for every (targets, rank), with their share of the base's `total`."""
    fig, ax = figure(1, width=11, height=4.6)
    labels = list(dict.fromkeys(label for label, _ in counts))
    ranks = list(dict.fromkeys(rank for _, rank in counts))
    groups = {f"r = {rank}": [[counts[label, rank]] for label in labels] for rank in ranks}
    bars_with_spread(ax, labels, groups, (SKY, BLUE, BLACK))
    for bars, rank in zip(ax.containers, ranks, strict=True):
        shares = [f"{counts[label, rank] / total:.1%}" for label in labels]
        ax.bar_label(bars, shares, padding=3, fontsize=11)
    ax.set(title="Trainable parameters, and their share of the model", ylabel="parameters")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.legend(loc="upper left")
    return fig


# --- going deeper: speed -------------------------------------------------------------------------

CONTESTANTS = {
    "lora_lib": LORA,
    "lora_lib, fused": SKY,
    "PEFT": ORANGE,
    "PEFT without casts": PURPLE,
    "loralib": GREEN,
    "full": FULL,
    "frozen": GREY,
}


def step_times(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    widths: Sequence[int],
    decoder: Mapping[str, tuple[float, float]],
):
    """Step times over full fine-tuning's, against the width: `panels` gives {contestant: ratios} by
    title. And the step of a large decoder, {contestant: (milliseconds, GB at the peak)}, as bars.
    """
    fig, axes = figure(len(panels) + 1, width=13.5, height=4.8)
    for ax, (title, ratios) in zip(axes[:-1], panels.items(), strict=True):
        for name, values in ratios.items():
            order = 3 if name == "lora_lib" else 2  # where lines coincide, the course's own is seen
            ax.plot(widths, values, "o-", color=CONTESTANTS[name], label=name, zorder=order)
        ax.axhline(1, color=FULL, lw=1.4, label="full")
        ax.axhline(2 / 3, color=BLACK, lw=1.4, ls=":", label="2/3 of full: the floor in FLOPs")
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, map(str, widths))
        ax.set(title=title, xlabel="width of the layers", ylim=(0, None))
    axes[0].set_ylabel("step time, full fine-tuning = 1")
    bars = axes[-1].barh(
        list(decoder),
        [ms for ms, _ in decoder.values()],
        color=[CONTESTANTS[name] for name in decoder],
    )
    labels = [f"{ms:.0f} ms, {gb:.0f} GB" for ms, gb in decoder.values()]
    axes[-1].bar_label(bars, labels, padding=3, fontsize=11)
    longest = max(ms for ms, _ in decoder.values())
    axes[-1].set(title="Decoder, GPU", xticks=[], xlim=(0, 1.6 * longest))
    axes[-1].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=4)
    mark_recorded(axes[-1])
    return fig
