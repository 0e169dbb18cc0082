"""What only the notebooks use: claims, predictions, sources and tables."""

import html
import inspect
import math
import re

import pytest
from IPython.display import HTML

from lora_course import claims, tables
from lora_lib.lora import LoRALinear
from lora_lib.rank import k90


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


@pytest.fixture
def shown(monkeypatch):
    """What was displayed, in order."""
    objects = []
    monkeypatch.setattr(tables, "display", objects.append)
    return objects


@pytest.mark.parametrize("value, strict", [(None, False), ("", False), ("0", False), ("1", True)])
def test_strict_only_where_the_variable_is_1(monkeypatch, value, strict):
    if value is not None:
        monkeypatch.setenv("LORA_LIB_STRICT", value)
    assert claims.strict() is strict


# --- claims --------------------------------------------------------------------------------------

HOLDS = [
    (0.5, {"at_least": 0.5}),
    (2, {"at_least": 1.5}),
    (0.5, {"at_most": 0.5}),
    (-1, {"at_most": 0}),
    (0.0, {"equals": 0}),
]
FAILS = [
    (0.49, {"at_least": 0.5}),
    (0.51, {"at_most": 0.5}),
    (5, {"equals": 4}),
    (0.001, {"equals": 0}),
    (math.nan, {"at_least": 0}),
    (math.nan, {"at_most": 0}),
]


@pytest.mark.parametrize("strict", ["0", "1"])
@pytest.mark.parametrize("value, bound", HOLDS)
def test_a_claim_that_holds(monkeypatch, capsys, value, bound, strict):
    monkeypatch.setenv("LORA_LIB_STRICT", strict)
    claims.claim("score", value, **bound)
    assert capsys.readouterr().out.startswith("Holds. score: measured ")


@pytest.mark.parametrize("value, bound", FAILS)
def test_a_claim_that_fails_only_says_so_to_a_learner(capsys, value, bound):
    claims.claim("score", value, **bound)
    assert capsys.readouterr().out.startswith("Does not hold under your settings. score: ")


@pytest.mark.parametrize("value, bound", FAILS)
def test_a_claim_that_fails_raises_in_the_tests(monkeypatch, value, bound):
    monkeypatch.setenv("LORA_LIB_STRICT", "1")
    with pytest.raises(AssertionError, match=r"score: measured .*, claimed "):
        claims.claim("score", value, **bound)


@pytest.mark.parametrize(
    "value, bound, report",
    [
        (0.12345, {"at_least": 0.1}, "measured 0.1235, claimed at least 0.1"),
        (16384, {"at_most": 20000.0}, "measured 16,384, claimed at most 20,000"),
        (4.0, {"equals": 4}, "measured 4, claimed exactly 4"),
        (True, {"equals": True}, "measured yes, claimed exactly yes"),
    ],
)
def test_a_claim_shows_the_measured_value_and_its_bound(capsys, value, bound, report):
    claims.claim("x", value, **bound)
    assert capsys.readouterr().out == f"Holds. x: {report}\n"


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0, "equals": 1}])
def test_a_claim_needs_exactly_one_bound(bounds):
    with pytest.raises(ValueError, match=f"claim needs one .*; {len(bounds)} were given"):
        claims.claim("x", 1, **bounds)


# --- predictions ---------------------------------------------------------------------------------


def predict(guess):
    claims.predict("k", "How many?", ["few", "many"], guess)


def test_a_prediction_is_asked_for(capsys):
    predict(None)
    assert capsys.readouterr().out.splitlines() == [
        "How many?", "  a) few", "  b) many", 'Set guess to a letter, such as "a", and run.'
    ]  # fmt: skip


@pytest.mark.parametrize(
    "guess, predicted", [(None, ">—<"), ("a", ">few<"), ("b", ">many<")], ids=str
)
def test_the_outcome_stands_beside_the_prediction(shown, capsys, guess, predicted):
    predict(guess)
    assert ("Your prediction: " in capsys.readouterr().out) is (guess is not None)
    claims.reveal("k", "many, 42")
    [table] = shown
    cells = [">How many?<", predicted, ">many, 42<"]
    assert [table.data.index(cell) for cell in cells] == sorted(map(table.data.index, cells))


def test_the_last_prediction_counts(shown):
    predict("a")
    predict("b")
    claims.reveal("k", "?")
    assert ">many<" in shown[0].data and ">few<" not in shown[0].data


def test_the_outcome_is_shown_without_any_prediction(shown):
    claims.reveal("never asked", "42")
    assert ">—<" in shown[0].data and ">42<" in shown[0].data


@pytest.mark.parametrize("guess", ["c", "ab", "", "A", 0])
def test_a_guess_that_is_no_option_is_refused(guess):
    with pytest.raises(ValueError, match="must be None or one of a, b"):
        predict(guess)


# --- sources and tables --------------------------------------------------------------------------


def test_show_source_shows_the_very_source_of_each(shown):
    tables.show_source(LoRALinear, k90)
    pages = [html.unescape(re.sub(r"<[^>]+>", "", page.data)).strip() for page in shown]
    assert pages == [inspect.getsource(item).strip() for item in (LoRALinear, k90)]
    assert "font-family: monospace" in shown[0].data


def smaller(a, b):
    return a < b and "<script>"


def test_show_source_is_escaped_on_the_page(shown):
    tables.show_source(smaller)
    page = shown[0].data
    assert "&lt;script&gt;" in page and "<script>" not in page


def table(shown, *arguments, **settings) -> str:
    tables.show_table(*arguments, **settings)
    assert isinstance(shown[0], HTML)
    return shown.pop().data


def test_a_table_has_its_columns_and_rows_in_order(shown):
    page = table(shown, ["name", "size"], [["one", 1], ["two", 2]])
    found = [page.index(f">{text}</") for text in ("name", "size", "one", "1", "two", "2")]
    assert found == sorted(found)
    assert page.count("<tr>") == 3


@pytest.mark.parametrize(
    "value, text",
    [(0.12345, "0.123"), (2.0, "2.000"), (16384, "16,384"), ("0.01", "0.01"), ("1e-3", "1e-3"),
     ("−0.5", "−0.5"), ("1,000", "1,000"), ("12.5 %", "12.5 %"), ("", "")],
)  # fmt: skip
def test_numbers_are_formatted_and_set_to_the_right(shown, value, text):
    head, cell = re.findall("<t[hd].*?</t[hd]>", table(shown, ["x"], [[value]]))
    assert f">{text}</td>" in cell
    assert "text-align:right" in cell and "text-align:right" in head


@pytest.mark.parametrize("value", [None, "r = 8", "8 bits", "0.5 (0.4 to 0.6)", "—", "8, 19"])
def test_what_is_no_number_is_set_to_the_left(shown, value):
    head, number, cell = re.findall("<t[hd].*?</t[hd]>", table(shown, ["x"], [[7], [value]]))
    assert "text-align:right" in number
    assert "text-align:left" in cell and "text-align:left" in head


def test_a_table_may_have_short_rows_and_none(shown):
    assert table(shown, ["run", "1", "2"], [["a", 0.5], ["b", 0.25]]).count("<td") == 4
    assert table(shown, ["run", "1"], []).count("<th") == 3  # with the <thead>


def test_text_of_any_script_is_set_in_its_own_direction(shown):
    assert "<td dir='auto' style='text-align:left'>חיפה</td>" in table(shown, ["x"], [["חיפה"]])


def test_a_table_escapes_html_everywhere(shown):
    page = table(shown, ["<b>"], [["<i>&"]], caption="<u>")
    assert "&lt;b&gt;" in page and "&lt;i&gt;&amp;" in page and "&lt;u&gt;" in page
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>"))


@pytest.mark.parametrize(
    "settings, caption",
    [
        ({}, ""),
        ({"caption": "3 seeds"}, "3 seeds"),
        ({"recorded": True}, "recorded results"),
        ({"caption": "3 seeds", "recorded": True}, "recorded results; 3 seeds"),
    ],
)
def test_recorded_numbers_are_marked(shown, settings, caption):
    assert f">{caption}</caption>" in table(shown, ["x"], [[1]], **settings)


def test_long_text_is_broken_between_words(capsys, monkeypatch):
    monkeypatch.setattr(claims, "LINE", 20)
    claims.say("  a) " + "word " * 8, indent="     ")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["  a) word word word", "     word word word", "     word word"]
