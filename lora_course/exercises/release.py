"""One source for solutions and exercises: the notebooks in notebooks/solutions.

A cell tagged `student` there is also a cell, with the same id, of a learner's notebook, less the
lines between `### BEGIN SOLUTION` and `### END SOLUTION`. Cells with nbgrader's metadata make up
the assignment for a class (see grading/README.md).

    python -m lora_course.exercises.release students              write the learners' cells
    python -m lora_course.exercises.release assignment grading    write grading/source
"""

import re
import sys
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
ASSIGNMENT = "exercises"  # its name in nbgrader, and that of its notebook
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = "raise NotImplementedError  # your code"

INTRODUCTION = """\
# LoRA from scratch: exercises

The five exercises and the quiz of notebook 07. Each function is checked in its own cell; `hint()`
helps. What to measure before you answer which conclusion a result supports stands in notebook 07:
measure there, and hand in here. Conclusions and the quiz are recorded when you run their cells,
and judged when your work is graded. Forty points: 4 for a function, 2 for a conclusion, 1 for a
question of the quiz."""
RECORDING = {  # what judges at once → what the assignment has in its place
    r"^(exercises\.conclude_\w+)\(": r"\1.record(",
    r"^quiz\.after\(": 'quiz.record("after", ',
    r"memory, compare your scores, and read why each answer is right\.": "memory.",
}


def student_source(source: str) -> str:
    """A cell as a learner gets it: in a function a solution becomes a stub; outside, nothing.

    Raises ValueError if a marker has no partner.
    """
    solution = re.compile(rf"^( *){BEGIN}\n(?:(?! *{BEGIN}).*\n)*? *{END}\n?", re.MULTILINE)
    text = solution.sub(lambda found: found[1] and f"{found[1]}{STUB}\n", source)
    if BEGIN in text or END in text:
        raise ValueError(f"{BEGIN!r} or {END!r} without its partner in this cell:\n{source}")
    return text.strip("\n")


def student_cells(folder: Path = NOTEBOOKS) -> dict[str, str]:
    """Id → source of every learner's cell, in the order of the solutions."""
    notebooks = [nbformat.read(path, 4) for path in sorted((folder / "solutions").glob("*.ipynb"))]
    cells = [cell for notebook in notebooks for cell in notebook.cells]
    return {
        c.id: student_source(c.source) for c in cells if "student" in c.metadata.get("tags", ())
    }


def write_students(folder: Path = NOTEBOOKS) -> None:
    """Put the learners' cells into the learners' notebooks.

    Raises ValueError, before anything is written, if a cell is in none of them.
    """
    notebooks = {path: nbformat.read(path, 4) for path in sorted(folder.glob("*.ipynb"))}
    cells, missing = student_cells(folder), set(student_cells(folder))
    changed = set()
    for path, notebook in notebooks.items():
        for cell in notebook.cells:
            missing.discard(cell.id)
            if cells.get(cell.id, cell.source) != cell.source:
                cell.source = cells[cell.id]
                changed.add(path)
    if missing:
        raise ValueError(f"no notebook has the cells {sorted(missing)}; add empty ones so called")
    for path in changed:
        nbformat.write(notebooks[path], path)


def assigned_source(source: str) -> str:
    """A cell as the assignment has it: conclusions and quiz get no verdict before the grade."""
    for judges, records in RECORDING.items():
        source = re.sub(judges, records, source, flags=re.MULTILINE)
    return source


def write_assignment(course: Path) -> None:
    """The instructor's version, solutions and all: nbgrader's cells of the solutions of 07."""
    solutions = nbformat.read(NOTEBOOKS / "solutions" / "07_solutions.ipynb", 4)
    introduction = nbformat.v4.new_markdown_cell(INTRODUCTION, id="introduction")
    locked = {"grade": False, "solution": False, "locked": True, "task": False}
    introduction.metadata["nbgrader"] = locked | {"grade_id": "introduction", "schema_version": 3}
    solutions.cells = [introduction] + [c for c in solutions.cells if "nbgrader" in c.metadata]
    for cell in solutions.cells:
        cell.source = assigned_source(cell.source)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    path = course / "source" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(solutions, path)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["students"]:
            write_students()
        case ["assignment", folder]:
            write_assignment(Path(folder))
        case _:
            sys.exit(__doc__)
