"""How an exercise answers, whatever it is given."""

import pytest
import torch
import torch.nn.functional as F

from lora_lib.exercises import rank
from lora_lib.exercises.engine import Choice, Exercise, Wrong


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


@pytest.fixture
def strict(monkeypatch):
    monkeypatch.setenv("LORA_LIB_STRICT", "1")


def is_double_of_three(answer):
    if answer(3) != 6:
        raise Wrong(f"twice 3 is 6, and you returned {answer(3)}")


@pytest.fixture
def exercise():
    return Exercise(is_double_of_three, why="Because.", hints=["first", "second", "third"])


def unfinished(x):
    raise NotImplementedError


def divides(x):
    unused = x
    return unused / 0  # of no use


def fails_inside_torch(x):
    one = torch.ones(1)
    return F.layer_norm(one, [x])


def test_a_right_answer_says_why_it_matters(exercise, capsys):
    exercise(lambda x: x + x)
    assert capsys.readouterr().out == "Right. Because.\n"


def test_a_wrong_answer_says_what_is_wrong(exercise, capsys):
    exercise(lambda x: x)
    assert capsys.readouterr().out == "Not right yet: twice 3 is 6, and you returned 3\n"


@pytest.mark.parametrize("answer", [None, unfinished])
def test_what_was_not_attempted_is_no_mistake(exercise, answer, capsys):
    exercise(answer)
    exercise()
    assert capsys.readouterr().out.count("Not attempted yet.") == 2


def test_the_learners_exception_is_shown_short_with_its_line(exercise, capsys):
    exercise(divides)
    assert capsys.readouterr().out == (
        "Not right yet: your code raised ZeroDivisionError: division by zero"
        " at: return unused / 0  # of no use\n"
    )


def test_an_exception_inside_torch_is_shown_with_the_learners_line(exercise, capsys):
    exercise(fails_inside_torch)
    out = capsys.readouterr().out
    assert out.startswith("Not right yet: your code raised RuntimeError")
    assert out.endswith(" at: return F.layer_norm(one, [x])\n")


@pytest.mark.parametrize("answer", ["a string", 3, lambda: 6, lambda values: values])
def test_an_answer_of_the_wrong_kind_shows_no_line_of_the_check(answer, capsys):
    rank.k90(answer)
    out = capsys.readouterr().out
    assert out.startswith("Not right yet: your code raised") and " at: " not in out


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    "answer, message", [(lambda x: x, "twice 3 is 6"), (divides, "ZeroDivisionError")]
)
def test_strict_mode_raises_for_a_wrong_answer(exercise, answer, message):
    with pytest.raises(AssertionError, match=message):
        exercise(answer)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("answer", [None, unfinished, lambda x: 2 * x])
def test_strict_mode_raises_for_nothing_else(exercise, answer):
    exercise(answer)


def test_hints_come_one_by_one_and_the_last_repeats(exercise, capsys):
    for _ in range(4):
        exercise.hint()
    assert capsys.readouterr().out.splitlines() == [
        "Hint 1 of 3: first",
        "Hint 2 of 3: second",
        "Hint 3 of 3: third",
        "Hint 3 of 3: third",
    ]


def colour(misconceptions):
    return Choice(
        question="Which colour is the sky?",
        options={"a": "green", "b": "blue", "c": "brown"},
        right="b",
        why="Short waves scatter more.",
        misconceptions=misconceptions,
    )


def test_a_choice_shows_its_question_and_options_before_the_verdict(capsys):
    question = colour({"a": "that is grass.", "c": "that is soil."})
    for answer, verdict in {
        None: "Not attempted yet. Fill in the blank and run the cell again; hint() helps.",
        "a": "Not right yet: that is grass.",
        "b": "Right. Short waves scatter more.",
        "c": "Not right yet: that is soil.",
        "z": "Not right yet: 'z' is not an option; give one of a, b, c",
    }.items():
        question(answer)
        assert capsys.readouterr().out.splitlines() == [
            "Which colour is the sky?", "  a) green", "  b) blue", "  c) brown", verdict
        ]  # fmt: skip


def test_a_choice_needs_a_misconception_for_every_wrong_option():
    with pytest.raises(ValueError, match=r"options \['c'\] have no misconception"):
        colour({"a": "that is grass."})
