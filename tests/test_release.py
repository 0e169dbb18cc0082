"""One source: the learners' cells are those of the solutions, and every check has one."""

import re
from pathlib import Path

import nbformat
import pytest

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


SOLUTION = f"""\
def f(x):
    half = x / 2
    {release.BEGIN}
    return half
    {release.END}
answer = None
{release.BEGIN}
answer = 3
{release.END}
check(answer)"""


def test_a_solution_in_a_function_becomes_a_stub_and_elsewhere_nothing():
    stub = f"def f(x):\n    half = x / 2\n    {release.STUB}\nanswer = None\ncheck(answer)"
    assert release.student_source(SOLUTION) == stub


@pytest.mark.parametrize("marker", [release.BEGIN, release.END])
def test_a_marker_without_its_partner_is_refused(marker):
    with pytest.raises(ValueError, match="without its partner"):
        release.student_source(SOLUTION.replace(marker, "", 1))
