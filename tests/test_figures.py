"""Figures draw the numbers they are given, and can be read. No picture is compared."""

import html
import io
from itertools import combinations
from unittest.mock import patch

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from lora_course import figures
from lora_course.recorded_rewards import load_reward_runs
from lora_course.recorded_search import load_search
from lora_course.recorded_writing import docstring_runs, looks_of
from lora_lib import add_lora_to_model, freeze_non_lora_params, load_pretrained
from lora_lib.lora import LoRALinear
from lora_lib.rank import k90


def data(line) -> tuple[list, list]:
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def line(ax, label: str):
    [found] = [one for one in ax.lines if one.get_label() == label]
    return found


def names(texts) -> list[str]:
    return [text.get_text() for text in texts]


def lightness(color) -> float:
    return sum(part * weight for part, weight in zip(color, (0.3, 0.59, 0.11), strict=False))


def complaints(fig) -> list[str]:
    """What is wrong with a figure, in words: small text, text that leaves the page or lies on
    other text, and two entries of a legend that nothing but colour tells apart."""
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
        entries += [(bars, bars[0].get_hatch(), lightness(bars[0].get_facecolor()))
                    for bars in ax.containers if hasattr(bars, "patches")]  # fmt: skip
        told = [(e.get_label(), *how) for e, *how in entries if e.get_label()[:1] not in ("_", "")]
        found += [f"{a!r} and {b!r} differ in colour alone"
                  for (a, mark, light), (b, its, its_light) in combinations(told, 2)
                  if mark == its and abs(light - its_light) < 0.08]  # fmt: skip
    return found


LEVELS = [0.02, 0.04, 0.03], [0.27, 0.31, 0.3], [0.52, 0.55, 0.56]
LABELS = ("LoRA r=8", "full fine-tuning", "from scratch", "from scratch, 10 × the steps",
          "head alone", "context table", "letter table")  # fmt: skip
SIX = ["greek", "georgian", "armenian", "hebrew", "hangul", "katakana"]
WRITTEN = {"Cyrillic": ("Бремен", True), "Greek": ("Μπρέμεν", False), "Hebrew": ("ברמן", True)}
SCORES = {"full": 0.43, "LoRA, r = 8": 0.39, "counting letters in context": 0.3, "scratch": 0.18}
LAYER = LoRALinear(torch.nn.Linear(128, 128), rank=8)

# Every figure of the course, with numbers and names as long as the notebooks have them.
FIGURES = {
    "memory": (112, 14.64),
    "rank_pictures": ({name: torch.eye(48) for name in ("stripes", "checkers", "diagonal")},
                      [1, 2, 4, 8, 16]),
    "rank_intuition": (torch.linspace(8, 0, 768), torch.linspace(0.1, 1, 768), 8),
    "energy_curves": ({"built with rank 8": torch.ones(8), "a real ΔW": torch.ones(128)},
                      (figures.SKY, figures.FULL)),
    "cut_curve": ([0, 8, 128], LEVELS),
    "trained_or_cut": ([0, 8, 128], LEVELS, {8: LEVELS[2]}),
    "nine_numbers": (torch.tensor([[1], [2], [-1], [0]]), torch.tensor([[3, 0, 1, 2, 5]])),
    "landscape": ({"A = 1, B = 0": [(1.0, 0.0), (1.9, 1.6)], "both zero": [(0.0, 0.0)] * 2,
                   "A = −0.3, B = 0": [(-0.3, 0.0), (-1.7, -1.7)],
                   "A = 0, B = −1": [(0.0, -1.0), (-1.6, -1.9)]},),
    "growing_strengths": ([torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0]) * k / 240
                           for k in range(241)], [4, 3, 2, 1]),
    "visualize_lora_hyperparameters": (),
    "rate_and_rank": ({rule: {r: {rate: 0.5 + rate for rate in (0.001, 0.01, 0.05)}
                              for r in (1, 4, 16, 64)} for rule in ("α = 2r", "α = 16")}, 0.001),
    "one_rate_for_all": ([2**k for k in range(7)], {0.002: [LEVELS[1]] * 7, 0.01: [LEVELS[2]] * 7},
                         [LEVELS[2]] * 7),
    "equal_budget": ({f"{name}\nr = 38": LEVELS[2] for name in ("W_q, W_v", "attention",
                      "feed-forward", "blocks", "all-linear")},),
    "alpha_valleys": ({alpha: {rate: 0.5 + rate for rate in (0.001, 0.01, 0.05)}
                       for alpha in (4.0, 16.0, 64.0)},),
    "sequence": ("Batman", "ბათმანი"),
    "rates": ({name: {0.001: LEVELS[1], 0.01: LEVELS[2]} for name in LABELS[:2]},
              dict.fromkeys(LABELS[:2], 0.01)),
    "methods": (dict(zip(("full fine-tuning", "LoRA, r = 8", "counting letters", "from scratch"),
                         (0.43, 0.39, 0.3, 0.18), strict=True)),),
    "comparison": ({name: torch.linspace(6, 1, 240).tolist() for name in LABELS[:2]},
                   {2**k: (9_891 * 2**k, LEVELS[1]) for k in range(7)}, (944_163, LEVELS[2])),
    "methods_by_script": ({name: [LEVELS[2]] * 6 for name in LABELS}, SIX),
    "scores_by_pairs": ((100, 300, 1000, 2637),
                        {LABELS[k]: [*LEVELS, LEVELS[2]] for k in (0, 1, 2, 5)}),
    "live_rewards": (torch.rand(60, 16, 8),),
    "rewards_or_answers": (load_reward_runs()[1], 0.1),
    "distance_and_forgetting": (load_reward_runs()[1], {"names alone": 6.2}, "names alone"),
    "clinic": ({name: {"losses": [5.0, 3.0, 2.0]} for name in ("healthy", *"ABCDE")},),
    "attention_maps": ({name: (torch.ones(12, 14), "Петрозаводск") for name in ("base", "adapted")},
                       ["BOS", *"Petrozavodsk", "SEP"]),
    "model_map": (add_lora_to_model(load_pretrained()[0])[0],),
    "two_ways": (),
    "change_sizes": (torch.nn.ModuleDict({name: LAYER for name in
                     ("W_q", "W_k", "W_v", "W_o", "linear1", "linear2", "classifier")}),),
    "drift": ({dtype: {"six adapters in turn": [start, 30 * start], "one adapter": [start] * 2}
               for dtype, start in (("bf16", 1e-3), ("float32", 3e-8))},),
    "volume": ({0: 0.0, 0.5: 0.04, 0.75: 0.58, 1: 0.6, 1.25: 0.58, 1.5: 0.52, 2: 0.13},),
    "k90_by_matrix": ({name: {(m, i): 20.0 + i for m in ("W_k", "W_o", "W_q", "W_v")
                              for i in range(4)} for name in LABELS[:4]}, 65.0),
    "intruders": ({128: torch.rand(99) / 3, 4096: torch.rand(99) / 9}, torch.rand(99)),
    "rank_and_width": ([("here", "attention", 128, (1, 8, 64), (0.1, 0.4, 0.5)),
                        ("GPT-3", "attention", 12288, (1, 8, 64), (74.1, 74.0, 73.9))],),
    "subspaces": ({side: {f"r = {r}, other seed": ([1, 8, 64], LEVELS) for r in (8, 64)}
                   for side in "AB"}, 128),
    "step_times": ({on: {"lora_lib": [1.4, 0.8, 0.7], "PEFT": [1.5, 0.9, 0.8]} for on in
                    ("CPU", "GPU")}, (128, 1024, 4096),
                   {"full": (200.0, 40.0), "lora_lib": (164.0, 18.0)}),
    "search_idea": (),
    "nearness": (["Find the indices of the first and last unmasked values."] * 5,
                 [f"numpy.ma.{name}" for name in ("extras.notmasked_edges", "core.make_mask",
                  "core.masked_greater", "core.getmask", "core.flatten_mask")], np.eye(5)),
    "search_methods": load_search(),
    "variants_at_rates": ({panel: dict.fromkeys(("LoRA", "DoRA", "LoRA+, ratio 16", LABELS[1]),
                           LEVELS[2]) for panel in ("all at 0.002", "all at 0.01", "own rates")},),
    "variants_by_rate": ([0.001, 0.01], {name: LEVELS[:2] for name in
                         ("LoRA", "rsLoRA", "DoRA", "PiSSA", "LoRA+, ratio 4", "+, ratio 16")}),
    "bits_against": ("deeper_steps", [(title, label, (16, 64, 256), {f"{name}, {n}": LEVELS[2]
                      for name in ("LoRA r=64", "LoRA r=8", "full") for n in (16, 64, 256)})
                      for title, label in (("Batches of 64", "steps"), ("125 steps", "batch size"))
                     ], "One."),
    "best_rates": ((62, 250, 1000), {name: [(0.002, 0.005, 0.01), (0.001, 0.002, 0.005),
                   (0.0005, 0.001, 0.002)] for name in ("LoRA r=64", "LoRA r=8", "full")}),
    "capacity": ({"300": 300, "1000": 1000, "all": 2637},
                 {f"{name}, {n}": LEVELS[2] for name in ("r = 1", "r = 4", "r = 16", "r = 64",
                  "full") for n in ("300", "1000", "all")},
                 {name: [0.01, 0.2, 0.9] for name in ("r = 1", "r = 4", "r = 16", "r = 64", "full")
                  }),
    "levels_used": (torch.linspace(-1, 1, 640), {"normal": torch.linspace(-1, 1, 16) ** 3,
                                                 "even": torch.linspace(-1, 1, 16)}),
    "memory_and_errors": ({title: {"float": {32: [0.1, 0.12]}, "normal": {4: [0.1], 3: [0.12]},
                                   "even": {8: [0.1], 4: [0.1], 3: [0.13], 2: [0.3]}}
                           for title in ("The base alone: Cyrillic", "With LoRA: Georgian")},
                          {32: 3164.2, 8: 823.3, 4: 424.2, 3: 325.9, 2: 227.6}),
    "seven_b": (pd.DataFrame([
        dict(base=base, rows=rows, mode=mode, peak_gb=12.3 + rows, ms=123.4)
        for base in ("bfloat16", "NF4, bitsandbytes", "NF4, ours")
        for rows, mode in ((1, "train"), (2, "train"), (4, "train"), (4, "checkpointed"))]),),
    "bits_by_parameters": (docstring_runs(),),
    "news_by_docstrings": (looks_of(docstring_runs()), (0.95, 0.905)),
    "from_memory": (),
    "lora_in_one_picture": (LAYER, 0.084, "Bremen", WRITTEN, SCORES),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_can_be_read(name):
    picture = getattr(figures, name)(*FIGURES[name])
    assert complaints(picture.fig) == []
    assert len(picture.alt) >= 100 and picture.alt.endswith(".") and picture.caption.endswith(".")


def test_a_figure_is_shown_with_its_alt_text_and_kept_where_asked(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.delenv("LORA_LIB_FIGURES", raising=False)
    monkeypatch.chdir(tmp_path)
    picture = figures.visualize_lora_hyperparameters()
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


def test_the_map_says_what_trains_as_the_model_changes():
    model = load_pretrained()[0]
    texts = []
    for change in (
        lambda: None,
        lambda: add_lora_to_model(model),
        lambda: freeze_non_lora_params(model),
    ):
        change()
        drawn = figures.model_map(model)
        [ax] = drawn.fig.axes
        texts.append((ax.get_title(loc="left"), drawn.alt.split("boxes: ")[1].split(". Emb")[0]))
    assert texts == [
        ("944,163 of 944,163 parameters train",
         "0 frozen; 0 LoRA: only A and B train; 25 all of it trains"),
        ("829,475 of 960,547 parameters train, 86.4 %",
         "0 frozen; 8 LoRA: only A and B train; 17 all of it trains"),
        ("16,384 of 960,547 parameters train, 1.7 %",
         "17 frozen; 8 LoRA: only A and B train; 0 all of it trains"),
    ]  # fmt: skip


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


def test_pictures_are_rebuilt_from_their_strongest_tables_and_say_their_rank():
    two = torch.zeros(6, 6)
    two[0], two[:, 0] = 1, 1
    picture = figures.rank_pictures({"corner": two, "eye": torch.eye(6)}, [1, 2])
    shown = [ax.images[0].get_array() for ax in picture.fig.axes]  # row by row
    assert np.allclose(shown[0], two) and np.allclose(shown[4], two, atol=1e-6)
    assert [np.linalg.matrix_rank(x, tol=1e-4) for x in shown] == [2, 6, 1, 1, 2, 2]
    assert "corner 2, eye 6" in picture.alt


def test_energy_curves_mark_the_k90_of_the_library():
    spectra = {"one": torch.tensor([3.0, 0.1]), "flat": torch.ones(10).double()}
    picture = figures.energy_curves(spectra, [figures.RED, figures.BLUE])
    [ax] = picture.fig.axes
    assert "one: 1; flat: 9." in picture.alt
    one, flat = (line(ax, f"{name}: k90 = {k90(values)}") for name, values in spectra.items())
    assert (one.get_markevery(), flat.get_markevery()) == ([0], [8])  # k = 1 and k = 9


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
    picture = figures.lora_in_one_picture(*FIGURES["lora_in_one_picture"])
    idea, town, result = picture.fig.axes
    frozen, b, a, rest, share = ((bar.get_width(), bar.get_height()) for bar in idea.patches)
    assert frozen[0] / b[0] == pytest.approx(128 / 8) == frozen[1] / a[1]
    assert share[0] / rest[0] == pytest.approx(0.084)
    shown = names(town.texts)
    assert (shown.count("✓"), shown.count("✗")) == (2, 1)
    assert {name for name, _ in WRITTEN.values()} < {*shown}
    assert "Μπρέμεν (Greek, not as recorded)" in picture.alt
    widths, scores = [bar.get_width() for bar in result.patches], [*SCORES.values()]
    assert [width / widths[0] for width in widths] == pytest.approx([s / scores[0] for s in scores])
