"""What only the notebooks use: claims, predictions, sources and tables."""

import html
import inspect
import math
import re

import pytest

from lora_course import claims, tables
from lora_lib.lora import LoRALinear
from lora_lib.rank import k90


@pytest.fixture
def shown(monkeypatch):
    """The HTML that was displayed, in order."""
    pages = []
    monkeypatch.setattr(tables, "display", lambda page: pages.append(page.data))
    return pages


# --- claims and predictions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, bound, holds, report",
    [
        (0.5, {"at_least": 0.5}, True, "measured 0.5, claimed at least 0.5"),
        (-1, {"at_most": 0}, True, "measured -1, claimed at most 0"),
        (True, {"equals": True}, True, "measured yes, claimed exactly yes"),
        (16384, {"equals": 16384}, True, "measured 16,384, claimed exactly 16,384"),
        (0.123456, {"at_most": 1}, True, "measured 0.1235, claimed at most 1"),
        (0.49, {"at_least": 0.5}, False, "measured 0.49, claimed at least 0.5"),
        (0.001, {"equals": 0}, False, "measured 0.001, claimed exactly 0"),
        (math.nan, {"at_least": 0}, False, "measured nan, claimed at least 0"),
        (math.nan, {"at_most": 0}, False, "measured nan, claimed at most 0"),
    ],
)
def test_a_claim_says_whether_it_holds_and_fails_the_tests_if_not(
    monkeypatch, capsys, value, bound, holds, report
):
    monkeypatch.setenv("LORA_LIB_STRICT", "0")
    claims.claim("score", value, **bound)
    assert capsys.readouterr().out == f"{'Holds.' if holds else claims.FAILS} score: {report}\n"
    monkeypatch.setenv("LORA_LIB_STRICT", "1")
    if holds:
        claims.claim("score", value, **bound)
    else:
        with pytest.raises(AssertionError, match="score: measured "):
            claims.claim("score", value, **bound)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0, "equals": 1}])
def test_a_claim_needs_exactly_one_bound(bounds):
    with pytest.raises(ValueError, match=f"claim needs one .*; {len(bounds)} were given"):
        claims.claim("x", 1, **bounds)


@pytest.mark.parametrize("guess, predicted", [(None, "—"), ("a", "few"), ("b", "many")])
def test_the_outcome_stands_beside_the_prediction(shown, capsys, guess, predicted):
    claims.predict("k", "How many?", ["few", "many"], guess)
    asked = capsys.readouterr().out.splitlines()
    assert asked[:3] == ["How many?", "  a) few", "  b) many"]
    assert asked[3:] == [f"Your prediction: {predicted}" if guess else
                         'Set guess to a letter, such as "a", and run.']  # fmt: skip
    claims.reveal("k", "many, 42")
    assert re.findall(r"<td[^>]*>(.*?)</td>", shown[0]) == ["How many?", predicted, "many, 42"]


@pytest.mark.parametrize("guess", ["c", "ab", "", "A", 0])
def test_a_guess_that_is_no_option_is_refused(guess):
    with pytest.raises(ValueError, match="must be None or one of a, b"):
        claims.predict("k", "How many?", ["few", "many"], guess)


# --- sources and tables --------------------------------------------------------------------------


def test_the_source_that_is_shown_is_the_very_source(shown):
    tables.show_source(LoRALinear, k90)
    pages = [html.unescape(re.sub(r"<[^>]+>", "", page)).strip() for page in shown]
    assert pages == [inspect.getsource(item).strip() for item in (LoRALinear, k90)]


@pytest.mark.parametrize(
    "value, text, right",
    [(0.12345, "0.123", True), (16384, "16,384", True), ("1e-3", "1e-3", True),
     ("−0.5", "−0.5", True), ("12.5 %", "12.5 %", True), ("", "", True), ("r = 8", "r = 8", False),
     ("0.5 (0.4 to 0.6)", "0.5 (0.4 to 0.6)", False), ("—", "—", False), (None, "None", False)],
)  # fmt: skip
def test_numbers_stand_on_the_right_and_words_on_the_left(value, text, right):
    head, cell = re.findall("<t[hd].*?</t[hd]>", tables.table_html(["x"], [[value]]))
    assert f">{text}</td>" in cell
    assert all(f"text-align:{'right' if right else 'left'}" in part for part in (head, cell))


def test_a_table_escapes_html_and_sets_text_of_any_script_in_its_own_direction(shown):
    tables.show_table(["<b>"], [["<i>&"], ["חיפה"], []], caption="<u>", recorded=True)
    [page] = shown
    assert (
        "&lt;b&gt;" in page and "&lt;i&gt;&amp;" in page and "recorded results; &lt;u&gt;" in page
    )
    assert not any(tag in page for tag in ("<b>", "<i>", "<u>"))
    assert "<td dir='auto' style='text-align:left'>חיפה</td>" in page
