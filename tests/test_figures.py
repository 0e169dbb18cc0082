"""Figures draw the numbers they are given, and one that is hard to read is an error: the pages
draw every figure. No picture is compared."""

import html
import io

import matplotlib.image
import numpy as np
import pytest
import torch

from lora_course import figures
from lora_course.figures.readable import complaints
from lora_lib import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import LoRALinear


def data(line) -> tuple[list, list]:
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def line(ax, label: str):
    [found] = [one for one in ax.lines if one.get_label() == label]
    return found


def names(texts) -> list[str]:
    return [text.get_text() for text in texts]


def test_a_figure_that_is_hard_to_read_is_an_error_in_the_tests_of_the_pages(monkeypatch):
    fig, ax = figures.figure()
    for place, text, size in ((0.5, "one", 12), (0.501, "two", 12), (0.3, "small", 9)):
        ax.text(place, 0.5, text, size=size)
    fig.text(0.99, 0.5, "outside")
    for name, colour in (("first", figures.RED), ("second", figures.GREEN)):
        ax.plot([0, 1], [0, 1], color=colour, label=name)
    ax.legend()
    assert complaints(fig) == [
        "'small' has 9.0 points",
        "'outside' leaves the figure",
        "'one' lies on 'two'",
        "'first' and 'second' differ in colour alone",
    ]
    monkeypatch.setenv("LORA_LIB_STRICT", "1")
    with pytest.raises(AssertionError, match="figure hard is hard to read: 'small' has"):
        figures.Picture(fig, "hard", "Caption.", "Alt text.")


def test_a_figure_is_shown_with_its_alt_text_and_kept_where_asked(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.delenv("LORA_LIB_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    picture = figures.visualize_lora_hyperparameters()
    assert len(picture.fig.axes) == 2  # as in part 6 of the lesson that the course grew from
    picture._ipython_display_()
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("LORA_LIB_FIGURES", str(tmp_path))
    picture._ipython_display_()
    image, caption, again, _ = shown
    kept = {"width": 1000, "alt": picture.alt}
    assert image._repr_mimebundle_()[1]["image/png"] == kept
    assert image.data == again.data == (tmp_path / f"{picture.name}.png").read_bytes()
    assert matplotlib.image.imread(io.BytesIO(image.data)).shape == (630, 1500, 4)  # sharp
    page = html.unescape(caption.data)
    assert f'aria-label="{picture.alt}"' in page and f"<em>{picture.caption}</em>" in page


def test_hebrew_runs_from_right_to_left():
    """The first letter, alone at the right end, makes the last columns of ink."""

    def ink(text):
        fig, ax = figures.figure()
        ax.axis("off")
        ax.text(0.5, 0.5, text, size=40, ha="right")
        fig.canvas.draw()
        dark = np.asarray(fig.canvas.buffer_rgba())[..., 0] < 128
        return dark[:, np.flatnonzero(dark.any(axis=0))[-1] + np.arange(-15, 1)]

    assert (ink("בן") == ink("ב")).mean() > 0.999 > (ink("בן") == ink("ן")).mean()


def test_the_map_says_what_trains_as_the_model_changes(base):
    for change, title, boxes in (
        (lambda model: None, "944,163 of 944,163 parameters train", (0, 0, 25)),
        (add_lora_to_model, "829,475 of 960,547 parameters train, 86.4 %", (0, 8, 17)),
        (freeze_non_lora_params, "16,384 of 960,547 parameters train, 1.7 %", (17, 8, 0)),
    ):
        change(base)
        drawn = figures.model_map(base)
        assert [ax.get_title(loc="left") for ax in drawn.fig.axes] == [title]
        words = "boxes: {} frozen; {} LoRA: only A and B train; {} all of it trains."
        assert words.format(*boxes) in drawn.alt


# --- the numbers ---------------------------------------------------------------------------------

GROUPS = [[1.0, 2.0, 6.0], [4.0], [5.0, 7.0]]
MEANS, LOWEST, HIGHEST = [3, 4, 6], [1, 4, 5], [6, 4, 7]


def test_spread_is_drawn_as_mean_lowest_and_highest():
    _, ax = figures.figure()
    figures.line_with_spread(ax, [10, 20, 40], GROUPS, figures.RED, "name")
    assert data(line(ax, "name")) == ([10, 20, 40], MEANS)
    corners = set(map(tuple, ax.collections[0].get_paths()[0].vertices))
    assert corners == set(zip([10, 20, 40] * 2, LOWEST + HIGHEST, strict=True))
    _, ax = figures.figure()
    figures.bars_with_spread(ax, ["x", "y", "z"], {"first": GROUPS}, [figures.RED])
    assert [bar.get_height() for bar in ax.containers[0]] == MEANS
    assert [data(whisker)[1] for whisker in ax.lines] == [[1, 6], [5, 7]]


def test_a_star_stands_at_the_best_rate_of_each_rank_under_each_rule():
    rows = {
        "α = 2r": {1: {0.01: 0.9, 0.02: 0.8}, 64: {0.001: 0.5, 0.002: 0.6, 0.01: 1.5}},
        "α = 16": {1: {0.005: 0.9, 0.01: 0.85}, 64: {0.01: 0.5, 0.02: 0.6}},
    }
    picture = figures.rate_and_rank(rows, full_rate=0.002)
    limit, valley, star = (data(one) for one in picture.fig.axes[1].lines)
    assert (limit[0], valley[0]) == ([0.002, 0.002], [0.001, 0.002, 0.01])
    assert star == ([0.001], [0.5])
    assert "α = 2r: 0.02 at r = 1, 0.001 at r = 64; α = 16: 0.01 at r = 1, 0.01" in picture.alt
    assert "stands at 0.002" in picture.alt


def test_the_size_of_a_change_is_that_of_the_layers_of_the_model():
    layer = LoRALinear(torch.nn.Linear(2, 2, bias=False), rank=1, alpha=1.0)
    with torch.no_grad():
        layer.original.weight.copy_(torch.eye(2))  # its norm is √2
        layer.lora_A.fill_(1.5)
        layer.lora_B.fill_(1)  # ΔW is 1.5 everywhere, and its norm 3
    picture = figures.change_sizes(torch.nn.ModuleDict({"head": layer}))
    [ax] = picture.fig.axes
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([3 / 2**0.5])
    assert "2.12" in names(ax.texts) and "to 2.12 (head)" in picture.alt


def test_the_picture_draws_to_scale_what_it_is_given():
    written = {"Cyrillic": ("Бремен", True), "Greek": ("Μπρέμεν", False), "Hebrew": ("ברמן", True)}
    found = {"full": 0.43, "LoRA, r = 8": 0.39, "counting letters": 0.3, "scratch": 0.18}
    layer = LoRALinear(torch.nn.Linear(128, 128), rank=8)
    picture = figures.lora_in_one_picture(layer, 0.084, "Bremen", written, found)
    idea, town, result = picture.fig.axes
    frozen, b, a, rest, share = ((bar.get_width(), bar.get_height()) for bar in idea.patches)
    assert frozen[0] / b[0] == pytest.approx(128 / 8) == frozen[1] / a[1]
    assert share[0] / rest[0] == pytest.approx(0.084)
    shown = names(town.texts)
    assert (shown.count("✓"), shown.count("✗")) == (2, 1)
    assert {name for name, _ in written.values()} < {*shown}
    assert "Μπρέμεν (Greek, not as recorded)" in picture.alt
    widths, scores = [bar.get_width() for bar in result.patches], [*found.values()]
    assert [width / widths[0] for width in widths] == pytest.approx([s / scores[0] for s in scores])
