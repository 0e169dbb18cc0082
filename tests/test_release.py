"""One source: learners' cells are those of the solutions, and the assignment is made of them."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbgrader.nbgraderformat import MetadataValidator

from lora_course.exercises import everything, ex07, release
from lora_course.exercises.checker import Choice

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
CALL = re.compile(r"^exercises\.\w+(\[\S+\])?\(|^quiz\.after\(", re.MULTILINE)


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


LEARNERS = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem != "quiz_before"]


# --- the learners' cells -------------------------------------------------------------------------


def test_the_learners_cells_are_those_of_the_solutions():
    wanted = release.student_cells()
    found = {
        cell.id: cell.source
        for path in LEARNERS
        for cell in nbformat.read(path, as_version=4).cells
        if cell.id in wanted
    }
    command = "run python -m lora_course.exercises.release students"
    assert found == wanted, (
        f"differing: {[i for i in wanted if found.get(i) != wanted[i]]}; {command}"
    )


@pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
def test_every_check_in_a_notebook_has_a_solution(path):
    wanted = release.student_cells()
    calls = [cell for cell in code_cells(path) if CALL.search(cell.source)]
    assert calls and not [cell.source for cell in calls if cell.id not in wanted]


def test_every_exercise_is_in_a_notebook():
    sources = "\n".join(cell.source for path in LEARNERS for cell in code_cells(path))
    for exercise in everything():
        name = exercise.name.partition(" ")[2]
        call = f'diagnose["{name[-1]}"]' if name.startswith("run ") else name
        assert f"exercises.{call}(" in sources, exercise.name


def test_the_order_is_that_of_the_solutions():
    wanted = list(release.student_cells())
    for path in LEARNERS:
        ids = [c.id for c in nbformat.read(path, as_version=4).cells if c.id in wanted]
        assert ids == sorted(ids, key=wanted.index)


@pytest.mark.parametrize("path", LEARNERS, ids=lambda path: path.stem)
def test_no_solution_is_left_in_a_learners_notebook(path):
    text = path.read_text("utf-8")
    assert "### " + "BEGIN" not in text and "### " + "END" not in text


def test_a_learner_waits_at_most_fifteen_minutes_for_something_to_do():
    for path in LEARNERS[:6]:
        cells = nbformat.read(path, as_version=4).cells
        weights = [len(c.source.split()) * (1 if c.cell_type == "markdown" else 0.6) for c in cells]
        minutes = int(re.search(r"Reading: about (\d+)", cells[0].source + cells[1].source)[1])
        read, last = 0.0, 0.0
        for cell, weight in zip(cells, weights, strict=True):
            read += weight * minutes / sum(weights)
            if cell.cell_type == "code" and CALL.search(cell.source):
                assert read - last <= 15, path.stem
                last = read
        assert minutes - last <= 15, path.stem


def test_the_five_exercises_say_what_they_are_for():
    texts = [text for text in release.student_cells().values() if text.startswith("### Exercise ")]
    assert [text.split(".")[0] for text in texts] == [f"### Exercise {n}" for n in range(1, 6)]
    for text in texts:
        for part in ("*Purpose:*", "*Difficulty:*", "*Time:*", "minutes"):
            assert part in text, text


def test_a_solution_in_a_function_becomes_a_stub_and_elsewhere_nothing():
    source = """\
### BEGIN SOLUTION
import this

### END SOLUTION
def f(x):
    half = x / 2
    ### BEGIN SOLUTION
    return half
    ### END SOLUTION


answer = None
### BEGIN SOLUTION
answer = 3
### END SOLUTION
check(answer)"""
    assert release.student_source(source) == (
        "def f(x):\n    half = x / 2\n    raise NotImplementedError  # your code\n\n\n"
        "answer = None\ncheck(answer)"
    )


@pytest.mark.parametrize("lines", [[release.BEGIN], [release.END], [release.BEGIN] * 2])
def test_markers_without_a_partner_are_refused(lines):
    with pytest.raises(ValueError, match="without its partner"):
        release.student_source("\n".join(lines))


@pytest.fixture
def copy(tmp_path):
    """The notebooks, to be changed."""
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    return tmp_path / "notebooks"


def test_one_command_writes_what_was_changed_and_nothing_else(copy):
    assert release.write_students(copy) == []
    path, before = copy / "05_merging.ipynb", (copy / "05_merging.ipynb").read_text("utf-8")
    path.write_text(before.replace("def my_merged_weight(", "def my_own_name("), "utf-8")
    assert release.write_students(copy) == ["05_merging.ipynb"]
    assert path.read_text("utf-8") == before


def test_a_cell_that_no_notebook_has_is_refused_before_anything_is_written(copy):
    solutions = copy / "solutions" / "07_solutions.ipynb"
    notebook = nbformat.read(solutions, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("def lora_on", "def lora_here")
        if cell.id == "exercise-5":
            cell.id = "exercise-6"
    nbformat.write(notebook, solutions)
    before = (copy / "07_summary_and_exercises.ipynb").read_bytes()
    with pytest.raises(ValueError, match="exercise-6"):
        release.write_students(copy)
    assert (copy / "07_summary_and_exercises.ipynb").read_bytes() == before


# --- the assignment ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    return release.assignment()


def test_it_is_valid_for_nbgrader(source):
    nbformat.validate(source)
    MetadataValidator().validate_nb(source)
    grade_ids = [cell.metadata.nbgrader.grade_id for cell in source.cells]
    assert len(set(grade_ids)) == len(grade_ids)


def test_everything_in_it_is_graded_by_a_hidden_test(source):
    graded = {c.metadata.nbgrader.grade_id: c for c in source.cells if c.metadata.nbgrader.grade}
    names = {exercise.name[3:] for exercise in everything() if exercise.name.startswith("07")}
    assert graded.keys() == {f"grade-{name}" for name in names} | {"grade-quiz"}
    assert sum(cell.metadata.nbgrader.points for cell in graded.values()) == 40
    for name, cell in graded.items():
        assert "### BEGIN HIDDEN TESTS" in cell.source
        points = 4 if not isinstance(getattr(ex07, name[6:], None), Choice) else 2
        assert cell.metadata.nbgrader.points == (10 if name == "grade-quiz" else points)


def test_it_tells_nothing_of_the_reasoning(source):
    text = nbformat.writes(source)
    assert "**Solution.**" not in text and "claim(" not in text
    assert "ipynb)" not in text, "a link to a notebook that is not handed out with it"
    assert not any(cell.get("outputs") for cell in source.cells)
