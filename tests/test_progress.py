"""The learner's own record: what it holds, how to switch it off, and that it never breaks."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from lora_course.exercises import ex01, progress, quiz
from lora_lib.rank import k90

ROOT = Path(__file__).parent.parent


def one_too_many(values):
    return k90(values) + 1


def strange(values):
    return 1 / 0


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    """The file of a learner, fresh."""
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)
    monkeypatch.setenv("LORA_LIB_PROGRESS", str(tmp_path / "progress.json"))
    return tmp_path / "progress.json"


def entries(path):
    return json.loads(path.read_text("utf-8"))["exercises"]


def test_attempts_and_what_was_put_right_are_recorded(path):
    for answer in (None, one_too_many, one_too_many, strange, k90):
        ex01.k90(answer)
    entry = entries(path)["01 k90"]
    assert entry["done"] and entry["attempts"] == 4
    assert [message.split(":")[0] for message in entry["mistakes"]] == [
        "one too many",
        "your code raised ZeroDivisionError",
    ]


def test_a_stub_is_no_attempt(path):
    ex01.k90(None)
    ex01.half_of_the_directions(None)
    assert not path.exists()


def test_after_a_right_answer_nothing_changes(path):
    ex01.k90(k90)
    before = path.read_text("utf-8")
    ex01.k90(one_too_many)
    ex01.k90(k90)
    assert path.read_text("utf-8") == before


def test_numbers_do_not_make_a_new_mistake(path):
    for wrong in (1, 2, 3):
        ex01.k90(lambda values, wrong=wrong: wrong)
    entry = entries(path)["01 k90"]
    assert entry["attempts"] == 3 and len(entry["mistakes"]) == 1 and not entry["done"]


def test_one_call_switches_it_off_for_good_and_another_on(path):
    ex01.k90(one_too_many)
    progress.off()
    ex01.k90(k90)
    quiz.before("a" * 10)
    assert entries(path)["01 k90"]["attempts"] == 1
    progress.off()
    progress.on()
    ex01.k90(k90)
    assert entries(path)["01 k90"]["done"]
    assert progress.quiz_answers("before") is None


def test_the_environment_switches_it_off(path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_LIB_PROGRESS", "off")
    ex01.k90(one_too_many)
    progress.off()
    progress.show()
    assert "not recorded here" in capsys.readouterr().out
    assert progress.file() is None and not list(path.parent.iterdir())


def test_a_class_that_is_graded_is_not_recorded(path, monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    ex01.k90(one_too_many)
    assert not path.exists()


FOREIGN = ["", "{", "[]", "3", '{"exercises": 3}', '{"exercises": {}, "quizzes": {}}',
           '{"recording": true, "exercises": {"01 k90": 1}, "quizzes": {}}',
           '{"recording": true, "exercises": {"01 k90": {"done": 1}}, "quizzes": {}}',
           "my thesis"]  # fmt: skip


@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_that_is_something_else_is_left_alone(path, text, capsys):
    path.write_text(text, "utf-8")
    ex01.k90(one_too_many)
    quiz.after("a" * 10)
    progress.show()
    progress.off()
    assert path.read_text("utf-8") == text
    assert "holds something else" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "no/such/folder/file", "\0"])
def test_a_place_that_cannot_be_written_to_breaks_nothing(path, monkeypatch, name, capsys):
    target = path.parent if name == "" else path.parent / name
    monkeypatch.setattr(progress, "file", lambda: target)
    ex01.k90(one_too_many)
    ex01.k90(k90)
    quiz.before("a" * 10)
    progress.show()
    progress.off()
    assert "Right." in capsys.readouterr().out
    assert not list(path.parent.iterdir())


def test_a_disk_that_refuses_breaks_nothing_and_leaves_the_old_file(path, monkeypatch, capsys):
    ex01.k90(one_too_many)
    before = path.read_text("utf-8")

    def refuse(*arguments):
        raise PermissionError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    ex01.k90(k90)
    assert "Right." in capsys.readouterr().out
    assert path.read_text("utf-8") == before
    assert list(path.parent.iterdir()) == [path]


def test_one_call_shows_it(path, capsys, monkeypatch):
    tables = []
    monkeypatch.setattr(progress, "show_table", lambda columns, rows: tables.append(rows))
    progress.show()
    assert capsys.readouterr().out.startswith("0 of ") and not tables
    ex01.k90(one_too_many)
    ex01.k90(k90)
    ex01.half_of_the_directions("a")
    quiz.before("b" * 10)
    capsys.readouterr()
    progress.show()
    out = capsys.readouterr().out
    assert out.startswith("1 of ") and f"Quiz before: {quiz.before.score('b' * 10)} of 10." in out
    assert tables[-1][0][:3] == ["01 k90", 2, "right"] and "one too many" in tables[-1][0][3]
    assert tables[-1][1][:3] == ["01 half_of_the_directions", 1, "not right yet"]


def test_by_default_it_lies_in_the_course_where_git_ignores_it(monkeypatch):
    monkeypatch.delenv("LORA_LIB_PROGRESS")
    assert progress.file() == ROOT / "progress.json"
    assert "progress.json" in (ROOT / ".gitignore").read_text("utf-8").splitlines()
    if (ROOT / ".git").exists():
        command = ["git", "check-ignore", "-q", "progress.json"]
        assert subprocess.run(command, cwd=ROOT).returncode == 0
