"""One source: the learners' cells are those of the solutions, and every check has one."""

import re
from pathlib import Path

import nbformat

from lora_course.exercises import everything, release

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
CELLS = [
    cell for path in sorted(NOTEBOOKS.glob("*.ipynb")) for cell in nbformat.read(path, 4).cells
]
CALL = re.compile(r"^exercises\.\w+\(|^quiz\.after\(", re.MULTILINE)


def test_the_learners_cells_are_those_of_the_solutions_in_their_order():
    wanted = release.student_cells()
    found = [(cell.id, cell.source) for cell in CELLS if cell.id in wanted]
    assert found == [*wanted.items()], "run python -m lora_course.exercises.release students"


def test_every_exercise_is_asked_in_a_cell_that_has_a_solution():
    asked = [cell for cell in CELLS if CALL.search(cell.source)]
    assert asked and {cell.id for cell in asked} <= release.student_cells().keys()
    sources = "\n".join(cell.source for cell in asked)
    for exercise in everything():
        assert f"exercises.{exercise.name.partition(' ')[2]}(" in sources, exercise.name
