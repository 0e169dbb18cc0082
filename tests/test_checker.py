"""How a check answers, whatever it is given."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

from lora_course.exercises.checker import Exercise, difference, same


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


def double(x):
    return 2 * x


def draw():
    yield (random.choice([1, 2, 3]),)  # 2 + 2 is 2 · 2: 2 does not tell the mistake


@pytest.fixture
def exercise():
    mistakes = {"you add two": lambda x: x + 2, "you ask for its length": lambda x: len(x)}
    return with_words(Exercise("09 double", double, draw, mistakes), why="Because.")


def with_words(check, **words):
    check.words = {"hints": ["one", "two"]} | words
    return check


def stub(x):
    raise NotImplementedError


def divides(x):
    unused = x
    return unused / 0  # of no use


def in_torch(x):
    return F.layer_norm(torch.ones(1), [x + 1])


class Maker:
    def __init__(self, argument):
        self.value = 1 / (argument - argument)


ANSWERS = {
    "right": (lambda x: x + x, "Right. Because."),
    "a tensor for a number": (lambda x: torch.tensor(2 * x), "Right. Because."),
    "a mistake": (lambda x: 2 + x, "Not right yet: you add two"),
    "a mistake that raises": (
        lambda x: len(x),
        "Not right yet: you ask for its length; your code raised TypeError: object of type 'int' "
        "has no len() at: lambda x: len(x),",
    ),
    "another mistake": (lambda x: -7, "Not right yet: the result for ("),
    "a tuple": (lambda x: (2 * x,), ",) came"),
    "nothing": (None, "Not attempted yet. Write the function and run the cell again; "),
    "the stub": (stub, "exercises.double.hint() helps."),
    "pass": (lambda x: None, "So far it returns None; is a return missing?"),
    "no function": (6, "this is 6; pass the function itself, without calling it"),
    "a module without forward": (nn.Module(), "it could not be used (NotImplementedError: "),
    "no argument": (lambda: 6, "it could not be used (TypeError: "),
    "an error": (divides, "ZeroDivisionError: division by zero at: return unused / 0  # of no use"),
    "an error in torch": (in_torch, "at: return F.layer_norm(torch.ones(1), [x + 1])"),
    "an error in a class": (Maker, "at: self.value = 1 / (argument - argument)"),
}


@pytest.mark.parametrize("answer, words", ANSWERS.values(), ids=ANSWERS)
def test_what_an_exercise_answers(exercise, capsys, answer, words):
    exercise(answer)
    assert " ".join(words.split()) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("answer", [divides, lambda x: x + 2, None, stub, double])
def test_only_a_right_answer_gets_a_grade(exercise, answer):
    exercise.grade(lambda x: x + x)
    words = r"division by zero|you add two|not attempted|of the check itself"
    with pytest.raises(AssertionError, match=words):
        exercise.grade(answer)


def test_strict_mode_raises_for_a_wrong_answer_alone(exercise, monkeypatch):
    monkeypatch.setenv("LORA_LIB_STRICT", "1")
    for answer in (double, None, stub):
        exercise(answer)
    with pytest.raises(AssertionError, match="you add two"):
        exercise(lambda x: x + 2)


def test_changed_arguments_are_noticed_and_the_learner_gets_copies(capsys):
    given = [torch.ones(2), {"a": [1.0]}]
    exercise = Exercise("09 sum", lambda t, d: 3, lambda: [tuple(given)], {})
    exercise(lambda t, d: t.add_(1) is d["a"].append(2.0) or 3)
    assert "your function changed t, d, which it was given" in capsys.readouterr().out
    assert given[0].tolist() == [1, 1] and given[1] == {"a": [1.0]}


def test_the_learners_random_numbers_go_on_as_if_nothing_had_been_checked(exercise):
    def numbers():
        return torch.rand(1).item(), random.random(), np.random.rand()

    def seed():
        torch.manual_seed(3), random.seed(3), np.random.seed(3)

    seed()
    expected = numbers(), numbers()
    seed()
    first = numbers()
    exercise(lambda x: seed() or numbers())
    assert (first, numbers()) == expected


def test_in_a_notebook_the_learners_line_is_shown(capsys):
    shell = InteractiveShell.instance()
    shell.run_cell("def helper(v):\n    return v / None")
    shell.run_cell(
        "from lora_course.exercises import ex01 as exercises\n"
        "def mine(values):\n    return helper(values)  # my line\n\n\nexercises.k90(mine)"
    )
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("Not right yet: your code raised TypeError")
    assert text.endswith("at: return helper(values) # my line")


def test_hints_come_one_by_one_and_the_last_repeats(exercise, capsys):
    for _ in range(3):
        exercise.hint()
    last = "Hint 2 of 2 (the last one): two"
    assert capsys.readouterr().out.splitlines() == ["Hint 1 of 2: one", last, last]


ONE = torch.ones(2)
SAME = [(3, 3.0), (3, torch.tensor(3)), (0.1, np.float32(0.1)), (ONE, ONE.double()), ([1], (1,)),
        ({"a": ONE}, {"a": ONE.int()}), (float("nan"), float("nan")), ({1}, {1})]  # fmt: skip
DIFFERENT = [(3, 3.0001), (True, 1), (ONE, ONE.numpy()), (ONE, ONE[None]), (ONE, ONE + 0.1),
             ((1,), 1), ({"a": 1}, {"b": 1}), (None, 0), ("1", 1),
             (ValueError("a"), ValueError("b")),
             (nn.Linear(2, 2), nn.Linear(2, 2)), (10**9, 10**9 + 1)]  # fmt: skip


def test_what_is_the_same():
    assert [pair for pair in SAME if not same(*pair)] == []
    assert [pair for pair in DIFFERENT if same(*pair)] == []


def test_a_difference_is_said_in_words():
    assert difference(ONE.numpy(), ONE) == (
        "expected a tensor of shape (2,), and a numpy array of shape (2,) came"
    )
    assert difference(ONE + 0.5, ONE).endswith("the values are off by up to 0.5")
    assert difference({"a", "c"}, {"a", "b"}) == "too much: c; missing: b"
