"""Figures draw the numbers they are given. No picture is compared."""

import io
import math
import subprocess
import sys
from itertools import combinations, pairwise

import matplotlib.colors
import matplotlib.image
import numpy as np
import other_eyes
import pytest
import torch
from figure_rules import FAR_ENOUGH, LIGHTER, complaints, distance, lightness
from matplotlib.colors import same_color

from lora_course import figures
from lora_lib.lora import LoRALinear
from lora_lib.rank import k90


def data(line) -> tuple[list, list]:
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def line(ax, label: str):
    [found] = [one for one in ax.lines if one.get_label() == label]
    return found


def heights(bars) -> list:
    return [bar.get_height() for bar in bars]


def names(ticks) -> list[str]:
    return [tick.get_text() for tick in ticks]


def legend(ax) -> list[str]:
    return names(ax.get_legend().get_texts())


def recorded(ax) -> bool:
    return "recorded" in names(ax.texts)


def test_the_library_is_imported_without_matplotlib():
    program = "import lora_lib, sys; assert not [m for m in sys.modules if 'matplotlib' in m]"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- what every figure shares --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, height",
    [
        ({}, figures.NORMAL),
        ({"columns": 3}, figures.NORMAL),
        ({"rows": 2, "height": figures.TALL}, 5),
    ],
)
def test_a_figure_has_its_axes_and_the_width_of_the_page(settings, height):
    fig, axes = figures.figure(**settings)
    assert tuple(fig.get_size_inches()) == (figures.WIDTH, height)
    assert len(fig.axes) == settings.get("columns", 1) * settings.get("rows", 1)
    assert axes is fig.axes[0] if len(fig.axes) == 1 else list(axes) == fig.axes
    assert not fig.axes[0].spines["top"].get_visible()


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, in order."""
    objects = []
    monkeypatch.setattr("IPython.display.display", objects.append)
    return objects


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder where one writes without saying where."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LORA_LIB_FIGURES", raising=False)
    return tmp_path


def test_a_figure_is_displayed_with_its_alt_text_and_not_written(folder, shown):
    figures.show(figures.figure()[0], "name", "Nothing yet.")
    [image] = shown
    picture, metadata = image._repr_mimebundle_()
    assert metadata["image/png"] == {"width": 1000, "alt": "Nothing yet."}
    assert matplotlib.image.imread(io.BytesIO(image.data)).shape == (630, 1500, 4)  # sharp
    assert picture.keys() == {"image/png"}
    assert not list(folder.iterdir())


def test_a_figure_is_also_written_where_the_variable_says(folder, shown, monkeypatch):
    monkeypatch.setenv("LORA_LIB_FIGURES", str(folder))
    figures.show(figures.figure()[0], "name", "Nothing yet.")
    assert [path.name for path in folder.iterdir()] == ["name.png"]
    assert (folder / "name.png").read_bytes() == shown[0].data


def test_the_same_figure_gives_the_same_bytes(folder, shown):
    for _ in range(2):
        figures.show(figures.visualize_lora_hyperparameters(), "name", "Twice.")
    assert shown[0].data == shown[1].data


def test_recorded_numbers_are_marked():
    _, ax = figures.figure()
    assert not recorded(ax)
    figures.mark_recorded(ax)
    assert recorded(ax)


GROUPS = [[1.0, 2.0, 6.0], [4.0], [5.0, 7.0]]
MEANS, LOWEST, HIGHEST = [3, 4, 6], [1, 4, 5], [6, 4, 7]


def test_a_line_with_spread_draws_mean_lowest_and_highest():
    _, ax = figures.figure()
    figures.line_with_spread(ax, [10, 20, 40], GROUPS, color=figures.RED, label="name")
    assert data(line(ax, "name")) == ([10, 20, 40], MEANS)
    [band] = ax.collections
    corners = set(map(tuple, band.get_paths()[0].vertices))
    assert corners == set(zip([10, 20, 40] * 2, LOWEST + HIGHEST, strict=True))
    assert same_color(band.get_facecolor()[0][:3], figures.RED)
    assert line(ax, "name").get_color() == figures.RED


def test_bars_with_spread_draw_means_and_a_whisker_where_there_are_several_seeds():
    _, ax = figures.figure()
    groups = {"first": GROUPS, "second": [[1.0], [2.0], [3.0]]}
    figures.bars_with_spread(ax, ["x", "y", "z"], groups, [figures.BLUE, figures.RED])
    first, second = ax.containers
    assert (heights(first), first.get_label()) == (MEANS, "first")
    assert (heights(second), second.get_label()) == ([1, 2, 3], "second")
    assert same_color(second[0].get_facecolor(), figures.RED)
    assert names(ax.get_xticklabels()) == ["x", "y", "z"]
    whiskers = [data(whisker) for whisker in ax.lines]
    middle = [bar.get_x() + bar.get_width() / 2 for bar in first]
    assert [y for _, y in whiskers] == [[1, 6], [5, 7]]
    assert [x for x, _ in whiskers] == [pytest.approx([middle[i]] * 2) for i in (0, 2)]


def test_bars_of_one_block_stand_around_its_label_and_do_not_overlap():
    _, ax = figures.figure()
    groups = {name: [[1.0], [1.0]] for name in "abc"}
    figures.bars_with_spread(ax, ["x", "y"], groups, [figures.BLUE] * 3)
    edges = [(c[1].get_x(), c[1].get_x() + c[1].get_width()) for c in ax.containers]
    assert edges == sorted(edges)
    assert all(a[1] < b[0] for a, b in pairwise(edges))
    assert edges[0][0] + edges[-1][1] == pytest.approx(2)
    assert edges[0][0] > 0.5 and edges[-1][1] < 1.5


# --- the palette, and what all figures keep to ---------------------------------------------------

METHODS = {
    name: getattr(figures, name)
    for name in ("LORA", "FULL", "SCRATCH", "SCRATCH_LONG", "HEAD", "CONTEXT_TABLE", "LETTER_TABLE")
}


@pytest.mark.parametrize("pair", list(combinations(METHODS, 2)), ids="-".join)
def test_two_methods_differ_for_every_eye_and_by_marker_and_hatch_in_grey(pair):
    one, other = (METHODS[name] for name in pair)
    assert distance(one, other) >= FAR_ENOUGH
    assert all(a != b for a, b in zip(figures.MARKS[one], figures.MARKS[other], strict=True))


def test_the_blues_go_from_light_to_dark_and_differ_in_grey():
    assert figures.BLUES[3] == figures.LORA
    for lighter, darker in pairwise(figures.BLUES):
        assert lightness(lighter) - lightness(darker) >= LIGHTER
        assert distance(lighter, darker) >= FAR_ENOUGH
    assert len({figures.MARKS[blue] for blue in figures.BLUES}) == len(figures.BLUES)
    assert figures.blues(2) == (figures.BLUES[1], figures.BLUES[5])
    assert figures.blues(3)[1] == figures.LORA and figures.blues(7) == figures.BLUES
    assert figures.blues(1) == (figures.BLUES[1],)


def test_the_committed_picture_shows_the_opening_figure_as_other_eyes_see_it():
    picture = matplotlib.image.imread(other_eyes.SEEN)[..., :3]
    expected = io.BytesIO()
    other_eyes.draw(picture).savefig(expected, dpi=100)
    expected.seek(0)
    difference = matplotlib.image.imread(expected) - matplotlib.image.imread(other_eyes.WRITTEN)
    assert abs(difference).mean() < 0.01, "make notebooks draws it again"


def test_a_colour_in_grey_keeps_its_lightness_and_nothing_else():
    grey = other_eyes.seen_by("grey", np.array(matplotlib.colors.to_rgb(figures.LORA)))
    assert np.ptp(grey) < 0.01
    assert lightness(grey) == pytest.approx(lightness(figures.LORA), abs=0.5)


SEEDS = {"low": [0.02, 0.04, 0.03], "middle": [0.27, 0.31, 0.3], "high": [0.52, 0.55, 0.56]}
LEVELS = list(SEEDS.values())
LABELS = ("LoRA r=8", "full fine-tuning", "from scratch", "from scratch, 10 × the steps",
          "head alone", "context table", "letter table")  # fmt: skip
SIX = ["greek", "georgian", "armenian", "hebrew", "hangul", "katakana"]


def lora_layer() -> LoRALinear:
    return LoRALinear(torch.nn.Linear(128, 128), rank=8)


WRITTEN = {
    "Cyrillic": ("Бремен", True),
    "Greek": ("Μπρέμεν", False),
    "Georgian": ("ბრემენი", True),
    "Armenian": ("Բրեմեն", True),
    "Hebrew": ("ברמן", True),
}
PICTURE = dict(
    layer=lora_layer(), share=0.084, town="Bremen", written=WRITTEN,
    scores={"full fine-tuning": 0.43, "LoRA, r = 8": 0.39, "counting letters in context": 0.30,
            "from scratch, same steps": 0.18},
)  # fmt: skip

# Every figure of the library, with numbers and names as long as the notebooks have them.
FIGURES = {
    "rank_intuition": lambda: figures.rank_intuition(
        torch.linspace(8, 0, 768), torch.linspace(0.1, 1, 768), 8
    ),
    "energy_curves": lambda: figures.energy_curves(
        {"simulated, rank 8": torch.ones(8), "real ΔW of W_q, block 1": torch.ones(128)},
        (figures.SKY, figures.FULL),
    ),
    "cut_curve": lambda: figures.cut_curve([0, 8, 128], LEVELS, {8: LEVELS[2]}),
    "hyperparameters": figures.visualize_lora_hyperparameters,
    "comparison": lambda: figures.comparison(
        {name: torch.linspace(6, 1, 240).tolist() for name in LABELS[:3]},
        {2**k: (9_891 * 2**k, LEVELS[1]) for k in range(7)},
        (944_163, LEVELS[2]),
    ),
    "methods_by_script": lambda: figures.methods_by_script(
        {name: [SEEDS["high"]] * 6 for name in LABELS}, SIX
    ),
    "scores_by_pairs": lambda: figures.scores_by_pairs(
        (100, 300, 1000, 2637), {LABELS[k]: [*LEVELS, LEVELS[2]] for k in (0, 1, 2, 5)}
    ),
    "clinic": lambda: figures.clinic(
        {name: {"losses": [5.0, 3.0, 2.0]} for name in ("healthy", *"ABCDE")}
    ),
    "attention_maps": lambda: figures.attention_maps(
        {name: (torch.rand(12, 14), "Петрозаводск") for name in ("the base", "with the adapter")},
        ["BOS", *"Petrozavodsk", "SEP"],
    ),
    "parameters_by_target": lambda: figures.parameters_by_target(
        {(name, rank): 9_891 * rank for name in ("W_q, W_v", "attention", "feed-forward", "all")
         for rank in (2, 8, 32)}, 944_163,
    ),
    "step_times": lambda: figures.step_times(
        {on: {"lora_lib": [1.4, 0.8, 0.7], "PEFT": [1.5, 0.9, 0.8]} for on in ("CPU", "GPU")},
        (128, 1024, 4096), {"full": (200.0, 40.0), "lora_lib": (164.0, 18.0)},
    ),
    "lora_in_one_picture": lambda: figures.lora_in_one_picture(**PICTURE),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_keeps_to_the_rules(name):
    assert complaints(FIGURES[name]()) == []


def broken(change):
    fig, ax = figures.figure()
    figures.line(ax, [1, 2], [1, 2], figures.LORA, "LoRA")
    change(fig, ax)
    return complaints(fig)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda fig, ax: fig.set_size_inches(9, 4.2), "none of the sizes"),
        (lambda fig, ax: ax.set_xlabel("tiny", size=9), "'tiny' has 9.0 points"),
        (lambda fig, ax: ax.text(1.5, 1.5, "one") and ax.text(1.5, 1.5, "two"), "lies on"),
        (lambda fig, ax: fig.text(0.9, 0.5, "too long for the page"), "leaves the figure"),
        (lambda fig, ax: ax.plot([1], [1], "s", color="#0072B9", label="x"), "not of the palette"),
        (lambda fig, ax: figures.line(ax, [1], [2], figures.LORA, "twin"), "look the same"),
        (lambda fig, ax: figures.line(ax, [1], [2], figures.FULL, "x", marker="o"), "in grey"),
        (lambda fig, ax: [figures.line(ax, [1], [2], c, c) for c in (figures.GREEN, figures.GREY)],
         "apart for some eyes"),
    ],
)  # fmt: skip
def test_the_rules_find_what_is_wrong(change, complaint):
    assert any(complaint in found for found in broken(change)), broken(change)


def test_a_figure_that_keeps_to_the_rules_gives_no_complaint():
    assert broken(lambda fig, ax: figures.line(ax, [1, 2], [2, 1], figures.FULL, "full")) == []


def test_hebrew_runs_from_right_to_left():
    """The first letter, alone at the right end, makes the last columns of ink."""

    def ink(text):
        fig, ax = figures.figure()
        ax.axis("off")
        ax.text(0.5, 0.5, text, size=40, ha="right")
        fig.canvas.draw()
        dark = np.asarray(fig.canvas.buffer_rgba())[..., 0] < 128
        columns = np.flatnonzero(dark.any(axis=0))
        return dark[:, columns[-1] - 15 : columns[-1] + 1]

    assert (ink("בן") == ink("ב")).mean() > 0.999
    assert (ink("בן") == ink("ן")).mean() < 0.999


# --- each figure ---------------------------------------------------------------------------------


def test_rank_intuition_draws_the_first_values_and_their_energy():
    values, cumulative = torch.arange(10.0, 0, -1), torch.linspace(0.1, 1, 10)
    fig = figures.rank_intuition(values, cumulative, true_rank=3, shown=4)
    left, right = fig.axes
    assert heights(left.containers[0]) == [10, 9, 8, 7]
    assert left.lines[0].get_xdata()[0] == 3.5  # between the third bar and the fourth
    assert data(right.lines[0]) == ([1, 2, 3, 4], pytest.approx([0.1, 0.2, 0.3, 0.4]))
    assert line(right, "rank 3").get_xdata()[0] == 3
    assert line(right, "99 %").get_ydata()[0] == 0.99
    assert legend(left) == ["true rank 3"]


def test_rank_intuition_draws_a_matrix_with_fewer_values_than_are_shown():
    left, right = figures.rank_intuition(torch.ones(3), torch.ones(3), true_rank=2).axes
    assert heights(left.containers[0]) == [1, 1, 1]
    assert data(right.lines[0])[0] == [1, 2, 3]


def test_energy_curves_use_the_k90_of_the_library():
    values = torch.linspace(1, 0, 30).double()
    [ax] = figures.energy_curves({"ΔW": values}, [figures.BLUE]).axes
    assert legend(ax) == [f"ΔW: k90 = {k90(values)}"]
    with pytest.raises(ValueError, match="every singular value is zero"):
        figures.energy_curves({"nothing": torch.zeros(3)}, [figures.BLUE])


def test_energy_curves_mark_k90_on_each():
    spectra = {"one": torch.tensor([3.0, 0.1]), "flat": torch.ones(10).double()}
    [ax] = figures.energy_curves(spectra, [figures.RED, figures.BLUE]).axes
    assert legend(ax) == ["one: k90 = 1", "flat: k90 = 9"]
    flat = line(ax, "flat: k90 = 9")
    assert data(flat)[1] == pytest.approx([k / 10 for k in range(1, 11)])
    assert flat.get_color() == figures.BLUE
    assert [one.get_markevery() for one in ax.lines[:2]] == [[0], [8]]  # k = 1 and k = 9


def test_cut_curve_draws_cut_and_trained_at_the_same_ranks():
    cut = [[0.0, 0.1], [0.2, 0.4], [0.5, 0.5]]
    [ax] = figures.cut_curve([1, 8, 64], cut, trained={8: [0.5, 0.6], 2: [0.9]}).axes
    curve, trained = (line(ax, label) for label in legend(ax))
    assert data(curve) == ([0, 1, 2], pytest.approx([0.05, 0.3, 0.5]))
    assert data(trained) == ([1], pytest.approx([0.55]))
    assert names(ax.get_xticklabels()) == ["1", "8", "64"]
    assert recorded(ax)


def test_cut_curve_without_trained_runs():
    [ax] = figures.cut_curve([1, 8], [[0.0], [0.2]]).axes
    assert legend(ax) == ["full fine-tuning, its ΔW cut to rank r"]


def test_visualize_lora_hyperparameters_counts_real_layers():
    left, right = figures.visualize_lora_hyperparameters().axes
    layer = LoRALinear(torch.nn.Linear(256, 256), rank=4)
    ranks, counts = data(line(left, "LoRA factors"))
    assert ranks == [1, 2, 4, 8, 16, 32, 64, 128]
    assert counts[2] == 8 * layer.num_trainable_params == 8 * 4 * 512
    assert [count / counts[0] for count in counts] == ranks
    assert line(left, "all of W_q and W_v").get_ydata()[0] == 8 * 256 * 256
    for rank in (4, 8, 16):
        alphas, scaling = data(line(right, f"r = {rank}"))
        assert alphas == list(range(1, 65))
        assert scaling == pytest.approx([alpha / rank for alpha in alphas])


def test_comparison_draws_its_three_panels():
    losses = [float(x) for x in range(20, 0, -1)]
    fig = figures.comparison(
        curves={"LoRA": losses, "full": [3.0, 2.0, 1.0]},
        ranks={1: (100, [0.1, 0.3]), 8: (800, [0.4, 0.6])},
        full=(5000, [0.5, 0.6]),
    )
    curve, score, count = fig.axes
    steps, smooth = data(line(curve, "LoRA"))
    assert steps == list(range(1, 21))
    assert smooth[:2] == [20, 19.5]
    assert smooth[-1] == sum(losses[-10:]) / 10
    assert data(line(curve, "full"))[1] == [3, 2.5, 2]
    lora, star = (line(score, label) for label in legend(score))
    assert data(lora) == ([100, 800], pytest.approx([0.2, 0.5]))
    assert data(star) == ([5000], pytest.approx([0.55]))
    assert [bar.get_width() for bar in count.containers[0]] == [100, 800, 5000]
    assert names(count.get_yticklabels()) == ["r=1", "r=8", "full"]
    assert names(count.texts) == ["100", "800", "5,000"]
    assert [recorded(ax) for ax in fig.axes] == [False, True, False]  # the curves are live


def test_methods_by_script_draws_a_block_for_every_script():
    scores = {"LoRA": [[0.2, 0.4], [0.5]], "table": [[0.1], [0.2]]}
    [ax] = figures.methods_by_script(scores, ["greek", "hangul"]).axes
    assert names(ax.get_xticklabels()) == ["Greek", "Hangul"]
    assert names(ax.figure.legends[0].get_texts()) == ["LoRA", "table"]
    drawn = [height for bars in ax.containers for height in heights(bars)]
    assert drawn == pytest.approx([0.3, 0.5, 0.1, 0.2])
    assert recorded(ax)


def test_scores_by_pairs_draws_a_line_for_every_method():
    scores = {name: [[k / 10], [k / 10, 0.5]] for k, name in enumerate("abcd")}
    [ax] = figures.scores_by_pairs([100, 2600], scores).axes
    assert legend(ax) == ["a", "b", "c", "d"]
    for k, name in enumerate("abcd"):
        xs, ys = data(line(ax, name))
        assert (xs, ys) == ([100, 2600], pytest.approx([k / 10, (k / 10 + 0.5) / 2]))
    assert names(ax.get_xticklabels()) == ["100", "2,600"]
    assert ax.get_xscale() == "log" and recorded(ax)


def test_clinic_draws_the_healthy_run_behind_every_broken_one():
    runs = {"healthy": {"losses": [5.0, 2.0]}, "A": {"losses": [5.0, 5.0]},
            "B": {"losses": [5.0, math.nan]}}  # fmt: skip
    axes = figures.clinic(runs).axes
    assert [ax.get_title("left") for ax in axes] == ["healthy", "run A", "run B"]
    for ax in axes:
        assert data(ax.lines[0]) == ([0, 1], [5, 2])
        assert [one.get_linestyle() for one in ax.lines] == ["--", "-"]
    assert data(axes[1].lines[1])[1] == [5, 5]


def test_lora_in_one_picture_draws_to_scale_and_what_it_is_given():
    idea, town, result = figures.lora_in_one_picture(**PICTURE).axes
    frozen, b, a, rest, share = ((bar.get_width(), bar.get_height()) for bar in idea.patches)
    assert frozen[0] / b[0] == pytest.approx(128 / 8) == frozen[1] / a[1]
    assert (b[1], a[0]) == (frozen[1], frozen[0])
    assert share[0] / rest[0] == pytest.approx(0.084)
    assert "trained: 8.4% of the parameters" in names(idea.texts)
    shown = names(town.texts)
    assert [name for name, _ in WRITTEN.values()] == [
        t for t in shown if t in dict(WRITTEN.values())
    ]
    assert shown.count("✓") == 4 and "Bremen" in shown
    widths = [bar.get_width() for bar in result.patches]
    scores = list(PICTURE["scores"].values())
    assert [width / widths[0] for width in widths] == pytest.approx([s / scores[0] for s in scores])
    colors = (figures.FULL, figures.LORA, figures.CONTEXT_TABLE, figures.SCRATCH)
    for bar, color in zip(result.patches, colors, strict=True):
        assert same_color(bar.get_facecolor(), color)
    assert [t for t in names(result.texts) if "%" in t] == ["43%", "39%", "30%", "18%"]
