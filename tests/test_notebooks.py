"""The notebooks as committed, and the exercises on them. nbval runs them."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from minutes import minutes

from lora_course.exercises import everything, release

ROOT = Path(__file__).parent.parent
SEVEN = sorted((ROOT / "notebooks").glob("0*.ipynb"))
OTHERS = [ROOT / "notebooks" / f"{name}.ipynb" for name in ("quiz_before", "transfer")]
FOLDERS = [ROOT / "notebooks" / name for name in ("solutions", "going_deeper")]
DEEPER = sorted(FOLDERS[1].glob("*.ipynb"))
ALL = SEVEN + OTHERS + [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]

EXERCISE = {"exercise", "student"}

by_name = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def markdown(path) -> list[str]:
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@by_name
def test_a_notebook_was_executed_once_from_top_to_bottom_and_is_small(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 1_000_000
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@by_name
def test_outputs_hold_nothing_that_should_not_be_committed(path):
    for cell in code_cells(path):
        assert "execution" not in cell.metadata  # timestamps
        imports = all(
            isinstance(x, ast.Import | ast.ImportFrom) for x in ast.parse(cell.source).body
        )
        limit = 32 if EXERCISE & set(cell.metadata.get("tags", ())) else 25
        assert imports or len(cell.source.splitlines()) <= limit, cell.source
        names = [output.get("name") for output in cell.outputs]
        assert ("stdout", "stdout") not in pairwise(names), cell.source
        for output in cell.outputs:
            assert output.output_type != "error", output
            assert output.get("name") != "stderr", output
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
    text = path.read_text("utf-8")
    assert not re.search(r"/(root|home|work|tmp|Users)/\w", text), "a path of one machine"
    assert " at 0x" not in text, "an object that has no readable form"
    assert "Warning" not in text
    assert "Does not hold" not in text


@pytest.mark.parametrize("path", SEVEN, ids=lambda path: path.stem)
def test_a_notebook_has_one_cell_for_its_seed_and_what_a_learner_needs(path):
    cells = code_cells(path)
    assert [c.source for c in cells if "parameters" in c.metadata.get("tags", ())] == ["seed = 42"]
    code, text = "\n".join(c.source for c in cells), "\n".join(markdown(path))
    assert "seed" in code.replace("seed = 42", "") and "manual_seed(42)" not in code
    for needed in ("After this notebook you can", "docs/symbols.md", "## Key points", "Your turn"):
        assert needed in text or path == SEVEN[-1], needed
    assert path == SEVEN[0] or "<details>" in text  # questions on the notebook before
    assert code.count("NBVAL_CHECK_OUTPUT") >= 3


TIME = re.compile(r"^About (\d+) minutes to read, (?:(\d+) for the exercises, )?\d+ seconds", re.M)


@pytest.mark.parametrize("path", SEVEN + DEEPER, ids=lambda path: path.stem)
def test_a_page_keeps_its_budget_and_says_its_true_minutes(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if "exercise" not in c.metadata.get("tags", ())]
    code = "\n".join(c.source for c in cells if c.cell_type == "code")
    said, exercises = TIME.search(notebook.cells[0].source).groups()
    assert int(said) == round(minutes(notebook)) <= (40 if path == SEVEN[-1] else 32)
    assert len(re.findall(r"^\s*claim\(", code, re.M)) <= 10 and "fmt: skip" not in code
    text = "\n".join(markdown(path))
    headings = re.findall(r"^#+ .*\((\d+) minutes\)$", text, re.M)
    assert sum(map(int, headings)) == int(exercises or 0)


def test_the_seven_take_less_than_215_minutes():
    assert sum(minutes(nbformat.read(path, as_version=4)) for path in SEVEN) <= 215


@by_name
def test_a_reader_without_the_picture_can_follow(path):
    text = re.sub(r"^```.*?^```", "", "\n".join(markdown(path)), flags=re.M | re.S)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    for source in markdown(path):
        if "$$" in source:  # a displayed formula has words beside it
            words = re.sub(r"\$\$[^$]*\$\$|^[#|].*", "", source, flags=re.MULTILINE)
            assert len(words.split()) >= 15, source
    for cell in code_cells(path):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                alt = output.metadata["image/png"]["alt"]
                assert len(alt) >= 100 and alt.strip().endswith("."), alt


@by_name
def test_no_line_within_a_paragraph_is_taken_for_a_list(path):
    for source in markdown(path):
        for before, line in pairwise(source.splitlines()):
            inside = before.strip() and not re.match(r"[-+*#] |\d+\. |\s", before)
            assert not (inside and re.match(r"[-+*] |1\. ", line)), line


# --- exercises -----------------------------------------------------------------------------------

PAGES = SEVEN + OTHERS


def test_the_learners_cells_are_those_of_the_solutions_in_their_order():
    wanted = release.student_cells()
    cells = [c for path in PAGES for c in nbformat.read(path, as_version=4).cells]
    found = [(cell.id, cell.source) for cell in cells if cell.id in wanted]
    assert found == [*wanted.items()], "run python -m lora_course.exercises.release students"


def test_every_exercise_is_asked_in_a_cell_that_has_a_solution():
    call = re.compile(r"^exercises\.\w+\(|^quiz\.after\(", re.MULTILINE)
    asked = [c for path in PAGES for c in code_cells(path) if call.search(c.source)]
    assert asked and {cell.id for cell in asked} <= release.student_cells().keys()
    sources = "\n".join(cell.source for cell in asked)
    for exercise in everything():
        assert f"exercises.{exercise.name.partition(' ')[2]}(" in sources, exercise.name


@pytest.mark.parametrize("path", [p for p in ALL if "transfer" in p.stem], ids=lambda p: p.stem)
def test_the_transfer_task_is_solved_without_the_library(path):
    code = "\n".join(cell.source for cell in code_cells(path))
    imported = set(re.findall(r"lora_(?:course|lib)[\w.]*", code))
    assert imported <= {"lora_course.exercises", "lora_course.claims", "lora_course.tables"}
