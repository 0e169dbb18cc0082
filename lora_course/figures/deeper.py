"""Figures of the pages in going_deeper."""

from collections.abc import Mapping, Sequence

from lora_course.figures.style import (
    BLACK,
    BLUES,
    CONTEXT_TABLE,
    FULL,
    GREY,
    HEAD,
    LETTER_TABLE,
    LORA,
    MARKS,
    NORMAL,
    SCRATCH,
    SCRATCH_LONG,
    TALL,
    Picture,
    bars_with_spread,
    figure,
    line,
    line_with_spread,
    mark_recorded,
)

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
    widest = {title: ratios["lora_lib"][max(widths)] for title, ratios in panels.items()}
    told = ", ".join(f"{ratio:.2f} in the panel {title}" for title, ratio in widest.items())
    bars = ", ".join(f"{name} {ms:.0f} ms" for name, (ms, _) in decoder.items())
    return Picture(
        fig,
        "deeper_step_times",
        "Below the dashed line LoRA's step is shorter than full fine-tuning's.",
        "Lines: step time over full fine-tuning's against the width. On narrow layers each LoRA is "
        f"slower than training everything; at the largest width lora_lib is at {told}. "
        f"Bars: one step of a decoder 4096 wide on the GPU: {bars}.",
    )


# --- methods, script by script and by the number of pairs ----------------------------------------


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
