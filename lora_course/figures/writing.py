"""Figures of the page on a language model that writes docstrings."""

from statistics import mean

from lora_course.figures.style import *

TARGETS = {"q, v": BLUES[1], "all linear": LORA}


def bits_by_parameters(runs) -> Picture:
    """Bits per character against what is trained: LoRA as a line over its ranks for each choice of
    targets, full fine-tuning as a point, what trains nothing as a level (runs as
    `docstring_runs` gives them)."""
    fig, ax = figure(height=TALL, recorded=True)
    told = []
    for name, color in (("as it comes", GREY), ("eight examples", BLACK)):
        bits = runs[runs.setting.eq(name)].bits.mean()
        ax.axhline(bits, color=color, ls="--")
        label = f"{name}{' in the prompt' if color == BLACK else ''}: nothing is trained"
        ax.text(5e4, bits + 0.01, label, color=color, size=12)
        told.append(f"{name} {bits:.2f}")
    for (targets, color), below in zip(TARGETS.items(), (9, -20), strict=True):
        found = runs[runs.targets.eq(targets)].groupby(["trainable", "rank"]).bits
        groups = [list(seeds) for _, seeds in found]
        line_with_spread(ax, [n for n, _ in found.groups], groups, color, f"LoRA on {targets}")
        for (trainable, rank), seeds in zip(found.groups, groups, strict=True):
            told.append(f"LoRA r = {rank} on {targets} {mean(seeds):.2f}")
            where = {"xytext": (0, below), "textcoords": "offset points"}
            ax.annotate(f"r = {rank}", (trainable, mean(seeds)), ha="center", size=12, **where)
    full = runs[runs.method.eq("full")]
    line(ax, [full.trainable.iloc[0]], [full.bits.mean()], FULL, "full fine-tuning", ls="", ms=11)
    ax.set_xscale("log")
    ax.set(xlabel="trained parameters", ylabel="bits per character (↓ better)", ylim=(0.7, 1.32))
    ax.set_title("LoRA beats examples in the prompt, full fine-tuning beats LoRA")
    ax.legend(loc="upper right", bbox_to_anchor=(1, 0.88))
    return Picture(
        fig,
        "writing_bits",
        "What 400 unseen docstrings cost each model: the lower, the less they surprise it.",
        "Bits per character against trained parameters: "
        f"{', '.join(told)}, full fine-tuning {full.bits.mean():.2f}.",
    )


def news_by_docstrings(looks, levels: Numbers) -> Picture:
    """Bits of English news against those of docstrings while training, means over seeds (see
    `looks_of`): a panel for each choice of LoRA's targets, full fine-tuning in both, dotted lines
    where runs are compared."""
    fig, axes = figure(2, height=TALL, recorded=True)
    ends = []
    for ax, targets in zip(axes, TARGETS, strict=True):
        colors = {f"LoRA r={r} on {targets}": c for r, c in zip((1, 8, 32), blues(3), strict=True)}
        for name, color in (colors | {"full fine-tuning": FULL}).items():
            track = looks[looks.setting.eq(name)].groupby("step")[["learned", "news"]].mean()
            line(ax, track.learned, track.news, color, name.removesuffix(f" on {targets}"), ms=7)
            ends.append(f"{name} {track.news.iloc[-1]:.2f} at {track.learned.iloc[-1]:.2f}")
        ax.axhline(looks.news.iloc[0], color=GREY, ls="--", lw=1.4)
        for level in levels:
            ax.axvline(level, ls=":", color=BLACK)
        limits = {"xlim": (1.3, 0.73), "ylim": (1.065, 1.145)}
        ax.set(title=f"LoRA on {targets}", xlabel="bits of docstrings (better →)", **limits)
    axes[0].set_ylabel("bits of English news (↑ forgotten)")
    axes[0].legend(loc="upper left")
    return Picture(
        fig,
        "writing_news",
        "Read from left to right: docstrings are learned. The whole height is 0.08 bits.",
        "Two panels, lines of news against docstrings in training, means of five seeds. All start "
        f"at {looks.news.iloc[0]:.2f}, fall a little, then rise; at the end: {', '.join(ends)}.",
    )
