"""Figures of notebook 07: a layer to name from memory, and the course in one picture."""

from collections.abc import Mapping

from lora_course.figures.style import *
from lora_course.tables import RIGHT, WRONG
from lora_lib.lora import LoRALinear


def from_memory() -> Picture:
    """A LoRA layer with numbers where its labels were."""
    fig, ax = figure(height=3.6)
    for x, y, width, height, color, number in (
        (3.2, 2.3, 2.0, 2.0, PALE, 1),
        (2.6, 0.7, 2.0, 0.5, LORA, 2),
        (5.3, -0.05, 0.5, 2.0, LORA, 3),
    ):
        ink = BLACK if color == PALE else "white"
        box(ax, x, y, width, height, color, number, size=20, color=ink)
    ring = dict(boxstyle="circle", fc="white", ec=BLACK, lw=1.6)
    for x, y, number in ((6.9, 0.95, 4), (8.0, 2.0, 5)):
        ax.text(x, y, str(number), ha="center", va="center", size=18, bbox=ring)
    for start, end in (
        ((1.4, 2.1), (3.1, 3.1)),
        ((1.4, 1.9), (2.5, 1.05)),
        ((4.7, 0.95), (5.2, 0.95)),
        ((5.9, 0.95), (6.55, 0.95)),
        ((5.3, 3.3), (7.7, 2.25)),
        ((7.2, 1.15), (7.75, 1.75)),
        ((8.35, 2.0), (9.1, 2.0)),
    ):
        ax.annotate("", end, start, arrowprops=dict(arrowstyle="->", lw=1.6))
    ax.text(1.1, 2.0, "x", size=20, ha="center", va="center")
    ax.text(9.4, 2.0, "h", size=20, ha="center", va="center")
    ax.set(title="Which part is which?", xlim=(0.3, 10.2), ylim=(-0.3, 4.4), aspect="equal")
    ax.axis("off")
    return Picture(
        fig,
        "07_from_memory",
        "A LoRA layer without its labels. Blue is trained, the rest is not.",
        "A drawing with five numbers for labels. x goes into a large grey square, 1; and beside it "
        "into a flat blue box, 2, then a tall thin blue box, 3, and a small ring, 4. Both "
        "ways meet in a ring, 5, from which h leaves.",
    )


def lora_in_one_picture(
    layer: LoRALinear,
    share: float,
    town: str,
    written: Mapping[str, tuple[str, bool]],
    scores: Mapping[str, float],
) -> Picture:
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
    told = {True: "", False: ", not as recorded"}
    names = ", ".join(f"{name} ({script}{told[ok]})" for script, (name, ok) in written.items())
    bars = ", ".join(f"{name} {score:.0%}" for name, score in scores.items())
    return Picture(
        fig,
        "lora_in_one_picture",
        "What LoRA is, what it does, and what it is worth.",
        "Three panels. The idea: beside a large frozen matrix W stand two thin ones, B and A, of "
        f"rank {layer.rank}; h = Wx + (α/r) BAx; {share:.1%} of the parameters are trained. What "
        f"it does: {town} as the base writes it, and with one adapter after another: {names}. "
        "What it is worth: bars of the share of unseen towns that is right, mean of six scripts: "
        f"{bars}.",
    )


def _draw_idea(ax, layer: LoRALinear, share: float) -> None:
    """W + BA drawn to scale, the formula, and the trained share as a bar."""
    (d_out, d_in), r = layer.weight.shape, layer.rank
    unit, top = 1.3 / max(d_out, d_in), 3.7
    for x, rows, columns, color in (
        (0, d_out, d_in, PALE),
        (1.62, d_out, r, LORA),
        (1.8, r, d_in, LORA),
    ):
        box(ax, x, top - rows * unit, columns * unit, rows * unit, color)
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
    """A row for the base and one for each adapter, and whether the spelling was recorded so."""
    ax.text(0, 3.6, "you type", va="center", color=GREY)
    ax.text(1.25, 3.6, town, va="center", size=20, weight="bold")
    for k, (script, (name, right)) in enumerate(written.items()):
        y = 2.9 - 0.65 * k
        ax.text(0, y, f"+ {script}" if k else "base", va="center", color=LORA if k else GREY)
        ax.text(1.25, y, name, va="center", size=20)
        mark, color = ("✓", RIGHT) if right else ("✗", WRONG)
        ax.text(2.85, y, mark, va="center", size=16, color=color)
    ax.text(0, -0.5, "✓ as recorded, ✗ not", color=GREY, size=12)
