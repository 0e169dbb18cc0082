"""What a learner plays with: the answers are the library's own, quick, and never an error.

Setting `.value` is what the page does when a control moves.
"""

import copy
import html
import re
import time
from pathlib import Path
from statistics import median

import nbformat
import pytest
import torch
from ipywidgets import HTML, FloatSlider, IntSlider, Text

import lora_lib
from lora_course.widgets import rank_slider, type_your_town, volume_knob
from lora_lib.adapters import load_adapter
from lora_lib.injection import merge_lora_weights, unload_lora
from lora_lib.lora import lora_layers
from lora_lib.pretrained import adapter_directory, adapter_names, load_pretrained
from lora_lib.rank import with_changes_cut
from lora_lib.training import transliterate

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
TOWNS = ["Tbilisi", "San Francisco", "Hrazdan"]
LONG = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogoch"


def move(box, value) -> str:
    """Put the control at `value`; returns the page below it."""
    control, page = box.children
    control.value = value
    return page.value


def rows(page: str) -> list[list[str]]:
    """The cells of the table's body."""
    body = re.findall(r"<tr>(.*?)</tr>", page.split("<tbody>")[1])
    return [[html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", r)] for r in body]


@pytest.fixture
def georgian(base):
    return load_adapter(base, adapter_directory("georgian"))


@pytest.fixture(scope="module")
def fine_tuned():
    """Before and after a change of full rank that writes Georgian: the adapter's, and noise."""
    before, after = load_pretrained()[0], load_pretrained()[0]
    unload_lora(load_adapter(after, adapter_directory("georgian")))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return before, after


@pytest.fixture(scope="module")
def your_town():
    return type_your_town("Bremen")


@pytest.fixture(scope="module")
def apart():
    """The base and every adapter as the library gives them, one model each."""
    scripts = adapter_names()
    adapted = [load_adapter(load_pretrained()[0], adapter_directory(s)) for s in scripts]
    return {"Cyrillic (the base)": load_pretrained()[0]} | {
        script.capitalize(): model for script, model in zip(scripts, adapted, strict=True)
    }


def test_nothing_else_in_the_library_needs_widgets():
    library = Path(lora_lib.__file__).parent
    needing = [
        p.name
        for p in library.rglob("*.py")
        if re.search(r"^\s*(import|from) .*widgets", p.read_text("utf-8"), re.M)
    ]
    assert needing == ["widgets.py"]


def test_the_controls_are_ordinary_ones_with_their_labels(
    your_town, fine_tuned, georgian, tokenizer
):
    boxes = (
        your_town,
        rank_slider(*fine_tuned, tokenizer, TOWNS),
        volume_knob(georgian, tokenizer, TOWNS),
    )
    assert [type(box.children[0]) for box in boxes] == [Text, IntSlider, FloatSlider]
    assert [box.children[0].description for box in boxes] == ["your town", "rank", "λ"]
    assert [type(box.children[1]) for box in boxes] == [HTML] * 3
    assert all(box.children[0].continuous_update for box in boxes)
    assert (boxes[1].children[0].min, boxes[1].children[0].max) == (0, 32)
    assert (boxes[2].children[0].min, boxes[2].children[0].max) == (0, 2)


# --- your town -----------------------------------------------------------------------------------


@pytest.mark.parametrize("town", ["Bremen", "São Paulo", "O'Fallon", "yerevan", "Q", LONG])
def test_a_town_is_written_as_by_each_adapter_alone(your_town, apart, tokenizer, town):
    alone = [[s, *transliterate(model, tokenizer, [town])] for s, model in apart.items()]
    assert rows(move(your_town, town)) == alone


def test_the_first_town_is_there_before_anybody_types(apart, tokenizer):
    page = type_your_town("Kutaisi").children[1].value
    assert (
        rows(page)[0][1] == transliterate(apart["Cyrillic (the base)"], tokenizer, ["Kutaisi"])[0]
    )
    assert ">Kutaisi</th>" in page


def test_every_script_is_set_in_its_own_direction(your_town):
    page = move(your_town, "Lisbon")
    hebrew = next(written for script, written in rows(page) if script == "Hebrew")
    assert "\u05d0" <= hebrew[0] <= "\u05ea"
    assert f"<td dir='auto' style='text-align:left'>{hebrew}</td>" in page


def test_spaces_around_a_name_do_not_count(your_town):
    assert move(your_town, "  San   Jose ") == move(your_town, "San Jose")


@pytest.mark.parametrize(
    "typed, words",
    [
        ("", "Type the name of a town"),
        ("   ", "Type the name of a town"),
        ("-", "Type the name of a town"),
        ("東京", "Latin letters and cannot read “東”, “京”"),
        ("Москва", "cannot read “М”"),  # letters that the model knows, and no adapter read
        ("Route 66", "cannot read “6”"),
        ("ə", "cannot read “ə”"),  # Latin, and too rare for the model to have a token
        ("<script>alert(1)</script>", "“&lt;”"),
        ("\x00🙂", "cannot read"),
        ("a" * 94, "94 characters, and the model has room for 93"),
        ("é" * 47, "94 characters"),  # an accent is a character of its own
        ("東" * 100_000, "cannot read “東”"),
    ],
)
def test_what_cannot_be_written_is_answered_in_words(your_town, typed, words):
    page = move(your_town, typed)
    assert words in page and "<table" not in page and len(page) < 300
    assert "<script" not in page
    assert "Бремен" in move(your_town, "Bremen")  # and it goes on


def test_the_longest_name_that_fits_is_written(your_town):
    assert len(rows(move(your_town, "a" * 93))) == 7


# --- the sliders ---------------------------------------------------------------------------------


def test_names_at_a_rank_are_those_of_the_cut_model(fine_tuned, tokenizer):
    box = rank_slider(*fine_tuned, tokenizer, TOWNS, rank=4)
    different = set()
    for rank in (4, 0, 32, 1, 8):  # in no order: nothing of the rank before may stay
        cut = transliterate(with_changes_cut(*fine_tuned, rank), tokenizer, TOWNS)
        assert rows(move(box, rank)) == [[str(rank), *cut]]
        different.add(tuple(cut))
    assert len(different) >= 3


def test_the_energy_kept_stands_under_the_names(fine_tuned, tokenizer):
    box = rank_slider(*fine_tuned, tokenizer, TOWNS)
    assert ">0 of 128 directions of every ΔW, with 0% of the energy<" in move(box, 0)
    shares = [int(re.search(r"with (\d+)%", move(box, rank))[1]) for rank in (1, 4, 8, 32)]
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] < 100


@pytest.mark.parametrize("merged", [False, True])
def test_names_at_a_volume_are_those_of_the_scaled_adapter(georgian, tokenizer, merged):
    scaled = copy.deepcopy(georgian)
    if merged:
        merge_lora_weights(georgian)
    box = volume_knob(georgian, tokenizer, TOWNS)
    different = set()
    for volume in (1, 0, 2, 0.5, 0.75):
        for layer in lora_layers(scaled):
            layer.scaling = 2 * volume
        names = transliterate(scaled, tokenizer, TOWNS)
        assert rows(move(box, volume)) == [[f"{volume:g}", *names]]
        different.add(tuple(names))
    assert len(different) >= 4


def test_a_value_beyond_the_ends_stops_there(georgian, tokenizer):
    box = volume_knob(georgian, tokenizer, TOWNS)
    assert rows(move(box, 7.0))[0][0] == "2"
    assert rows(move(box, -1.0))[0][0] == "0"


def test_the_models_given_stay_as_they_are(fine_tuned, georgian, tokenizer):
    given = [*fine_tuned, georgian]
    states = [{name: t.clone() for name, t in m.state_dict().items()} for m in given]
    move(rank_slider(*fine_tuned, tokenizer, TOWNS), 2)
    move(volume_knob(georgian, tokenizer, TOWNS), 0.3)
    for model, before in zip(given, states, strict=True):
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(layer.scaling == 2 for layer in lora_layers(georgian))


def test_a_model_without_an_adapter_has_no_volume(base, tokenizer):
    with pytest.raises(ValueError, match="no LoRA layers"):
        volume_knob(base, tokenizer, TOWNS)


def test_one_town_has_to_be_in_a_list(fine_tuned, tokenizer):
    with pytest.raises(TypeError, match="give a list of names"):
        rank_slider(*fine_tuned, tokenizer, "Tbilisi")


# --- at once, and beside something for readers ---------------------------------------------------


def seconds(box, values) -> float:
    """CPU time of an answer, the median over `values`: waiting, on a busy machine, is left out."""
    times = []
    for value in values:
        start = time.process_time()
        move(box, value)
        times.append(time.process_time() - start)
    return median(times)


def test_each_answers_within_300_ms(your_town, fine_tuned, georgian, tokenizer):
    towns = ["Almaty", "Guadalajara", "San Francisco", LONG]
    ranks, knob = (
        rank_slider(*fine_tuned, tokenizer, towns),
        volume_knob(georgian, tokenizer, towns),
    )
    assert seconds(your_town, ["Almaty", "Guadalajara", "San Francisco", "Zürich", "Bremen"]) < 0.3
    assert seconds(your_town, [LONG + letter for letter in "aeiou"]) < 0.3  # 48 steps, the most
    assert seconds(ranks, [0, 1, 2, 5, 32]) < 0.3
    assert seconds(knob, [0, 0.5, 1.9, 1.95, 2]) < 0.3


CALLS = {
    "01_rank_intuition": ["type_your_town(", "rank_slider("],
    "05_merging": ["volume_knob("],
}


@pytest.mark.parametrize("stem, calls", CALLS.items(), ids=CALLS)
def test_a_static_table_stands_before_each(stem, calls):
    cells = nbformat.read(NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells
    for call in calls:
        [place] = [i for i, c in enumerate(cells) if c.cell_type == "code" and call in c.source]
        table, words = cells[place - 1 - 1], cells[place - 1]
        assert words.cell_type == "markdown"
        assert "JupyterLab" in words.source and "the table above" in words.source.replace("\n", " ")
        assert any("<table" in o.get("data", {}).get("text/html", "") for o in table.outputs)
