"""Figures draw the numbers they are given. No picture is compared."""

import io
import math
import subprocess
import sys
from itertools import pairwise

import matplotlib.image
import pytest
import torch
from matplotlib.colors import same_color

from lora_lib import plots
from lora_lib.lora import LoRALinear


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
    "settings, size", [({}, (6.8, 4.2)), ({"columns": 3}, (13.5, 4.2)), ({"rows": 2}, (6.8, 8.4)),
                       ({"width": 9, "height": 5}, (9, 5))]
)  # fmt: skip
def test_a_figure_has_its_axes_and_fits_a_page(settings, size):
    fig, axes = plots.figure(**settings)
    assert tuple(fig.get_size_inches()) == pytest.approx(size)
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
    plots.show(plots.figure()[0], "name", "Nothing yet.")
    [image] = shown
    picture, metadata = image._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == "Nothing yet."
    assert matplotlib.image.imread(io.BytesIO(image.data)).shape == (420, 680, 4)
    assert picture.keys() == {"image/png"}
    assert not list(folder.iterdir())


def test_a_figure_is_also_written_where_the_variable_says(folder, shown, monkeypatch):
    monkeypatch.setenv("LORA_LIB_FIGURES", str(folder))
    plots.show(plots.figure()[0], "name", "Nothing yet.")
    assert [path.name for path in folder.iterdir()] == ["name.png"]
    assert (folder / "name.png").read_bytes() == shown[0].data


def test_the_same_figure_gives_the_same_bytes(folder, shown):
    for _ in range(2):
        plots.show(plots.visualize_lora_hyperparameters(), "name", "Twice.")
    assert shown[0].data == shown[1].data


def test_recorded_numbers_are_marked():
    _, ax = plots.figure()
    assert not recorded(ax)
    plots.mark_recorded(ax)
    assert recorded(ax)


GROUPS = [[1.0, 2.0, 6.0], [4.0], [5.0, 7.0]]
MEANS, LOWEST, HIGHEST = [3, 4, 6], [1, 4, 5], [6, 4, 7]


def test_a_line_with_spread_draws_mean_lowest_and_highest():
    _, ax = plots.figure()
    plots.line_with_spread(ax, [10, 20, 40], GROUPS, color=plots.RED, label="name")
    assert data(line(ax, "name")) == ([10, 20, 40], MEANS)
    [band] = ax.collections
    corners = set(map(tuple, band.get_paths()[0].vertices))
    assert corners == set(zip([10, 20, 40] * 2, LOWEST + HIGHEST, strict=True))
    assert same_color(band.get_facecolor()[0][:3], plots.RED)
    assert line(ax, "name").get_color() == plots.RED


def test_bars_with_spread_draw_means_and_a_whisker_where_there_are_several_seeds():
    _, ax = plots.figure()
    groups = {"first": GROUPS, "second": [[1.0], [2.0], [3.0]]}
    plots.bars_with_spread(ax, ["x", "y", "z"], groups, [plots.BLUE, plots.RED])
    first, second = ax.containers
    assert (heights(first), first.get_label()) == (MEANS, "first")
    assert (heights(second), second.get_label()) == ([1, 2, 3], "second")
    assert same_color(second[0].get_facecolor(), plots.RED)
    assert names(ax.get_xticklabels()) == ["x", "y", "z"]
    whiskers = [data(whisker) for whisker in ax.lines]
    middle = [bar.get_x() + bar.get_width() / 2 for bar in first]
    assert [y for _, y in whiskers] == [[1, 6], [5, 7]]
    assert [x for x, _ in whiskers] == [pytest.approx([middle[i]] * 2) for i in (0, 2)]


def test_bars_of_one_block_stand_around_its_label_and_do_not_overlap():
    _, ax = plots.figure()
    groups = {name: [[1.0], [1.0]] for name in "abc"}
    plots.bars_with_spread(ax, ["x", "y"], groups, [plots.BLUE] * 3)
    edges = [(c[1].get_x(), c[1].get_x() + c[1].get_width()) for c in ax.containers]
    assert edges == sorted(edges)
    assert all(a[1] < b[0] for a, b in pairwise(edges))
    assert edges[0][0] + edges[-1][1] == pytest.approx(2)
    assert edges[0][0] > 0.5 and edges[-1][1] < 1.5


def test_seeds_and_intervals_draw_every_seed_and_the_given_interval():
    scores = {"a": [0.1, 0.3], "b": [0.5, 0.5, 0.8]}
    intervals = {"a": (0.2, -0.1, 0.5), "b": (0.6, 0.4, 0.9)}
    fig = plots.seeds_and_intervals(scores, intervals, "exact match")
    [ax] = fig.axes
    assert names(ax.get_yticklabels()) == ["a", "b"]
    points, bars, means = ([data(one) for one in ax.lines[k::3]] for k in range(3))
    assert [xs for xs, _ in points] == [[0.1, 0.3], [0.5, 0.5, 0.8]]
    assert [xs for xs, _ in bars] == [[-0.1, 0.5], [0.4, 0.9]]
    assert [xs for xs, _ in means] == [[0.2], [0.6]]
    assert [round(ys[0]) for _, ys in points] == [round(ys[0]) for _, ys in means] == [0, 1]
    assert ax.yaxis_inverted() and recorded(ax)
    assert names(fig.legends[0].get_texts()) == ["one seed", "mean and 95 % interval"]


# --- each figure ---------------------------------------------------------------------------------


def test_rank_intuition_draws_the_first_values_and_their_energy():
    values, cumulative = torch.arange(10.0, 0, -1), torch.linspace(0.1, 1, 10)
    fig = plots.rank_intuition(values, cumulative, true_rank=3, shown=4)
    left, right = fig.axes
    assert heights(left.containers[0]) == [10, 9, 8, 7]
    assert left.lines[0].get_xdata()[0] == 3.5  # between the third bar and the fourth
    assert data(right.lines[0]) == ([1, 2, 3, 4], pytest.approx([0.1, 0.2, 0.3, 0.4]))
    assert line(right, "rank 3").get_xdata()[0] == 3
    assert line(right, "99 %").get_ydata()[0] == 0.99
    assert legend(left) == ["true rank 3"]


def test_energy_curves_mark_k90_on_each():
    spectra = {"one": torch.tensor([3.0, 0.1]), "flat": torch.ones(10).double()}
    [ax] = plots.energy_curves(spectra, [plots.RED, plots.BLUE]).axes
    assert legend(ax) == ["one: k90 = 1", "flat: k90 = 9"]
    flat = line(ax, "flat: k90 = 9")
    assert data(flat)[1] == pytest.approx([k / 10 for k in range(1, 11)])
    assert flat.get_color() == plots.BLUE
    markers = [data(one) for one in ax.lines if one.get_marker() == "o"]
    assert markers == [([1], pytest.approx([9 / 9.01])), ([9], pytest.approx([0.9]))]


def test_cut_curve_draws_cut_and_trained_at_the_same_ranks():
    cut = [[0.0, 0.1], [0.2, 0.4], [0.5, 0.5]]
    [ax] = plots.cut_curve([1, 8, 64], cut, trained={8: [0.5, 0.6], 2: [0.9]}).axes
    curve, trained = (line(ax, label) for label in legend(ax))
    assert data(curve) == ([0, 1, 2], pytest.approx([0.05, 0.3, 0.5]))
    assert data(trained) == ([1], pytest.approx([0.55]))
    assert names(ax.get_xticklabels()) == ["1", "8", "64"]
    assert recorded(ax)


def test_cut_curve_without_trained_runs():
    [ax] = plots.cut_curve([1, 8], [[0.0], [0.2]]).axes
    assert legend(ax) == ["full fine-tuning, its ΔW cut to rank r"]


def test_visualize_lora_hyperparameters_counts_real_layers():
    left, right = plots.visualize_lora_hyperparameters().axes
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
    fig = plots.comparison(
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
    [ax] = plots.methods_by_script(scores, ["greek", "hangul"]).axes
    assert names(ax.get_xticklabels()) == ["Greek", "Hangul"]
    assert legend(ax) == ["LoRA", "table"]
    drawn = [height for bars in ax.containers for height in heights(bars)]
    assert drawn == pytest.approx([0.3, 0.5, 0.1, 0.2])
    assert recorded(ax)


def test_scores_by_pairs_draws_a_line_for_every_method():
    scores = {name: [[k / 10], [k / 10, 0.5]] for k, name in enumerate("abcd")}
    [ax] = plots.scores_by_pairs([100, 2600], scores).axes
    assert legend(ax) == ["a", "b", "c", "d"]
    for k, name in enumerate("abcd"):
        xs, ys = data(line(ax, name))
        assert (xs, ys) == ([100, 2600], pytest.approx([k / 10, (k / 10 + 0.5) / 2]))
    assert names(ax.get_xticklabels()) == ["100", "2,600"]
    assert ax.get_xscale() == "log" and recorded(ax)


def test_clinic_draws_the_healthy_run_behind_every_broken_one():
    runs = {"healthy": {"losses": [5.0, 2.0]}, "A": {"losses": [5.0, 5.0]},
            "B": {"losses": [5.0, math.nan]}}  # fmt: skip
    axes = plots.clinic(runs).axes
    assert [ax.get_title() for ax in axes] == ["healthy", "run A", "run B"]
    for ax in axes:
        assert data(ax.lines[0]) == ([0, 1], [5, 2])
    assert data(axes[1].lines[1])[1] == [5, 5]
    assert [ax.lines[1].get_color() for ax in axes] == [plots.BLUE, plots.RED, plots.RED]
