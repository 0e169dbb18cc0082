"""A class is graded with nbgrader: what is handed out, two submissions, their marks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook

from lora_course.exercises import release

ROOT = Path(__file__).parent.parent
NAME = release.ASSIGNMENT
MISTAKES = {  # instead of what the learner was given
    "lora_on": "def lora_on(names, rank):\n    return load_pretrained()[0]",
    "conclude_targets": 'conclusion_1 = "c"',  # which would be right in the next exercise
    "conclude_budget": "",
    "quiz": 'from lora_course.exercises import quiz\n\nanswers = "dbac------"',
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a course in which two learners have handed in: all of it right, and none of it."""
    course = tmp_path_factory.mktemp("course")
    shutil.copy(ROOT / "grading" / "nbgrader_config.py", course)
    release.write_assignment(course)
    nbgrader(course, "generate_assignment", NAME)
    wrong = read(course / "release")
    for cell in wrong.cells:
        cell.source = MISTAKES.get(cell.metadata.nbgrader.grade_id, cell.source)
    for learner, notebook in {"right": read(course / "source"), "wrong": wrong}.items():
        path = course / "submitted" / learner / NAME / f"{NAME}.ipynb"
        path.parent.mkdir(parents=True)
        nbformat.write(notebook, path)
    nbgrader(course, "autograde", NAME)
    return course


def nbgrader(course, *arguments):
    """As an instructor with the environment activated: nbgrader looks for alembic on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(course)}
    env["LORA_LIB_STRICT"] = "0"
    subprocess.run([sys.executable, "-m", "nbgrader", *arguments], cwd=course, env=env, check=True)


def read(folder):
    return nbformat.read(folder / NAME / f"{NAME}.ipynb", 4)


def test_what_is_handed_out_holds_no_solution_and_no_hidden_test(folder):
    cells, learners = read(folder / "release").cells, release.student_cells()
    text = "\n".join(cell.source for cell in cells)
    for secret in ("SOLUTION", "HIDDEN", ".grade(", "score(", "claim(", "ipynb)", "model, _ ="):
        assert secret not in text, secret
    assert text.count(release.STUB) == 5 and not any(cell.get("outputs") for cell in cells)
    for cell in cells:
        assert cell.source == release.assigned_source(learners.get(cell.id, cell.source))


def test_conclusions_and_quiz_give_no_verdict_before_the_grade(folder):
    """All answers are right, and the cells say what they keep; functions say more."""
    said = {
        cell.metadata.nbgrader.grade_id: cell.outputs[0].text
        for cell in read(folder / "autograded" / "right").cells
        if cell.metadata.nbgrader.grade_id.startswith(("conclude_", "quiz")) and cell.get("outputs")
    }
    assert len(said) == 6
    for text in said.values():
        assert re.search(r"\nRecorded: ([a-d]|[a-d]{10})\n$", text)
        assert not re.search(r"^(Right|Not right|You chose)|of 10 are right", text, re.MULTILINE)


def test_marks_and_what_the_feedback_says(folder):
    with Gradebook(f"sqlite:///{folder / 'gradebook.db'}") as gradebook:
        marks = {
            s.student.id: (s.score, s.max_score) for s in gradebook.assignment_submissions(NAME)
        }
    assert marks == {"right": (40, 40), "wrong": (4, 40)}
    errors = {
        cell.metadata.nbgrader.grade_id.removeprefix("grade-"): output
        for cell in read(folder / "autograded" / "wrong").cells
        for output in cell.get("outputs", ())
        if output.output_type == "error" and cell.metadata.nbgrader.grade
    }
    said = {name: error.evalue for name, error in errors.items()}
    assert "expected 'a model and a number', and 'a model' came" in said.pop("lora_on")
    assert "one run that learns is enough" in said.pop("conclude_targets")
    assert said.pop("conclude_budget") == "name 'conclusion_2' is not defined"
    assert all(errors[name].traceback == [text] for name, text in said.items())  # and no more
    assert len(said) == 7 and all(text.startswith("not attempted") for text in said.values())
