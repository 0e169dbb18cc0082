import unicodedata

import pytest

from lora_course.experiments.counting import MAX_IMAGE, align, context_table, letter_table, score
from lora_course.results import load_table
from lora_lib.names import Pair, load_pairs, nfd

TOY = [Pair("sha", "ша"), Pair("shi", "ши"), Pair("sa", "са"), Pair("ha", "ха"), Pair("si", "си")]


@pytest.fixture(scope="module")
def pairs():
    return load_pairs("georgian", "train")[:500]


def test_an_alignment_joined_is_the_pair_again_and_gives_a_letter_three_at_most(pairs):
    alignments = align(pairs)
    joined = [tuple("".join(side) for side in zip(*a, strict=True)) for a in alignments]
    fitting = [(nfd(p.latin), nfd(p.target)) for p in pairs]
    assert joined == [(s, t) for s, t in fitting if len(t) <= MAX_IMAGE * len(s)]
    assert max(len(image) for alignment in alignments for _, image in alignment) <= 3


def test_a_context_table_tells_sh_from_s():
    assert context_table(TOY * 5).write(["sha", "sa", "ha"]) == ["ша", "са", "ха"]


def test_tables_write_composed_names():
    table = letter_table([Pair("j", "й"), Pair("i", "и")])
    assert table.write(["ji"]) == ["йи"]
    assert unicodedata.is_normalized("NFC", table.write(["ji"])[0])


@pytest.mark.parametrize("table", ["letter", "context"])
def test_a_recorded_score_is_computed_again(table):
    recorded = load_table("counting").set_index(["table", "script", "pairs"])
    again = score(table, "georgian", 300)
    # Since Python 3.12 sum() rounds floats otherwise, in the last digit.
    for name in ("exact_match", "error_rate"):
        assert again[name] == pytest.approx(recorded[name][table, "georgian", 300])
