"""The two quizzes: parallel, scored, explained, and never raising."""

import pytest

from lora_course.exercises import quiz
from lora_course.exercises.checker import read_words

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
