"""The notebooks as committed, and that any cell can be run twice, with every figure as it should
be. nbval runs them as they are."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SEVEN = sorted((ROOT / "notebooks").glob("0*.ipynb"))
OTHERS = [ROOT / "notebooks" / f"{name}.ipynb" for name in ("quiz_before", "transfer")]
FOLDERS = [ROOT / "notebooks" / name for name in ("solutions", "going_deeper")]
ALL = SEVEN + OTHERS + [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]

by_name = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def test_there_are_seven_notebooks_in_order():
    assert [path.stem for path in SEVEN] == [
        "01_rank_intuition",
        "02_lora_from_scratch",
        "03_lora_transformer",
        "04_training",
        "05_merging",
        "06_hyperparameters",
        "07_summary_and_exercises",
    ]


@by_name
def test_a_notebook_is_valid_and_small(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 1_000_000


@by_name
def test_neighbouring_text_is_one_output(path):
    for cell in code_cells(path):
        names = [output.get("name") for output in cell.outputs]
        assert ("stdout", "stdout") not in pairwise(names), cell.source


@by_name
def test_a_notebook_was_executed_once_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1))


@by_name
def test_outputs_hold_nothing_that_should_not_be_committed(path):
    for cell in code_cells(path):
        assert "execution" not in cell.metadata  # timestamps
        assert len(cell.source.splitlines()) <= 25, cell.source
        for output in cell.outputs:
            assert output.output_type != "error", output
            assert output.get("name") != "stderr", output
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            if "image/png" in output.get("data", {}):
                assert output.metadata["image/png"]["alt"], "a figure without alt text"
    text = path.read_text("utf-8")
    assert not re.search(r"/(root|home|work|tmp|Users)/\w", text), "a path of one machine"
    assert " at 0x" not in text, "an object that has no readable form"
    assert "Warning" not in text
    assert "Does not hold" not in text


@by_name
def test_headings_go_down_one_step_at_a_time(path):
    text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))


@by_name
def test_displayed_maths_has_words_beside_it(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and "$$" in cell.source:
            words = re.sub(r"\$\$[^$]*\$\$|^[#|].*", "", cell.source, flags=re.MULTILINE)
            assert len(words.split()) >= 15, cell.source


def alt_texts(path):
    """The alt text of every figure that a notebook's code shows, its computed parts as {}."""
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and re.search(
                r"^(figures\.)?show$", ast.unparse(node.func)
            ):
                alt = node.args[2] if len(node.args) == 3 else node.keywords[0].value
                parts = alt.values if isinstance(alt, ast.JoinedStr) else [alt]
                yield "".join(getattr(part, "value", "{}") if isinstance(part, ast.Constant)
                              else "{}" for part in parts)  # fmt: skip


@by_name
def test_every_figure_has_alt_text_that_says_what_it_shows(path):
    for alt in alt_texts(path):
        assert len(alt) >= 100, f"say what is to be seen, not only what is drawn: {alt}"
        assert alt.strip().endswith("."), alt


def test_figures_are_found_in_the_notebooks():
    assert sum(len(list(alt_texts(path))) for path in ALL) > 20


@pytest.mark.parametrize("path", SEVEN, ids=lambda path: path.stem)
def test_a_notebook_has_what_a_learner_needs(path):
    source = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells)
    for needed in ("After this notebook you can", "Reading: about", "## Key points"):
        assert needed in source, needed
    assert ("# Exercises" if path == SEVEN[-1] else "Your turn") in source
    if path != SEVEN[0]:
        assert "<details>" in source  # questions on the notebook before
    assert "claim(" in source


@by_name
def test_links_between_notebooks_resolve(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", cell.source):
                assert (path.parent / target).exists(), target


# Training is cut to three steps: the question here is whether a cell may be run again. And every
# figure is held to the rules before it is shown.
SHORT = (
    f"""
import sys

sys.path += {[str(ROOT / "tests"), str(ROOT / "docs")]}
import figure_rules
import lora_course.figures

def checked(show):  # a closure: a notebook may have a name "show" of its own
    def show_checked(fig, name, alt):
        complaints = figure_rules.complaints(fig)
        assert complaints == [], (name, complaints)
        show(fig, name, alt)
    return show_checked

lora_course.figures.show = checked(lora_course.figures.show)
"""
    + """
import functools
import lora_lib.training as training

def shorten(function, position, limit):
    @functools.wraps(function)
    def short(*arguments, **named):
        arguments = list(arguments)
        if len(arguments) > position:
            arguments[position] = min(arguments[position], limit)
        for name in ("steps", "epochs", "limit"):
            if named.get(name):
                named[name] = min(named[name], limit)
        return function(*arguments, **named)
    return short

import lora_lib
for name, position, limit in (("fit", 2, 3), ("adapt", 9, 3), ("train_model", 3, 1),
                              ("evaluate", 4, 10)):
    short = shorten(getattr(training, name), position, limit)
    setattr(training, name, short)
    if hasattr(lora_lib, name):
        setattr(lora_lib, name, short)
"""
)


@by_name
def test_every_cell_can_be_run_twice(path, monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)  # claims cannot hold after three steps
    notebook = nbformat.read(path, as_version=4)
    twice = [nbformat.v4.new_code_cell(SHORT)]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            twice += [nbformat.v4.new_code_cell(cell.source) for _ in range(2)]
    notebook.cells = twice
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
