"""What only the notebooks use: claims, predictions, sources and tables."""

import math
import re

import pytest

from lora_course import claims, predictions, tables


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
        (0.5, {"at_least": 0.5}, True, "0.5 (at least 0.5)"),
        (-1, {"at_most": 0}, True, "-1 (at most 0)"),
        (16384, {"equals": 16384}, True, "16,384 (exactly 16,384)"),
        (0.49, {"at_least": 0.5}, False, "0.49 (at least 0.5)"),
        (math.nan, {"at_least": 0}, False, "nan (at least 0)"),
        (math.nan, {"at_most": 0}, False, "nan (at most 0)"),
    ],
)
def test_a_claim_says_whether_it_holds_and_fails_the_tests_if_not(
    monkeypatch, capsys, value, bound, holds, report
):
    monkeypatch.setenv("LORA_LIB_STRICT", "0")
    claims.claim("score", value, **bound)
    assert capsys.readouterr().out == f"{'✓' if holds else claims.FAILS} score: {report}\n"
    monkeypatch.setenv("LORA_LIB_STRICT", "1")
    if holds:
        claims.claim("score", value, **bound)
    else:
        with pytest.raises(AssertionError, match="score: "):
            claims.claim("score", value, **bound)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0, "equals": 1}])
def test_a_claim_needs_exactly_one_bound(bounds):
    with pytest.raises(ValueError, match=f"claim needs one .*; {len(bounds)} were given"):
        claims.claim("x", 1, **bounds)


def test_every_prediction_has_one_right_option_and_a_reason():
    for name, asked in predictions.all_predictions().items():
        assert asked.keys() == {"question", "options", "right", "why"}, name
        assert asked["right"] in "abcdefgh"[: len(asked["options"])], name
        assert len(set(asked["options"])) == len(asked["options"]) >= 2, name


@pytest.mark.parametrize(
    "guess, kept, said, answer",
    [
        (None, None, "Put a letter", "Right: b) 130."),
        ("a", "a", "Your prediction: a) 26", "You said a)."),
        (" B ", "b", "Your prediction: b) 130", "You were right."),
        ("d", None, "'d' is not one of the options; give a, b, c", "Right: b) 130."),
        (130, None, "130 is not one of the options", "Right: b) 130."),
        (["a"], None, "['a'] is not one of the options", "Right: b) 130."),
    ],
)
def test_a_prediction_is_kept_until_the_answer_says_which_was_right(
    capsys, guess, kept, said, answer
):
    assert predictions.predict("noise", guess) == kept
    out = capsys.readouterr().out
    assert "  a) 26\n  b) 130\n  c) 230\n" in out and said in out
    predictions.reveal("noise", 129)
    out = capsys.readouterr().out
    assert out.startswith("Measured: 129\n") and answer in out
    assert "You said" not in out or kept == "a"


# --- sources and tables --------------------------------------------------------------------------


def test_names_are_marked_where_a_spelling_is_recorded_and_georgian_is_read_aloud(shown):
    rows = {"base": ["Бремен", "Xи"], "adapter": ["ბრემენი", "ხი"], "early": ["ბრემენ", "ხ"]}
    scripts = {"base": "cyrillic", "adapter": "georgian", "early": "georgian"}
    tables.show_names(["Bremen", "Nowhere<"], rows, scripts)
    cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", shown[0])
    text = [re.sub(r"<[^>]+>", "", cell) for cell in cells]
    assert text[:3] == ["", "Bremen", "Nowhere&lt;"]
    assert text[3:6] == ["base", "Бремен ✓", "Xи"]
    assert text[6:9] == ["adapter", "ბრემენი ✓reads bremeni", "ხიreads khi"]
    assert text[9:] == ["early", "ბრემენ ✗reads bremen", "ხreads kh"]


@pytest.mark.parametrize(
    "value, text, right",
    [(0.12345, "0.123", True), (16384, "16,384", True), ("12.5 %", "12.5 %", True),
     ("r = 8", "r = 8", False), ("0.5 (0.4 to 0.6)", "0.5 (0.4 to 0.6)", False)],
)  # fmt: skip
def test_numbers_stand_on_the_right_and_words_on_the_left(value, text, right, shown):
    tables.show_table(["x"], [[value]])
    head, cell = re.findall("<t[hd].*?</t[hd]>", shown[0])
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
