"""Every exercise in three ways: the stub is "not attempted", right answers pass however they are
written, and each typical wrong answer of the catalogue is told what is wrong with it."""

import re

import pytest
import torch
from learners import CATALOGUE
from torch import nn

from lora_course.exercises import checker, everything
from lora_course.exercises.checker import Choice, Exercise

EXERCISES = {exercise.name: exercise for exercise in everything()}
CODING = {name: e for name, e in EXERCISES.items() if not isinstance(e, Choice)}
CHOICES = {name: e for name, e in EXERCISES.items() if isinstance(e, Choice)}
RIGHT = [(name, answer) for name in CATALOGUE for answer in CATALOGUE[name].right]
WRONG = [(name, *item) for name in CATALOGUE for item in CATALOGUE[name].wrong.items()]
SEEDS = range(3)

every_coding = pytest.mark.parametrize("name", CODING)
every_choice = pytest.mark.parametrize("name", CHOICES)


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


@pytest.fixture
def said(capsys, monkeypatch):
    """What the exercise says to an answer, with the numbers of a seed."""

    def ask(name: str, answer, seed: int = 0) -> str:
        monkeypatch.setattr(checker, "new_seed", lambda: seed)
        EXERCISES[name](answer)
        return capsys.readouterr().out

    return ask


# --- the catalogue -------------------------------------------------------------------------------


def test_the_catalogue_holds_every_coding_exercise():
    assert CATALOGUE.keys() == CODING.keys()
    for name, answers in CATALOGUE.items():
        assert len(answers.right) >= 2, name
        assert len(answers.wrong) >= 3, name
    assert len(WRONG) >= 30


def test_names_are_unique_and_say_what_to_call():
    everyone = list(everything())
    assert len({exercise.name for exercise in everyone}) == len(everyone)


@every_coding
def test_a_stub_is_not_attempted(said, name):
    def stub(*arguments):
        raise NotImplementedError

    assert said(name, stub).startswith("Not attempted yet.")
    assert said(name, None).startswith("Not attempted yet.")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, answer", RIGHT)
def test_a_right_answer_passes(said, name, answer, seed):
    assert said(name, answer, seed).startswith("Right.")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, words, answer", WRONG)
def test_a_wrong_answer_gets_its_own_message(said, name, words, answer, seed):
    out = said(name, answer, seed)
    assert out.startswith("Not right yet: ") and words in out


@every_coding
def test_no_two_wrong_answers_get_the_same_message(said, name):
    messages = [re.sub(r"\d+", "#", said(name, a)) for a in CATALOGUE[name].wrong.values()]
    assert len(set(messages)) == len(messages)


JUNK = [
    0,
    2.5,
    -1,
    float("nan"),
    "words",
    b"x",
    True,
    [],
    {},
    (),
    [1, 2],
    (1, 2),
    {"a": 1},
    object(),
]
JUNK += [torch.zeros(()), torch.zeros(3), torch.zeros(0, 2), torch.eye(4), nn.Linear(2, 2)]
JUNK += [(torch.zeros(2), torch.zeros(2)), (nn.Linear(2, 2), "words"), {"first": "words"}, int, len]


@every_coding
def test_whatever_is_returned_is_answered_without_blaming_the_learners_code(said, name):
    for junk in JUNK:
        out = said(name, lambda *_, junk=junk: junk)
        assert out.startswith(("Not right yet", "Not attempted")), (junk, out)
        assert "raised" not in out, (junk, out)


@every_coding
@pytest.mark.parametrize("answer", [3, "words", [], torch.zeros(2), lambda: None])
def test_what_is_no_fitting_function_is_answered(said, name, answer):
    assert said(name, answer).startswith("Not right yet")


@every_coding
def test_hints_come_in_steps(capsys, name):
    exercise = CODING[name]
    assert len(exercise.hints) >= 3
    for _ in range(len(exercise.hints) + 1):
        exercise.hint()
    given = capsys.readouterr().out.splitlines()
    assert len(set(given)) == len(exercise.hints)


@every_coding
def test_what_an_exercise_says_is_short(name):
    assert 20 < len(CODING[name].why) < 200


# --- questions -----------------------------------------------------------------------------------


def test_there_are_enough_questions():
    assert len(CHOICES) >= 6


@every_choice
def test_a_question_without_an_answer_is_not_attempted(said, name):
    assert "Not attempted yet." in said(name, None)


@every_choice
def test_every_wrong_letter_names_its_own_misconception(said, name):
    choice = CHOICES[name]
    verdicts = {letter: said(name, letter).splitlines()[-1] for letter in choice.options}
    right = [letter for letter, verdict in verdicts.items() if verdict.startswith("Right. ")]
    assert right == [choice.right]
    assert len(set(verdicts.values())) == len(choice.options) >= 3
    assert all(v.startswith(("Right. ", "Not right yet: ")) for v in verdicts.values())


@every_choice
@pytest.mark.parametrize("answer", ["z", "", "ab", 1, ["a"]])
def test_what_is_no_option_is_answered(said, name, answer):
    assert "is not an option" in said(name, answer)


@every_choice
def test_a_capital_letter_is_as_good(said, name):
    assert "Right. " in said(name, CHOICES[name].right.upper())


def test_the_right_letters_do_not_give_themselves_away():
    letters = [choice.right for choice in CHOICES.values()]
    assert max(letters.count(letter) for letter in "abcd") <= len(letters) / 2


def test_the_longest_option_is_not_always_right():
    longest = [
        max(c.options, key=lambda letter, c=c: len(c.options[letter])) == c.right
        for c in CHOICES.values()
    ]
    assert sum(longest) <= len(longest) / 2


def test_exercise_is_the_only_other_kind():
    assert all(type(exercise) in (Exercise, Choice) for exercise in everything())
