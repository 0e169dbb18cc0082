"""What every figure keeps to, wherever it is drawn: those of lora_course.figures are checked in
test_figures.py, those that notebooks draw themselves in test_notebooks.py."""

from itertools import combinations
from unittest.mock import patch

import matplotlib.colors
from colorspacious import cspace_convert, deltaE
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from other_eyes import seen_by

from lora_course import figures

# 12 points where a figure is shown at 1,000 pixels are 11 in the README, which shows 900.
SMALLEST_TEXT = 12
EYES = ("usual", "protanomaly", "deuteranomaly", "tritanomaly")
# In units of CAM02-UCS, in which 1 is about the least difference that is seen side by side.
FAR_ENOUGH = 10
# Of CIE L*, from black 0 to white 100: what is left on a printer without colour.
LIGHTER = 10


def distance(one: str, other: str) -> float:
    """The least difference of two colours among all kinds of eyes, CAM02-UCS."""
    one, other = map(matplotlib.colors.to_rgb, (one, other))
    return min(
        deltaE(seen_by(eyes, one), seen_by(eyes, other), input_space="sRGB1") for eyes in EYES
    )


def lightness(color: str) -> float:
    return float(cspace_convert(matplotlib.colors.to_rgb(color), "sRGB1", "CIELab")[0])


def complaints(fig) -> list[str]:
    """What is wrong with a figure, in words; empty when nothing is."""
    return [*_size(fig), *_text(fig), *(found for ax in fig.axes for found in _marks(ax))]


def _size(fig):
    width, height = fig.get_size_inches()
    heights = (figures.NORMAL, figures.TALL, 2 * figures.NORMAL)  # the last for two rows
    if width != figures.WIDTH or height not in heights:
        yield f"{width} × {height} is none of the sizes"


def _text(fig):
    shown = _drawn_text(fig)
    for text, points, _ in shown:
        if points < SMALLEST_TEXT:
            yield f"{text!r} has {points} points"
    page = fig.bbox.padded(1)
    for text, _, box in shown:
        if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1)):
            yield f"{text!r} leaves the figure"
    for (one, _, box), (other, _, its) in combinations(shown, 2):
        if box.overlaps(its):
            yield f"{one!r} lies on {other!r}"


def _drawn_text(fig) -> list[tuple[str, float, Bbox]]:
    """Text, points and place of what is drawn: a figure also holds ticks that nobody sees."""
    drawn, draw = {}, Text.draw

    def note(text, *arguments, **named):
        draw(text, *arguments, **named)
        if text.get_visible() and text.get_text().strip():
            # A box has room for the tallest letters and the lowest; what is left must not touch.
            box = text.get_window_extent().padded(-1, -2)
            drawn[id(text)] = text.get_text(), text.get_fontsize(), box

    with patch.object(Text, "draw", note):
        fig.draw_without_rendering()
    return list(drawn.values())


def _marks(ax):
    """What a legend tells apart differs for every eye, and without colour by more than colour."""
    series = [
        (one.get_label(), one.get_color(), (one.get_marker(), one.get_linestyle()))
        for one in ax.lines
    ] + [
        (bars.get_label(), bars.patches[0].get_facecolor(), bars.patches[0].get_hatch())
        for bars in ax.containers
        if hasattr(bars, "patches") and bars.patches
    ]
    named = [s for s in series if s[0] and not s[0].startswith("_")]
    known = {matplotlib.colors.to_hex(color) for color in figures.MARKS}
    for name, color, _ in named:
        if matplotlib.colors.to_hex(color) not in known:
            yield f"{name!r} has the colour {color}, which is not of the palette"
    for (one, color, mark), (other, its_color, its_mark) in combinations(named, 2):
        if matplotlib.colors.same_color(color, its_color):
            if mark == its_mark:
                yield f"{one!r} and {other!r} look the same"
            continue
        far = distance(color, its_color)
        if far < FAR_ENOUGH:
            yield f"{one!r} and {other!r} are {far:.1f} apart for some eyes"
        if mark == its_mark and abs(lightness(color) - lightness(its_color)) < LIGHTER:
            yield f"{one!r} and {other!r} look the same in grey"
