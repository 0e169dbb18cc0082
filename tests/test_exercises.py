"""Every exercise: each of its mistakes gets its own message, and right answers pass."""

import numpy as np
import pytest
import torch
from other_answers import RIGHT, WRONG, TinyByEinsum
from torch import nn

from lora_course.exercises import checker, everything, ex02
from lora_course.exercises.checker import Exercise, read_words
from lora_course.exercises.choices import Choice
from lora_course.tiny_lora import TinyLoRA

EXERCISES = {exercise.name: exercise for exercise in everything()}
CODING = {name: e for name, e in EXERCISES.items() if isinstance(e, Exercise)}
CHOICES = {name: e for name, e in EXERCISES.items() if isinstance(e, Choice)}
SEEDS = range(2)

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


# --- the data of each exercise -------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@every_coding
def test_every_mistake_gets_its_message_and_the_reference_is_right(said, name, seed):
    assert said(name, CODING[name].reference, seed) == f"Right. {CODING[name].why}\n"
    for message, wrong in CODING[name].mistakes.items():
        assert said(name, wrong, seed).startswith(f"Not right yet: {message}"), message


@every_coding
def test_an_exercise_has_enough_to_say(name):
    hints = CODING[name].words["hints"]
    assert len(CODING[name].mistakes) >= 6
    assert len(hints) == len(set(hints)) >= 3
    assert 20 < len(CODING[name].why) < 200


def test_every_check_has_its_words_and_no_words_are_left_over():
    assert list(read_words("exercises.toml")) == list(EXERCISES)


def stub(*arguments):
    raise NotImplementedError


@every_coding
@pytest.mark.parametrize("answer", [None, stub, lambda *_: None], ids=["None", "stub", "pass"])
def test_what_was_not_begun_is_not_attempted(said, name, answer):
    assert said(name, answer).startswith("Not attempted yet.")


JUNK = [float("nan"), "words", True, [], {"a": 1}, (1, 2), object(), np.ones(3), torch.eye(4),
        nn.Linear(2, 2), (torch.zeros(2), torch.zeros(2)), len]  # fmt: skip


@every_coding
def test_whatever_is_returned_is_answered_without_blaming_the_learners_code(said, name):
    for junk in JUNK:
        out = said(name, lambda *_, junk=junk: junk)
        assert out.startswith(("Not right yet", "Not attempted")), (junk, out)
        assert "your code raised" not in out, (junk, out)


@every_coding
@pytest.mark.parametrize("answer", [3, "words", torch.zeros(2), lambda: None])
def test_what_is_no_fitting_function_is_answered(said, name, answer):
    assert said(name, answer).startswith("Not right yet")


# --- right answers written in another way; wrong ones that were once taken for right --------------


def test_every_exercise_has_a_right_answer_of_another_make():
    assert RIGHT.keys() == CODING.keys()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, answer", [(n, a) for n, group in RIGHT.items() for a in group])
def test_a_right_answer_passes_however_it_is_written(said, name, answer, seed):
    assert said(name, answer, seed).startswith("Right.")


@pytest.mark.parametrize("name, answer, words", WRONG)
def test_a_wrong_answer_that_is_no_mistake_of_the_list_is_told_what_came(said, name, answer, words):
    out = said(name, answer)
    assert out.startswith("Not right yet: ") and words in out


def test_the_page_goes_on_with_the_learners_class_only_where_it_is_right(capsys):
    class WithoutForward(TinyLoRA):
        def forward(self, x):
            raise NotImplementedError

    for unfinished in (None, WithoutForward, ex02.with_plain_tensors, TinyLoRA):
        assert ex02.yours_or_complete(unfinished) is TinyLoRA
        assert capsys.readouterr().out == "The page goes on with a complete TinyLoRA.\n"
    assert ex02.yours_or_complete(TinyByEinsum) is TinyByEinsum
    assert capsys.readouterr().out == "The page goes on with your class.\n"


# --- questions -----------------------------------------------------------------------------------


@every_choice
def test_every_letter_gets_its_own_reply(said, name):
    words = CHOICES[name].words
    assert list(words["options"]) == list(words["because"]) == list("abcd")
    replies = words["because"] | {words["right"]: CHOICES[name].why}
    for letter, reply in replies.items():
        verdict = "Right." if letter == words["right"] else "Not right yet:"
        assert said(name, letter).splitlines()[-1] == f"{verdict} {reply}"
    assert len(set(replies.values())) == 4
    assert len(words["hints"][0]) > 20


def test_the_right_letters_do_not_give_themselves_away():
    words = [choice.words for choice in CHOICES.values()]
    letters = [w["right"] for w in words]
    longest = [max(w["options"].values(), key=len) == w["options"][w["right"]] for w in words]
    assert max(letters.count(letter) for letter in "abcd") <= len(letters) / 2
    assert sum(longest) <= len(longest) / 2
