"""A class is graded with nbgrader: the release version, three submissions, their marks."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from lora_course.exercises import release

ROOT = Path(__file__).parent.parent
NAME = release.ASSIGNMENT
DONE_BY_HALF = ("lora_on", "rank_for_budget", "swap", "conclude_targets", "conclude_budget")


def nbgrader(course, *arguments):
    """As an instructor with the environment activated: nbgrader looks for alembic on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(course)}
    environment.pop("LORA_LIB_STRICT", None)
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course in which three learners have handed in: all right, nothing, and half."""
    course = tmp_path_factory.mktemp("course")
    shutil.copy(ROOT / "grading" / "nbgrader_config.py", course)
    release.write_assignment(course)
    nbgrader(course, "generate_assignment", NAME)
    perfect, empty = (
        nbformat.read(course / folder / NAME / f"{NAME}.ipynb", as_version=4)
        for folder in ("source", "release")
    )
    half = nbformat.from_dict(empty)
    solved = {cell.metadata.nbgrader.grade_id: cell.source for cell in perfect.cells}
    for cell in half.cells:
        if cell.metadata.nbgrader.grade_id in DONE_BY_HALF:
            cell.source = solved[cell.metadata.nbgrader.grade_id]
        cell.source = cell.source.replace('"----------"', '"dbac------"')
    for learner, notebook in {"perfect": perfect, "empty": empty, "half": half}.items():
        folder = course / "submitted" / learner / NAME
        folder.mkdir(parents=True)
        nbformat.write(notebook, folder / f"{NAME}.ipynb")
    nbgrader(course, "autograde", NAME)
    nbgrader(course, "export")
    return course


def test_the_release_holds_no_solution_and_no_hidden_test(course):
    released = nbformat.read(course / "release" / NAME / f"{NAME}.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in released.cells)
    for secret in ("SOLUTION", "HIDDEN", ".grade(", ".score(", "freeze_non_lora_params(model)"):
        assert secret not in text.partition("## Exercise 1")[2], secret
    assert text.count(release.STUB) == 5
    assert text.count("conclusion = None") == 5


def test_the_learners_cells_are_those_of_the_notebook(course):
    released = nbformat.read(course / "release" / NAME / f"{NAME}.ipynb", as_version=4)
    learners = release.student_cells()
    for cell in released.cells:
        if cell.id in learners:
            assert cell.source == learners[cell.id]


def test_the_marks_are_full_none_and_half(course):
    with (course / "grades.csv").open(encoding="utf-8") as file:
        marks = {row["student_id"]: row for row in csv.DictReader(file)}
    assert {name: float(row["score"]) for name, row in marks.items()} == {
        "perfect": 40,
        "empty": 0,
        "half": 20,
    }
    assert {float(row["max_score"]) for row in marks.values()} == {40}


def test_a_wrong_or_missing_answer_is_told_why(course):
    graded = nbformat.read(course / "autograded" / "half" / NAME / f"{NAME}.ipynb", as_version=4)
    said = {
        cell.metadata.nbgrader.grade_id: output.evalue
        for cell in graded.cells
        for output in cell.get("outputs", ())
        if output.output_type == "error"
    }
    missing = ("change_ranks", "quantise", "conclude_swap", "conclude_ranks", "conclude_quantise")
    assert said == {f"grade-{name}": "not attempted" for name in missing}
