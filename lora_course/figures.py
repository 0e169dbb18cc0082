"""One look for every figure. Matplotlib is imported when the first figure is drawn.

A figure is WIDTH inches wide and NORMAL or TALL inches high, and is shown at 100 pixels an inch, so
that its 12-point text is as large as the text around it. A colour of the palette never comes
alone: a marker (for lines) and a hatch (for bars) go with it, for whoever does not see the colour.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

from lora_lib.lora import LoRALinear
from lora_lib.rank import cumulative_energy, k90

WIDTH, NORMAL, TALL = 10, 4.2, 5

# Okabe & Ito's palette, told apart with any kind of colour vision, and darker kin of two of them.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#222222", "#767676"
DARK_GREEN, BROWN, PALE = "#005C43", "#7A4A00", "#D2D2D2"

# A method has one colour in all figures, and the colour means nothing else. Black and grey are for
# what is compared with: noise, chance, limits.
LORA, FULL, SCRATCH, SCRATCH_LONG = BLUE, RED, GREEN, DARK_GREEN
HEAD, CONTEXT_TABLE, LETTER_TABLE = PURPLE, ORANGE, BROWN

# Settings of LoRA (ranks, alphas, targets) are blues, from light to dark.
BLUES = ("#A9D3F0", SKY, "#2B93CF", BLUE, "#00588A", "#003F63", "#00263D")

# The marker and the hatch of each colour.
MARKS = dict(zip(BLUES, ("v", "D", "^", "o", "s", "P", "X"), strict=True))
MARKS = {color: (marker, "") for color, marker in MARKS.items()} | {
    RED: ("s", "//"),
    GREEN: ("^", ".."),
    DARK_GREEN: ("v", "--"),
    PURPLE: ("D", "oo"),
    ORANGE: ("P", "\\\\"),
    BROWN: ("X", "xx"),
    BLACK: ("d", ""),
    GREY: ("p", ""),
}

STYLE = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "grid.alpha": 0.25,
    "hatch.color": "white",
    "hatch.linewidth": 1.2,
    "lines.linewidth": 2.2,
    "lines.markersize": 8,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
}


def figure(columns: int = 1, rows: int = 1, height: float = NORMAL):
    """A figure and its axes (one, or an array), in the course's style."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns)


def show(fig, name: str, alt: str) -> None:
    """Display a figure with alt text. It is also written to `name`.png in the folder that the
    environment variable LORA_LIB_FIGURES names, as `make notebooks` does."""
    import PIL.Image
    from IPython.display import Image, display

    drawn, small = io.BytesIO(), io.BytesIO()
    fig.savefig(drawn, format="png", dpi=150)
    # 256 colours are enough for a drawing, and make a third of the file.
    PIL.Image.open(drawn).convert("RGB").quantize(256).save(small, "png", optimize=True)
    folder = os.environ.get("LORA_LIB_FIGURES")
    if folder:
        (Path(folder) / f"{name}.png").write_bytes(small.getvalue())
    display(Image(small.getvalue(), width=100 * WIDTH, alt=alt))


def blues(count: int) -> tuple[str, ...]:
    """`count` (1 to 7) of BLUES, from light to dark; up to three without the palest and the
    darkest."""
    shades = BLUES[1:-1] if count <= 3 else BLUES
    return tuple(shades[round(k * (len(shades) - 1) / max(count - 1, 1))] for k in range(count))


def mark_recorded(ax) -> None:
    """Say on the axes that the numbers come from committed results."""
    ax.text(
        1.0, 1.01, "recorded", transform=ax.transAxes, ha="right", va="bottom", color=GREY, size=12
    )


def line(
    ax, xs: Sequence[float], ys: Sequence[float], color: str, label: str = "", **style
) -> None:
    """A line in a colour of the palette, with the colour's marker on a dozen points at most."""
    style = {"marker": MARKS[color][0], "markevery": -(-len(xs) // 12)} | style
    ax.plot(xs, ys, color=color, label=label, **style)


def line_with_spread(
    ax, xs: Sequence[float], groups: Sequence[Sequence[float]], color: str, label: str = ""
) -> None:
    """Mean of every group over its seeds as a line; the band runs from lowest to highest."""
    line(ax, xs, [mean(g) for g in groups], color, label)
    ax.fill_between(xs, [min(g) for g in groups], [max(g) for g in groups], color=color, alpha=0.18)


def bars_with_spread(
    ax, labels: Sequence[str], groups: Mapping[str, Sequence[Sequence[float]]], colors: Sequence
) -> None:
    """Bars side by side: one block for each label, one colour for each group; a whisker from the
    lowest to the highest seed, where there are several."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=4, foreground="white")]
    width = 0.84 / len(groups)
    for k, ((name, values), color) in enumerate(zip(groups.items(), colors, strict=True)):
        xs = [i + (k - (len(groups) - 1) / 2) * width for i in range(len(labels))]
        means = [mean(v) for v in values]
        ax.bar(xs, means, width * 0.94, label=name, color=color, hatch=MARKS[color][1])
        for x, v in zip(xs, values, strict=True):
            if len(v) > 1:
                ax.plot([x, x], [min(v), max(v)], color=BLACK, lw=1.6, path_effects=halo)
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(axis="x", visible=False)


# --- 01: rank ------------------------------------------------------------------------------------


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


# --- 04: training --------------------------------------------------------------------------------


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


# --- 03: the transformer -------------------------------------------------------------------------


def attention_maps(maps: Mapping[str, tuple[Tensor, str]], columns: Sequence[str]):
    """One head's attention while it writes: a panel for each (weights, what was written)."""
    fig, axes = figure(len(maps), height=TALL)
    for ax, (title, (weights, written)) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(columns)), columns)
        for label in ax.get_xticklabels():
            if len(label.get_text()) > 1:  # BOS and SEP are wider than a column
                label.set_rotation(90)
        ax.set_yticks(range(len(written)), list(written))
        ax.set(title=title, xlabel="looks at", ylabel="writes")
        ax.grid(visible=False)
    fig.colorbar(image, ax=axes, label="attention weight", location="bottom", aspect=50)
    return fig


def parameters_by_target(counts: Mapping[tuple[str, int], int], total: int):
    """Trainable parameters for every (targets, rank), with their share of the base's `total`."""
    fig, ax = figure()
    labels = list(dict.fromkeys(label for label, _ in counts))
    ranks = list(dict.fromkeys(rank for _, rank in counts))
    groups = {f"r = {rank}": [[counts[label, rank]] for label in labels] for rank in ranks}
    bars_with_spread(ax, labels, groups, blues(len(ranks)))
    for bars, rank in zip(ax.containers, ranks, strict=True):
        shares = [f"{counts[label, rank] / total:.1%}" for label in labels]
        ax.bar_label(bars, shares, padding=3, fontsize=12)
    ax.set(title="Trainable parameters, and their share of the base's", ylabel="parameters")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.legend(loc="upper left")
    return fig


# --- going deeper: speed -------------------------------------------------------------------------

# What is timed (lora_course.experiments.timing); every way to compute LoRA is a blue.
TIMED = {
    "lora_lib": LORA,
    "lora_lib, fused": BLUES[4],
    "PEFT": BLUES[1],
    "PEFT without casts": BLUES[0],
    "loralib": BLUES[6],
    "full": FULL,
    "frozen": GREY,
}


def step_times(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    widths: Sequence[int],
    decoder: Mapping[str, tuple[float, float]],
):
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
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, map(str, widths))
        ax.set(title=title, xlabel="width of the layers", ylim=(0, None))
        mark_recorded(ax)
    axes[0, 0].set_ylabel("step time, full = 1")
    for name, (ms, gb) in decoder.items():
        color = TIMED[name]
        bar = wide.barh(name, ms, color=color, hatch=MARKS[color][1])
        wide.bar_label(bar, [f"{ms:.0f} ms, {gb:.0f} GB"], padding=3, fontsize=12)
    longest = max(ms for ms, _ in decoder.values())
    wide.set(title="A step of a decoder, 4096 wide, on the GPU", xticks=[], xlim=(0, 1.2 * longest))
    wide.grid(visible=False)
    wide.invert_yaxis()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    mark_recorded(wide)
    return fig


# --- 07: the course in one picture ---------------------------------------------------------------


def lora_in_one_picture(
    layer: LoRALinear,
    share: float,
    town: str,
    written: Mapping[str, tuple[str, bool]],
    scores: Mapping[str, float],
):
    """What LoRA is, what it does, and what it is worth: three panels.

    `layer`: gives W, A and B their shapes; `share`: of the model's parameters that is trained;
    `written`: by script, the base's own first, (the town as the model writes it, whether it was
    recorded so); `scores`: exact match by method, in the order full fine-tuning, LoRA, context
    table, from scratch. Fonts without the letters of a script leave boxes: DejaVu Sans has no
    Hangul and no kana.
    """
    fig, (idea, names, result) = figure(3, height=TALL)
    fig.get_layout_engine().set(w_pad=0.15, h_pad=0.15, wspace=0.06)
    titles = ("Two thin matrices learn", "One base, many scripts", "Right on unseen towns")
    for ax, title in zip((idea, names, result), titles, strict=True):
        ax.set_title(title, pad=12)
        ax.set(xlim=(0, 3.1), ylim=(-0.5, 4), aspect="equal", anchor="S")
        ax.axis("off")
    _draw_idea(idea, layer, share)
    _draw_town(names, town, written)
    scale = 2.4 / max(scores.values())
    colors = (FULL, LORA, CONTEXT_TABLE, SCRATCH)
    for k, ((name, score), color) in enumerate(zip(scores.items(), colors, strict=True)):
        y = 3.6 - 0.95 * k
        result.barh(y - 0.32, scale * score, 0.34, color=color, hatch=MARKS[color][1])
        result.text(0, y, name, va="center")
        result.text(scale * score + 0.1, y - 0.32, f"{score:.0%}", va="center", size=16)
    result.text(0, -0.5, "mean of six scripts, recorded", color=GREY, size=12)
    return fig


def _draw_idea(ax, layer: LoRALinear, share: float) -> None:
    """W + BA drawn to scale, the formula, and the trained share as a bar."""
    from matplotlib.patches import Rectangle

    (d_out, d_in), r = layer.weight.shape, layer.rank
    unit, top = 1.3 / max(d_out, d_in), 3.7
    for x, rows, columns, color in (
        (0, d_out, d_in, PALE),
        (1.62, d_out, r, LORA),
        (1.8, r, d_in, LORA),
    ):
        corner = x, top - rows * unit
        ax.add_patch(Rectangle(corner, columns * unit, rows * unit, color=color, lw=0))
    words = dict(ha="center", va="center")
    ax.text(0.65, 3.05, f"$W$\nfrozen\n{d_out} × {d_in}", size=14, **words)
    ax.text(1.46, 3.05, "+", size=20, **words)
    ax.text(2.45, 3.05, f"$B$, $A$\ntrained\nrank {r}", color=LORA, size=14, **words)
    ax.text(1.55, 1.55, r"$h = W x + \frac{\alpha}{r}\, B A x$", size=22, **words)
    ax.barh(0.35, 3.1, 0.24, color=PALE)
    ax.barh(0.35, 3.1 * share, 0.24, color=LORA)
    ax.text(0, 0.62, f"trained: {share:.1%} of the parameters")
    ax.text(0, -0.5, "all the rest stays as it is", color=GREY, size=12)


def _draw_town(ax, town: str, written: Mapping[str, tuple[str, bool]]) -> None:
    """A row for the base and one for each adapter; a tick where the spelling was recorded."""
    ax.text(0, 3.6, "you type", va="center", color=GREY)
    ax.text(1.25, 3.6, town, va="center", size=20, weight="bold")
    for k, (script, (name, right)) in enumerate(written.items()):
        y = 2.9 - 0.65 * k
        ax.text(0, y, f"+ {script}" if k else "base", va="center", color=LORA if k else GREY)
        ax.text(1.25, y, name, va="center", size=20)
        ax.text(2.85, y, "✓" if right else "", va="center", size=16)
    ax.text(0, -0.5, "✓ a recorded spelling", color=GREY, size=12)
