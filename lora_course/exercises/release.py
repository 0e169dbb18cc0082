"""One source for solutions and exercises: the notebooks in notebooks/solutions.

A cell tagged `student` there is also a cell, with the same id, of a learner's notebook, less the
lines between `### BEGIN SOLUTION` and `### END SOLUTION`. Cells with nbgrader's metadata make up
the assignment for a class (see grading/README.md).

    python -m lora_course.exercises.release students              write the learners' cells
    python -m lora_course.exercises.release assignment grading    write grading/source
"""

import argparse
from pathlib import Path

import nbformat
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
STUB = "raise NotImplementedError  # your code"
ASSIGNMENT = "exercises"  # its name in nbgrader, and that of its notebook

INTRODUCTION = """\
# LoRA from scratch: exercises

The five exercises and the quiz of notebook 07. Each function is checked in its own cell; `hint()`
helps. What to measure before you answer which conclusion a result supports stands in notebook 07:
work there, and hand in here. Forty points: 4 for a function, 2 for a conclusion, 1 for a question
of the quiz."""


def student_source(source: str) -> str:
    """A cell as a learner gets it: in a function a solution becomes a stub; outside, nothing.

    Raises ValueError if the markers do not come in pairs.
    """
    lines, inside = [], False
    for line in source.split("\n"):
        marker = line.strip()
        if marker in (BEGIN, END):
            if inside == (marker == BEGIN):
                raise ValueError(f"{marker!r} without its partner in this cell:\n{source}")
            inside = not inside
            indent = line[: len(line) - len(line.lstrip())]
            if inside and indent:
                lines.append(indent + STUB)
        elif not inside:
            lines.append(line)
    if inside:
        raise ValueError(f"{BEGIN!r} without its partner in this cell:\n{source}")
    return "\n".join(lines).strip("\n")


def student_cells(folder: Path = NOTEBOOKS) -> dict[str, str]:
    """Id → source of every learner's cell, in the order of the solutions."""
    cells = [
        cell
        for path in sorted((folder / "solutions").glob("*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells
        if "student" in cell.metadata.get("tags", ())
    ]
    return {cell.id: student_source(cell.source) for cell in cells}


def write_students(folder: Path = NOTEBOOKS) -> list[str]:
    """Put the learners' cells into the learners' notebooks; returns the names of those changed.

    Raises ValueError, before anything is written, if a cell is in none of them.
    """
    wanted, missing = student_cells(folder), set(student_cells(folder))
    changed = {}
    for path in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            missing.discard(cell.id)
            if wanted.get(cell.id, cell.source) != cell.source:
                cell.source = wanted[cell.id]
                changed[path] = notebook
    if missing:
        raise ValueError(
            f"no notebook has the cells {sorted(missing)}; add empty ones with these ids"
        )
    for path, notebook in changed.items():
        nbformat.write(notebook, path)
    return [path.name for path in changed]


def assignment(folder: Path = NOTEBOOKS) -> NotebookNode:
    """The instructor's version of the assignment: nbgrader's cells, solutions and all."""
    solutions = nbformat.read(folder / "solutions" / "07_solutions.ipynb", as_version=4)
    introduction = nbformat.v4.new_markdown_cell(INTRODUCTION, id="introduction")
    introduction.metadata["nbgrader"] = nbgrader_cell("introduction")
    cells = [introduction]
    for cell in solutions.cells:
        if "nbgrader" in cell.metadata:
            cell.metadata.pop("tags", None)
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            cells.append(cell)
    return nbformat.v4.new_notebook(cells=cells, metadata=solutions.metadata)


def nbgrader_cell(grade_id: str, points: int | None = None, solution: bool = False) -> dict:
    """nbgrader's metadata: a solution cell, a graded one (with points), or one to be read only."""
    metadata = {"schema_version": 3, "grade_id": grade_id, "solution": solution, "task": False}
    metadata |= {"grade": points is not None, "locked": not solution}
    return metadata if points is None else metadata | {"points": points}


def write_assignment(course: Path, folder: Path = NOTEBOOKS) -> Path:
    path = course / "source" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(assignment(folder), path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("students")
    commands.add_parser("assignment").add_argument("course", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "students":
        print("changed:", *write_students() or ["nothing"])
    else:
        write_assignment(arguments.course)


if __name__ == "__main__":
    main()
