"""How an exercise answers, whatever it is given."""

import random
import subprocess
import sys

import nbformat
import pytest
import torch
import torch.nn.functional as F
from nbclient import NotebookClient

from lora_course.exercises import checker, ex01
from lora_course.exercises.checker import Choice, Exercise, Wrong


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
    return Exercise(
        "09 double",
        is_double_of_three,
        contract="double(x) returns a number.",
        why="Because.",
        hints=["first", "second", "third"],
    )


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
    message = "Not attempted yet. Fill in the blank and run the cell again; exercises.double.hint()"
    assert capsys.readouterr().out.count(message) == 2


def test_a_function_without_a_return_is_asked_for_it_and_a_stub_is_not(capsys):
    def check(learner):
        if learner(3) is None:
            raise NotImplementedError

    exercise = Exercise("09 double", check, contract="", why="", hints=["first"])
    exercise(print)  # returns None, from another file than the check
    assert "is a return missing?" in capsys.readouterr().out
    exercise(unfinished)
    assert "return" not in capsys.readouterr().out


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


def test_a_long_message_of_an_exception_is_cut(exercise, capsys):
    def wordy(x):
        raise ValueError("a\nsecond line" if x == 2 else 1000 * "much ")

    exercise(wordy)
    out = capsys.readouterr().out
    assert "your code raised ValueError: much much" in out and len(out) < 350


class Callable:
    def __init__(self, argument):
        self.value = 1 / (argument - 3)


def test_the_line_is_found_in_a_class_as_well(exercise, capsys):
    exercise(Callable)
    assert capsys.readouterr().out.endswith(" at: self.value = 1 / (argument - 3)\n")


@pytest.mark.parametrize("answer", ["a string", 3, torch.zeros(2)])
def test_a_result_in_place_of_the_function_is_recognised(answer, capsys):
    ex01.k90(answer)
    assert "not a function; pass the function itself, without calling it" in capsys.readouterr().out


@pytest.mark.parametrize("answer", [lambda: 6, lambda values: values])
def test_an_answer_of_the_wrong_kind_is_told_what_is_asked_for(answer, capsys):
    ex01.k90(answer)
    out = capsys.readouterr().out
    assert out.startswith("Not right yet: your answer could not be used (") and " at: " not in out
    assert out.endswith(f"What is asked for: {ex01.k90.contract}\n")


def test_every_call_draws_anew_and_leaves_the_notebooks_numbers_alone(exercise):
    drawn = []
    exercise.test = lambda answer: drawn.append((torch.rand(1).item(), random.random()))
    torch.manual_seed(3)
    random.seed(3)
    expected = torch.rand(2), [random.random() for _ in range(2)]
    torch.manual_seed(3)
    random.seed(3)
    first = torch.rand(1), random.random()
    exercise(len)
    exercise(len)
    assert torch.equal(torch.cat([first[0], torch.rand(1)]), expected[0])
    assert [first[1], random.random()] == expected[1]
    assert len(set(drawn)) == 2 and not set(drawn) & {(expected[0][0].item(), expected[1][0])}


def test_a_seed_repeats_what_is_drawn(exercise, monkeypatch):
    drawn = []
    exercise.test = lambda answer: drawn.append((torch.rand(1).item(), random.random()))
    monkeypatch.setattr(checker, "new_seed", lambda: 5)
    exercise(len)
    exercise(len)
    assert len(set(drawn)) == 1


def test_for_a_grade_only_a_right_answer_does_not_raise(exercise):
    exercise.grade(lambda x: x + x)
    for answer, message in [(None, "not attempted"), (unfinished, "not attempted")]:
        with pytest.raises(AssertionError, match=message):
            exercise.grade(answer)
    with pytest.raises(AssertionError, match="twice 3 is 6"):
        exercise.grade(lambda x: x)


def test_in_a_notebook_the_learners_line_is_shown():
    cells = [
        "from lora_course.exercises import ex01 as exercises\ndef helper(v):\n    return v / None",
        "def mine(values):\n    return helper(values)  # my line\n\n\nexercises.k90(mine)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    text = " ".join(notebook.cells[1].outputs[0].text.split())
    assert text.startswith("Not right yet: your code raised TypeError")
    assert text.endswith("at: return helper(values) # my line")


def test_the_library_does_not_import_the_exercises():
    code = "import sys, lora_lib; print([m for m in sys.modules if 'lora_course.exercises' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
        "Hint 3 of 3 (the last one): third",
        "Hint 3 of 3 (the last one): third",
    ]


def colour(misconceptions):
    return Choice(
        "09 colour",
        question="Which colour is the sky?",
        options={"a": "green", "b": "blue", "c": "brown"},
        right="b",
        why="Short waves scatter more.",
        misconceptions=misconceptions,
    )


def test_a_choice_shows_its_question_and_options_before_the_verdict(capsys):
    question = colour({"a": "that is grass.", "c": "that is soil."})
    for answer, verdict in {
        None: "Not attempted yet. Replace None by a letter and run the cell again.",
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
