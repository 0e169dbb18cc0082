"""The two quizzes: parallel, scored, and never raising."""

import pytest

from lora_course.exercises import progress, quiz

QUIZZES = [quiz.before, quiz.after]
both = pytest.mark.parametrize("sitting", QUIZZES, ids=lambda sitting: sitting.name)


def key(sitting):
    return "".join(question.right for question in sitting.questions)


def wrong(sitting):
    """Ten letters, none of them right."""
    return "".join(next(x for x in q.options if x != q.right) for q in sitting.questions)


def test_the_two_are_parallel():
    assert len(quiz.IDEAS) == len(quiz.before.questions) == len(quiz.after.questions) == 10
    for one, other in zip(quiz.before.questions, quiz.after.questions, strict=True):
        assert one.question != other.question
        assert not set(one.options.values()) & set(other.options.values())


@both
def test_every_question_has_four_options_and_a_misconception_for_each_wrong_one(sitting):
    for question in sitting.questions:
        assert list(question.options) == list("abcd")
        assert question.misconceptions.keys() == question.options.keys() - {question.right}
        assert len(set(question.misconceptions.values())) == 3


@both
def test_neither_letters_nor_lengths_give_the_answers_away(sitting):
    letters = key(sitting)
    assert max(letters.count(letter) for letter in "abcd") <= 3
    longest = [max(q.options, key=lambda x, q=q: len(q.options[x])) for q in sitting.questions]
    assert sum(x == q.right for x, q in zip(longest, sitting.questions, strict=True)) <= 4


@both
def test_it_is_scored(sitting, capsys):
    for answers, score in [
        (key(sitting), 10),
        (wrong(sitting), 0),
        (key(sitting)[:4] + "-" * 6, 4),
        (" ".join(key(sitting).upper()), 10),
    ]:
        sitting(answers)
        assert f"{score} of 10 are right" in capsys.readouterr().out
        assert sitting.score(answers) == score


@both
@pytest.mark.parametrize("answers", ["", "abc", "e" * 10, "a" * 11, None, 3, ["a"] * 10])
def test_what_is_not_ten_letters_is_told_so(sitting, answers, capsys):
    sitting(answers)
    out = capsys.readouterr().out
    assert "Write ten letters from a to d" in out and "of 10" not in out
    assert sitting.score(answers) == 0


@both
def test_untouched_it_is_not_attempted_and_shows_the_questions(sitting, capsys):
    sitting("-" * 10)
    out = capsys.readouterr().out
    assert "Not attempted yet." in out
    for number in range(1, 11):
        assert f"\n{number}. " in "\n" + out


def test_only_the_second_explains_unless_asked(capsys):
    quiz.before(wrong(quiz.before))
    assert "Not right" not in capsys.readouterr().out
    quiz.before(wrong(quiz.before), explain=True)
    assert capsys.readouterr().out.count("Not right: ") == 10
    quiz.after(wrong(quiz.after))
    assert capsys.readouterr().out.count("Not right: ") == 10
    quiz.after(key(quiz.after))
    assert capsys.readouterr().out.count("Right. ") == 10


def test_both_sittings_are_shown_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_LIB_PROGRESS", str(tmp_path / "progress.json"))
    tables = []
    monkeypatch.setattr(quiz, "show_table", lambda columns, rows: tables.append((columns, rows)))
    quiz.before("-" * 9 + key(quiz.before)[9])
    quiz.after(key(quiz.after)[0] + wrong(quiz.after)[1:])
    assert tables[0][0] == ["idea", "notebook", "before"]
    columns, rows = tables[1]
    assert columns == ["idea", "notebook", "before", "after"]
    assert rows[0][2:] == ["—", "right"] and rows[9][2:] == ["right", "not right"]
    assert progress.quiz_answers("before") == "-" * 9 + key(quiz.before)[9]
