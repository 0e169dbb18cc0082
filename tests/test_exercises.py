"""Every exercise: each of its mistakes gets its own message, and right answers pass."""

import numpy as np
import pytest
import torch
from other_answers import RIGHT, WRONG, TinyInFunctions
from torch import nn

from lora_course.exercises import checker, everything, ex02, transfer
from lora_course.exercises.checker import Exercise, read_words
from lora_course.exercises.choices import Choice
from lora_course.tiny_lora import TinyLoRA

EXERCISES = {exercise.name: exercise for exercise in everything()}
CODING = {name: e for name, e in EXERCISES.items() if isinstance(e, Exercise)}
CHOICES = {name: e for name, e in EXERCISES.items() if isinstance(e, Choice)}
SEEDS = range(2)

every_coding = pytest.mark.parametrize("name", CODING)


@pytest.fixture(scope="module")
def trials():
    """What an exercise tries answers on depends on the seed alone: here it is made once."""
    made, trial = {}, Exercise.trial

    def once(exercise):
        key = exercise.name, torch.initial_seed()
        return made[key] if key in made else made.setdefault(key, trial(exercise))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exercise, "trial", once)
        yield


@pytest.fixture
def said(capsys, monkeypatch, trials):
    """What the exercise says to an answer of a learner, with the numbers of a seed."""
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)

    def ask(name: str, answer, seed: int = 0) -> str:
        monkeypatch.setattr(checker, "new_seed", lambda: seed)
        EXERCISES[name](answer)
        return capsys.readouterr().out

    return ask


def test_every_check_has_its_words_and_no_words_are_left_over():
    assert list(read_words("exercises.toml")) == list(EXERCISES)
    assert all(check.words["hints"] for check in EXERCISES.values())


@pytest.mark.parametrize("seed", SEEDS)
@every_coding
def test_every_mistake_gets_its_message_and_the_reference_is_right(said, name, seed):
    assert said(name, CODING[name].reference, seed) == f"Right. {CODING[name].why}\n"
    for message, wrong in CODING[name].mistakes.items():
        assert said(name, wrong, seed).startswith(f"Not right yet: {message}"), message


def stub(*arguments):
    raise NotImplementedError


JUNK = [float("nan"), "words", True, [], {"a": 1}, (1, 2), object(), np.ones(3), torch.eye(4),
        nn.Linear(2, 2), (torch.zeros(2), torch.zeros(2)), len]  # fmt: skip


@every_coding
def test_what_is_no_answer_is_told_so_without_blaming_the_learners_code(said, name):
    for nothing in (None, stub, lambda *_: None):
        assert said(name, nothing).startswith("Not attempted yet."), nothing
    for no_such_function in (3, "words", torch.zeros(2), lambda: None):
        assert said(name, no_such_function).startswith("Not right yet"), no_such_function
    for junk in JUNK:
        out = said(name, lambda *_, junk=junk: junk)
        assert out.startswith(("Not right yet", "Not attempted")), (junk, out)
        assert "your code raised" not in out, (junk, out)


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
    assert ex02.yours_or_complete(TinyInFunctions) is TinyInFunctions
    assert capsys.readouterr().out == "The page goes on with your class.\n"


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_shows_its_options_and_every_letter_gets_its_own_reply(said, capsys, name):
    choice, words = CHOICES[name], CHOICES[name].words
    options = [f"  {letter}) " for letter in words["options"]]
    for letter, reply in (words["because"] | {words["right"]: choice.why}).items():
        verdict = f"Right. {reply}" if letter == words["right"] else f"Not right yet: {reply}"
        *shown, last = said(name, f" {letter.upper()} ").splitlines()
        assert shown[0] == words["question"] and last == verdict
        assert [line[:5] for line in shown[-4:]] == options
        choice.record(letter)  # an assignment does not judge
        assert capsys.readouterr().out.splitlines() == [*shown, f"Recorded: {letter}"]
    for nothing in (None, "z", ("a",)):
        assert said(name, nothing).splitlines()[-1].startswith("Not attempted yet.")
        choice.record(nothing)
        assert capsys.readouterr().out.splitlines()[-1].startswith("Nothing is recorded yet.")


# --- the transfer task ---------------------------------------------------------------------------


def test_the_base_of_the_transfer_task_knows_something_and_every_copy_is_its_own():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    base = transfer.pretrained_mixer()
    assert torch.equal(torch.rand(1), expected)
    letters, countries = transfer.load_towns(transfer.OLD, 100)
    assert (base(letters).argmax(dim=1) == countries).float().mean() > 2 / len(transfer.OLD)
    nn.init.zeros_(base.norm.weight)
    assert transfer.pretrained_mixer().norm.weight.any()
