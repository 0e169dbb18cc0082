"""One look for every figure. Matplotlib is imported when the first figure is drawn.

A figure is WIDTH inches wide and NORMAL or TALL inches high, and is shown at 100 pixels an inch, so
that its 12-point text is as large as the text around it. A colour of the palette never comes
alone: a marker (for lines) and a hatch (for bars) go with it, for whoever does not see the colour.
"""

import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from lora_course.claims import strict
from lora_course.figures.readable import complaints

WIDTH, NORMAL, TALL = 10, 4.2, 5

Numbers = Sequence[float]  # along a line, or one a seed
Groups = Sequence[Numbers]  # of seeds, along a line or beside each other

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


def figure(columns: int = 1, rows: int = 1, height: float = NORMAL, recorded: bool = False):
    """A figure and its axes (one, or an array), in the course's style; if `recorded`, the axes say
    that the numbers come from committed results."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(rows, columns)
    for ax in fig.axes if recorded else ():
        mark_recorded(ax)
    return fig, axes


@dataclass
class Picture:
    """A figure with its words, shown where it ends a cell.

    One that is hard to read is an error where LORA_LIB_STRICT=1, as a claim that does not hold is.
    `caption` says in a sentence what to see; `alt` is for whoever does not see it. The picture is
    also written to `name`.png in the folder that the environment variable LORA_LIB_FIGURES names,
    as `make notebooks` does.
    """

    fig: "matplotlib.figure.Figure"  # noqa: F821
    name: str
    caption: str
    alt: str

    def __post_init__(self) -> None:
        if strict() and (found := complaints(self.fig)):
            raise AssertionError(f"the figure {self.name} is hard to read: {'; '.join(found)}")

    def png(self, dpi: int = 150) -> bytes:
        import PIL.Image

        drawn, small = io.BytesIO(), io.BytesIO()
        self.fig.savefig(drawn, format="png", dpi=dpi)
        # 256 colours are enough for a drawing, and make a third of the file.
        PIL.Image.open(drawn).convert("RGB").quantize(256).save(small, "png", optimize=True)
        return small.getvalue()

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, Image, display

        png, folder = self.png(), os.environ.get("LORA_LIB_FIGURES")
        if folder:
            (Path(folder) / f"{self.name}.png").write_bytes(png)
        display(Image(png, width=100 * WIDTH, alt=self.alt))
        # JupyterLab gives no alt text to an image of a notebook, so that the caption carries it.
        caption, alt = html.escape(self.caption), html.escape(self.alt, quote=True)
        display(HTML(f'<div role="img" aria-label="{alt}"><em>{caption}</em></div>'))


def blues(count: int) -> tuple[str, ...]:
    """`count` (1 to 7) of BLUES, from light to dark; up to three without the palest and the
    darkest."""
    shades = BLUES[1:-1] if count <= 3 else BLUES
    return tuple(shades[round(k * (len(shades) - 1) / max(count - 1, 1))] for k in range(count))


def means(groups: Groups, form: str = ".2f") -> str:
    """The mean of every group, for an alt text: "0.31, 0.52"."""
    return ", ".join(f"{mean(group):{form}}" for group in groups)


def means_by_name(groups: Mapping[str, Groups], form: str = ".2f") -> str:
    """The same for several names: "LoRA: 0.31, 0.52; full: 0.33, 0.56"."""
    return "; ".join(f"{name}: {means(mine, form)}" for name, mine in groups.items())


def heading(fig, title: str) -> None:
    """A title over all axes of a figure."""
    fig.suptitle(title, x=0.01, ha="left", size=14, weight="bold")


def star(ax, x: float, y: float, color: str, **style) -> None:
    """The mark of the best."""
    ax.plot(x, y, "*", color=color, ms=20, **style)


def log_ticks(ax, values: Numbers, base: int = 10, form: str = "{:g}") -> None:
    """A logarithmic x-axis with a tick at each of these values, and at no other."""
    ax.set_xscale("log", base=base)
    ax.set_xticks(values, map(form.format, values))
    ax.minorticks_off()


def box(
    ax, x: float, y: float, width: float, height: float, fill: str, text: str = "", **style
) -> None:
    """A filled rectangle from its lower left corner, with text in its middle."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x, y), width, height, color=fill, lw=0))
    ax.text(x + width / 2, y + height / 2, text, **{"ha": "center", "va": "center"} | style)


def mark_recorded(ax) -> None:
    """Say on the axes that the numbers come from committed results."""
    ax.text(
        1.0, 1.01, "recorded", transform=ax.transAxes, ha="right", va="bottom", color=GREY, size=12
    )


def line(ax, xs: Numbers, ys: Numbers, color: str, label: str = "", **style) -> None:
    """A line in a colour of the palette, with the colour's marker on a dozen points at most."""
    style = {"marker": MARKS[color][0], "markevery": -(-len(xs) // 12)} | style
    ax.plot(xs, ys, color=color, label=label, **style)


def line_with_spread(ax, xs: Numbers, groups: Groups, color: str, label: str = "") -> None:
    """Mean of every group over its seeds as a line; the band runs from lowest to highest."""
    line(ax, xs, [mean(g) for g in groups], color, label)
    ax.fill_between(xs, [min(g) for g in groups], [max(g) for g in groups], color=color, alpha=0.18)


def lines_with_spread(
    ax, xs: Numbers, groups: Mapping[str, Groups], colors: Iterable[str], **ticks
) -> None:
    """The same for several names, each in its colour, over `log_ticks` at `xs`."""
    for (name, mine), color in zip(groups.items(), colors, strict=False):
        line_with_spread(ax, xs, mine, color, name)
    log_ticks(ax, xs, **ticks)


def bars_from_the_top(
    ax,
    values: Mapping[str, float],
    colors: Sequence[str],
    ends: Sequence[str],
    thick: float = 0.8,
    **style,
) -> None:
    """Horizontal bars by name, the first on top, each with a word at its end."""
    bars = ax.barh(list(values), list(values.values()), thick, color=colors)
    for bar, color in zip(bars, colors, strict=True):
        bar.set_hatch(MARKS[color][1])
    ax.bar_label(bars, ends, **{"padding": 3, "fontsize": 12} | style)
    ax.set(xticks=[])
    ax.grid(visible=False)
    ax.invert_yaxis()


def bars_with_spread(
    ax, labels: Sequence[str], groups: Mapping[str, Groups], colors: Sequence
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
