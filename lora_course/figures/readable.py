"""Whether a figure can be read: asked of every figure when the tests run the pages.

As for claims, LORA_LIB_STRICT=1 makes a figure that cannot be read an error (see `Picture`).
"""

from itertools import combinations


def complaints(fig) -> list[str]:
    """What is wrong with a figure, in words: small text, text that leaves the page or lies on
    other text, and two entries of a legend that nothing but colour tells apart."""
    from unittest.mock import patch

    from matplotlib.text import Text

    drawn, draw = {}, Text.draw

    def note(text, *arguments, **named):  # a figure also holds ticks that nobody sees
        draw(text, *arguments, **named)
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent().padded(-1, -2)  # it has room for the tallest letters
            drawn[id(text)] = text.get_text(), text.get_fontsize(), box

    with patch.object(Text, "draw", note):
        fig.draw_without_rendering()
    shown, page = list(drawn.values()), fig.bbox.padded(1)
    found = [f"{text!r} has {points} points" for text, points, _ in shown if points < 12]
    found += [f"{text!r} leaves the figure" for text, _, box in shown
              if not (page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1))]  # fmt: skip
    found += [f"{a!r} lies on {b!r}" for (a, _, one), (b, _, other) in combinations(shown, 2)
              if one.overlaps(other)]  # fmt: skip
    for ax in fig.axes:
        entries = [(one, (one.get_marker(), one.get_linestyle()), 0) for one in ax.lines]
        entries += [(bars, bars[0].get_hatch(), _lightness(bars[0].get_facecolor()))
                    for bars in ax.containers if hasattr(bars, "patches")]  # fmt: skip
        told = [(e.get_label(), *how) for e, *how in entries if e.get_label()[:1] not in ("_", "")]
        found += [f"{a!r} and {b!r} differ in colour alone"
                  for (a, mark, light), (b, its, its_light) in combinations(told, 2)
                  if mark == its and abs(light - its_light) < 0.08]  # fmt: skip
    return found


def _lightness(color) -> float:
    return sum(part * weight for part, weight in zip(color, (0.3, 0.59, 0.11), strict=False))
