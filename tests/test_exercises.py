"""Every exercise: each of its mistakes gets its own message, and right answers pass; the clinic of
notebook 04, whose runs are broken, each in its own way; and the two quizzes: parallel, scored,
explained, and never raising."""

import math

import numpy as np
import pytest
import torch
from other_answers import RIGHT, WRONG, TinyInFunctions
from torch import nn

from lora_course.exercises import checker, everything, ex02, ex04, quiz, transfer
from lora_course.exercises.checker import Exercise, read_words
from lora_course.exercises.choices import Choice
from lora_course.tiny_lora import TinyLoRA

EXERCISES = {exercise.name: exercise for exercise in everything()}
CODING = {name: e for name, e in EXERCISES.items() if isinstance(e, Exercise)}
CHOICES = {name: e for name, e in EXERCISES.items() if isinstance(e, Choice)}
SEEDS = range(2)

every_coding = pytest.mark.parametrize("name", CODING)


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


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


# --- the base of the transfer task, and the clinic -----------------------------------------------


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


@pytest.fixture(scope="module")
def runs():
    """Every run of the clinic, cut to two steps: at the second one B has left zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ex04, "STEPS", 2)
        return {name: ex04.clinic_run(name) for name in ex04.RUNS}


def test_the_healthy_run_trains_both_factors_of_both_targets(runs):
    healthy = runs["healthy"]
    assert len(healthy["losses"]) == 2
    blocks, rank, width = 4, 8, 128
    assert healthy["trainable"] == healthy["held"] == blocks * 2 * rank * 2 * width
    assert min(healthy["gradient_A"], healthy["gradient_B"]) > 0
    assert healthy["change_B"] == pytest.approx(2 * ex04.RATE, rel=0.1)


def test_every_broken_run_shows_the_sign_of_its_fault(runs, base, tokenizer):
    healthy, a, b, c, d, e = runs.values()
    assert a["gradient_A"] == a["gradient_B"] == a["change_B"] == 0 and a["held"] == healthy["held"]
    assert b["trainable"] == b["held"] == healthy["held"] // 2 and b["change_B"] > 0
    assert c["change_B"] > 100 * healthy["change_B"]
    assert c["gradient_A"] > 10 * healthy["gradient_A"]
    assert d["held"] == sum(p.numel() for p in base.parameters())
    assert d["trainable"] == healthy["trainable"] and d["gradient_B"] > 0 == d["change_B"]
    assert e["losses"][0] > healthy["losses"][0] + 0.4
    assert e["trainable"] == e["held"] == healthy["trainable"]  # the new head is not among them
    assert a["reads"] == d["reads"] == "Батман"  # what the base writes
    assert f"about {math.log(base.classifier.out_features):.1f} nats" in ex04.diagnose.why


def test_a_run_leaves_the_learners_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(ex04, "STEPS", 1)
    state = torch.get_rng_state()
    ex04.clinic_run("E")
    assert torch.equal(torch.get_rng_state(), state)


CAUSES = {"A": "d", "B": "c", "C": "e", "D": "a", "E": "b"}
EMPTY = dict.fromkeys(CAUSES)
VERDICTS = [
    (None, "Not attempted yet. Give each run the letter of a cause"),
    (dict.fromkeys(CAUSES, ""), "Not attempted yet. Give each run"),
    (CAUSES, "Right. The signs that decide. A: the gradients of A and of B are both exactly zero;"),
    ({run: letter.upper() for run, letter in CAUSES.items()}, "Right. "),
    (CAUSES | {"A": "a"}, "Not right yet: 4 of 5 runs are right.\n  A: if the optimizer was "
     "built before the injection, then the optimizer holds the whole base's scalars"),
    (CAUSES | {"B": "z", "C": 3}, "  B: 'z' is not an option; give one of a, b, c, d, e.\n  C: 3"),
    (EMPTY | {"A": "d"}, "  A: right: the gradients of A and of B are both exactly zero\n"
     "  B: not answered"),
    ("dceab", "Not right yet: give a letter for each run"),
    ({1: "a"}, "Not right yet: give a letter for each run"),
]  # fmt: skip


@pytest.mark.parametrize("answer, words", VERDICTS)
def test_a_diagnosis_gets_a_reply_for_every_run(capsys, answer, words):
    ex04.diagnose(answer)
    said = capsys.readouterr().out
    assert words in said and said.startswith("  a) the optimizer was built before the injection\n")


# --- the quizzes ---------------------------------------------------------------------------------

SITTINGS = {"before": quiz.before, "after": quiz.after}
every_sitting = pytest.mark.parametrize("sitting", SITTINGS)


def key(sitting):
    return "".join(question["right"] for question in quiz.questions(sitting))


def wrong(sitting):
    """Ten letters, none of them right."""
    return "".join("b" if letter == "a" else "a" for letter in key(sitting))


def test_the_two_are_parallel():
    before, after = map(quiz.questions, SITTINGS)
    assert len(before) == len(after) == 10
    for one, other in zip(before, after, strict=True):
        assert one["idea"] == other["idea"] and one["question"] != other["question"]
        assert not set(one["options"].values()) & set(other["options"].values())


ASKED = {"quizzes": [question for sitting in SITTINGS for question in quiz.questions(sitting)]}
ASKED["exercises"] = [q for q in read_words("exercises.toml").values() if "options" in q]


@pytest.mark.parametrize("questions", ASKED.values(), ids=ASKED)
def test_every_option_has_a_reason_and_none_gives_itself_away(questions):
    right, most = [question["right"] for question in questions], 0.4 * len(questions)
    for question in questions:
        assert list(question["options"]) == list(question["because"]) == list("abcd")
        assert len(set(question["because"].values())) == 4
    assert max(right.count(letter) for letter in "abcd") <= most
    assert sum(max(q["options"].values(), key=len) == q["options"][q["right"]]
               for q in questions) <= most  # fmt: skip
    cautious = [q["right"] == q["cautious"] for q in questions if "cautious" in q]
    assert sum(cautious) <= len(cautious) / 2


@every_sitting
def test_it_is_scored(sitting, capsys):
    right = key(sitting)
    cases = {right: 10, wrong(sitting): 0, right[:4] + "-" * 6: 4, " ".join(right.upper()): 10}
    for answers, score in cases.items():
        SITTINGS[sitting](answers)
        assert f"{score} of 10 are right" in capsys.readouterr().out
        assert quiz.score(sitting, answers) == score


@every_sitting
@pytest.mark.parametrize("answers", ["-" * 10, "", "abc", "e" * 10, None, 3, ["a"] * 10])
def test_what_is_no_answer_shows_the_questions_alone(sitting, answers, capsys):
    SITTINGS[sitting](answers)
    out = capsys.readouterr().out
    assert "Not attempted yet." in out and "Right is" not in out and "of 10" not in out
    assert all(f"\n{number}. " in "\n" + out for number in range(1, 11))
    assert quiz.score(sitting, answers) == 0


def test_only_the_second_explains_unless_asked(capsys):
    quiz.before(wrong("before"))
    assert "Right is" not in capsys.readouterr().out
    quiz.before(wrong("before"), explain=True)
    out = capsys.readouterr().out
    assert out.count("Not right: ") == out.count("Right is ") == 10
    quiz.after(key("after")[:9] + "-")
    out = capsys.readouterr().out
    assert "Not right: " not in out and out.count("Right is ") == 10


@every_sitting
def test_an_assignment_records_and_does_not_judge(sitting, capsys):
    quiz.record(sitting, key(sitting).upper())
    out = capsys.readouterr().out
    assert out.endswith(f"\nRecorded: {key(sitting)}\n") and "\n10. " in out
    quiz.record(sitting, "abc")
    assert "Recorded" not in (said := capsys.readouterr().out) and "Not attempted yet." in said
