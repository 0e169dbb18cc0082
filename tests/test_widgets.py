"""What a learner plays with: the answers are the library's own, and never an error.

Setting `.value` is what the page does when a control moves.
"""

import copy
import html
import re

import pytest
import torch

from lora_course.widgets import rank_slider, start_sliders, type_your_town, volume_knob
from lora_lib.adapters import load_adapter
from lora_lib.injection import merge_lora_weights, unload_lora
from lora_lib.lora import lora_layers
from lora_lib.pretrained import adapter_directory, adapter_names, load_pretrained
from lora_lib.rank import with_changes_cut
from lora_lib.scores import transliterate

TOWNS = ["Tbilisi", "Hrazdan"]
LONG = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogoch"


def move(box, value) -> str:
    """Put the control at `value`; returns the page below it."""
    control, page = box.children
    control.value = value
    return page.value


def rows(page: str) -> list[list[str]]:
    """The cells of the table's body: labels, and names without marks and without how they read."""
    body = re.findall(r"<tr>(.*?)</tr>", page.split("<tbody>")[1])
    cells = [[re.sub(r" <span.*|<br>.*|</?bdi>", "", cell) for cell in
              re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in body]  # fmt: skip
    return [list(map(html.unescape, row)) for row in cells]


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


@pytest.mark.parametrize("town", ["São Paulo", "  San   Jose ", LONG])
def test_a_town_is_written_as_by_each_adapter_alone(your_town, tokenizer, town):
    written = rows(move(your_town, town))
    name = " ".join(town.split())
    models = [load_adapter(load_pretrained()[0], adapter_directory(s)) for s in adapter_names()]
    alone = [transliterate(m, tokenizer, [name])[0] for m in (load_pretrained()[0], *models)]
    assert [spelling for _, spelling in written] == alone
    assert [label.lower() for label, _ in written[1:]] == list(adapter_names())


@pytest.mark.parametrize(
    "typed, words",
    [
        ("  ", "Type the name of a town"),
        ("東京", "Latin letters and cannot read “東”, “京”"),
        ("Москва", "cannot read “М”"),  # letters that the model knows, and no adapter read
        ("<script>alert(1)</script>", "“&lt;”"),
        ("é" * 47, "94 characters, and the model has room for 93"),  # an accent counts
        ("東" * 100_000, "cannot read “東”"),
    ],
)
def test_what_cannot_be_written_is_answered_in_words(your_town, typed, words):
    page = move(your_town, typed)
    assert words in page and "<table" not in page and len(page) < 300 and "<script" not in page
    assert "Бремен" in move(your_town, "Bremen")  # and it goes on


def test_names_at_a_rank_are_those_of_the_cut_model(fine_tuned, tokenizer):
    box = rank_slider(*fine_tuned, tokenizer, TOWNS)
    for rank in (4, 0, 32, 1, 8):  # in no order: nothing of the rank before may stay
        cut = transliterate(with_changes_cut(*fine_tuned, rank), tokenizer, TOWNS)
        assert rows(move(box, rank)) == [[str(rank), *cut]]
    assert ">0 of 128 directions of every ΔW, with 0% of the energy<" in move(box, 0)


@pytest.mark.parametrize("merged", [False, True])
def test_names_at_a_volume_are_those_of_the_scaled_adapter(georgian, tokenizer, merged):
    scaled = copy.deepcopy(georgian)
    if merged:
        merge_lora_weights(georgian)
    state = copy.deepcopy(georgian.state_dict())
    box = volume_knob(georgian, tokenizer, TOWNS)
    for volume in (1, 0, 2, 0.5):
        for layer in lora_layers(scaled):
            layer.scaling = 2 * volume
        names = transliterate(scaled, tokenizer, TOWNS)
        assert rows(move(box, volume)) == [[f"{volume:g}", *names]]
    assert all(torch.equal(t, state[name]) for name, t in georgian.state_dict().items())


def test_a_start_is_drawn_with_where_it_leads():
    *sliders, page = start_sliders(lambda A, B: [(A, B), (A + 1, B + 2)]).children
    for slider, value in zip(sliders, (-1.5, 0.5), strict=True):
        slider.value = value
    assert "lead from your start to A = −0.50, B = 2.50." in page.value
