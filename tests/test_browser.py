"""A learner's visit: `make lab`, notebooks 01 and 05 run from the menu, in a real browser.

The server's root is a copy of notebooks/ without its outputs, so that every figure on the page was
drawn there, and saving touches nothing. Screenshots stay in pytest's temporary folder.
"""

import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pytest
from jupyter_lab import ROOT, TOKEN, make_lab

from lora_course.exercises.release import BEGIN, END, STUB

FIRST, SECOND = "01_rank_intuition", "05_merging"
LIMIT = 180_000  # milliseconds for a notebook that takes 30 seconds: CI may be slow


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


@dataclass
class Visit:
    """A notebook open in the browser, all its cells run."""

    name: str
    page: object
    notebook: nbformat.NotebookNode  # as committed
    errors: list[str] = field(default_factory=list)  # of the page's console
    bars: list[str] = field(default_factory=list)  # each state of a progress bar that was shown
    first_figure: float = 0.0  # when, on time.monotonic()'s clock

    def cell(self, index: int):
        return self.page.locator(".jp-Notebook-cell").nth(index)

    def outputs(self, kind: str):
        return self.page.locator(f'[data-mime-type="application/vnd.jupyter.{kind}"]')


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """notebooks/ without outputs, in a folder of its own."""
    root = tmp_path_factory.mktemp("course")
    hidden = shutil.ignore_patterns(".*", "__pycache__")
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=hidden)
    for path in root.rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        nbformat.write(notebook, path)
    return root


@pytest.fixture(scope="module")
def lab(course, tmp_path_factory):
    """(address, when `make lab` was started), with a cache that is still empty."""
    settings = tmp_path_factory.mktemp("jupyter")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORA_LIB_STRICT", raising=False)  # as a learner has it
        patch.setenv("LORA_LIB_CACHE", str(settings / "cache"))
        start = time.monotonic()
        own = [f"--LabApp.{name}_dir={settings / name}" for name in ("workspaces", "user_settings")]
        with make_lab(settings, f"--ServerApp.root_dir={course}", *own) as address:
            yield address, start


WATCH_BARS = """() => {
  window.bars = []
  const note = () => {
    for (const bar of document.querySelectorAll('[data-mime-type$="jupyter.stderr"]'))
      if (bar.textContent.trim()) window.bars.push(bar.textContent.trim())
  }
  new MutationObserver(note).observe(document.body, {childList: true, subtree: true,
                                                     characterData: true})
}"""

ALL_RUN = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
  .every(prompt => /^\\[\\d+\\]:$/.test(prompt.textContent.trim()))"""

# The index of the cell of each figure that can be seen.
FIGURES = """() => [...document.querySelectorAll('.jp-Notebook-cell')].flatMap((cell, index) =>
  [...cell.querySelectorAll('.jp-OutputArea-output img')]
    .filter(image => image.complete && image.naturalWidth > 100 && image.clientWidth > 100)
    .map(() => index))"""


def wait_for(page, script: str) -> None:
    """Until it is true, or a cell has failed: then the later ones never run."""
    failed = "document.querySelector('[data-mime-type$=\"jupyter.error\"]')"
    page.wait_for_function(f"({script})() || {failed}", timeout=LIMIT)


def wait_until_idle(page) -> None:
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=LIMIT)


def take_picture(page, path: Path) -> None:
    """Of the whole notebook; JupyterLab only guesses the height of what is out of sight."""
    page.add_style_tag(content=".jp-Notebook-cell { content-visibility: visible !important }")
    cells = page.locator(".jp-Notebook-cell")
    tops = [cells.nth(n).evaluate("e => e.getBoundingClientRect().y") for n in (0, -1)]
    page.set_viewport_size({"width": 1400, "height": int(tops[1] - tops[0]) + 600})
    page.locator(".jp-WindowedPanel-outer").evaluate("e => e.scrollTo(0, 0)")
    page.screenshot(path=path)


@pytest.fixture(scope="module", params=[FIRST, SECOND])
def visit(request, browser, lab, tmp_path_factory):
    address, _ = lab
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(60_000)
    it = Visit(request.param, page, read(request.param))
    page.on("console", lambda m: m.type == "error" and it.errors.append(f"{m.text} {m.location}"))
    page.on("pageerror", lambda error: it.errors.append(str(error)))
    tree = "" if it.name == FIRST else f"lab/tree/notebooks/{it.name}.ipynb"
    # `make lab` itself leads to notebook 01; `reset` closes what was open before.
    page.goto(f"{address}/{tree}?token={TOKEN}" + ("&reset" if tree else ""))
    cells = len(it.notebook.cells)
    page.wait_for_function(f"document.querySelectorAll('.jp-Notebook-cell').length == {cells}")
    wait_until_idle(page)

    page.evaluate(WATCH_BARS)
    page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
    page.locator(".lm-Menu").get_by_text("Run All Cells", exact=True).click()
    wait_for(page, f"() => ({FIGURES})().length")
    it.first_figure = time.monotonic()
    wait_for(page, ALL_RUN)
    wait_until_idle(page)
    it.bars = page.evaluate("window.bars")
    yield it

    take_picture(page, tmp_path_factory.mktemp("screenshots") / f"{it.name}.png")
    page.close()


only_the_first = pytest.mark.parametrize("visit", [FIRST], indirect=True, scope="module")


@only_the_first
def test_make_lab_leads_to_a_figure_of_notebook_01_within_90_seconds(visit, lab):
    _, start = lab
    assert visit.page.url.endswith("/lab/tree/notebooks/01_rank_intuition.ipynb")
    assert visit.cell(0).locator("h1").text_content().startswith("1. Rank intuition")
    assert visit.first_figure - start < 90


def test_every_cell_has_run_without_an_error(visit):
    errors = visit.outputs("error").all_text_contents()
    assert errors == []
    prompts = visit.page.locator(".jp-CodeCell .jp-InputPrompt").all_text_contents()
    assert prompts == [f"[{n + 1}]:" for n in range(len(prompts))]


def test_the_figures_are_drawn(visit):
    committed = [
        index
        for index, cell in enumerate(visit.notebook.cells)
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
        or "<img" in output.get("data", {}).get("text/html", "")
    ]
    assert len(committed) >= 2
    assert visit.page.evaluate(FIGURES) == committed


@only_the_first  # it trains a model
def test_progress_bars_move_and_finish(visit):
    shares = [int(share) for bar in visit.bars for share in re.findall(r"(\d+)%", bar)]
    assert len(set(shares)) >= 3
    assert max(shares) > 90
    left = [text.strip() for text in visit.outputs("stderr").all_text_contents()]
    assert [text for text in left if text and "100%" not in text] == []


# What stands beside the sliders, less its numbers: the names that the model writes.
NAMES = """cell => {
  const output = cell.querySelector('.jp-OutputArea').cloneNode(true)
  output.querySelectorAll('.widget-slider').forEach(slider => slider.remove())
  return output.textContent.replace(/[0-9.,%]+/g, '')
}"""


def test_a_slider_changes_what_is_written(visit):
    cells = visit.page.locator(".jp-CodeCell", has=visit.page.locator(".widget-slider"))
    assert cells.count() >= 1
    for cell in cells.all():
        slider = cell.get_by_role("slider")
        slider.scroll_into_view_if_needed()
        written = [cell.evaluate(NAMES)]
        for key in ("End", "Home"):
            slider.press(key)
            visit.page.wait_for_function(
                f"([cell, before]) => ({NAMES})(cell) != before",
                arg=[cell.element_handle(), written[-1]],
            )
            written.append(cell.evaluate(NAMES))
        assert len(set(written)) == 3


def exercise(visit) -> tuple[int, list[str]]:
    """The first function to write: the index of its cell, and the lines that solve it."""
    solutions = {c.id: c.source for c in read("solutions/01_to_06_solutions").cells}
    for index, cell in enumerate(visit.notebook.cells):
        if cell.id in solutions and STUB in cell.source:
            lines = solutions[cell.id].split("\n")
            inside = [line.strip() for line in lines]
            return index, lines[inside.index(BEGIN) + 1 : inside.index(END)]
    raise AssertionError(f"no exercise of {visit.name} has a solution")


def test_an_exercise_turns_from_not_attempted_to_right(visit):
    index, lines = exercise(visit)
    cell = visit.cell(index)
    assert cell.locator(".jp-OutputArea").text_content().startswith("Not attempted yet.")
    cell.locator(".cm-line", has_text=STUB).click()
    keyboard = visit.page.keyboard
    keyboard.press("Home")  # behind the indent
    keyboard.press("Shift+End")
    keyboard.insert_text("\n".join(lines).lstrip())
    keyboard.press("Shift+Enter")
    output = cell.locator(".jp-OutputArea", has_text=re.compile("^(?!Not attempted yet)."))
    output.wait_for()
    assert output.text_content().startswith("Right.")


def test_nothing_went_wrong_on_the_page(visit):
    assert visit.errors == []
