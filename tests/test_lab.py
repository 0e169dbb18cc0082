"""A learner's visit: `make lab`, what `make check` says is missing, and the beginning of notebook
01 run from the menu, in a browser.

It is made in a copy of the course, where notebook 01 has no outputs, so that every figure on the
page was drawn there. It goes as far as the first figure and the first exercise. That the rest of
the notebook runs, nbval says.
"""

import ast
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from jupyter_server.serverapp import list_running_servers

from lora_course.exercises.release import BEGIN, END, STUB
from lora_course.my_copy import copy_missing, give_back

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "check.py"
NOTEBOOK = "01_rank_intuition"
LIMIT = 120_000  # milliseconds for what takes 15 seconds: CI may be slow


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


CELLS = read(NOTEBOOK).cells
FIGURE_CELLS = [
    n
    for n, cell in enumerate(CELLS)
    if any("image/png" in output.get("data", ()) for output in cell.get("outputs", ()))
]
EXERCISE_CELL = next(n for n, cell in enumerate(CELLS) if STUB in cell.source)
CUT = max(FIGURE_CELLS[0], EXERCISE_CELL) + 1  # the copy ends before this cell


# --- `make check`, which `make lab` asks before it sets anything up ------------------------------


def check(capsys) -> tuple[object, str]:
    """What check.py, run in this process, exits with, and what it prints."""
    status = None
    try:
        runpy.run_path(str(CHECK), run_name="__main__")
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().out


def test_where_nothing_is_missing(capsys):
    status, said = check(capsys)
    assert status is None
    assert re.findall(r"^ok +(\w+)", said, re.M) == ["python", "disk", "packages", "base", "cache"]


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda p: p.setattr(sys, "version_info", (3, 8, 18)), "python: 3.8.18, and 3.11 or newer"),
        (lambda p: p.setattr(metadata, "version", lambda _: "1"), "torch is 1 instead of"),
        (lambda p: p.setitem(sys.modules, "lora_lib", None), "base: "),
        (lambda p: p.setenv("LORA_LIB_CACHE", f"{os.devnull}/x"), "cache: "),
    ],
)
def test_what_is_wrong_is_what_it_exits_with(capsys, monkeypatch, spoil, says):
    with monkeypatch.context() as patch:
        spoil(patch)
        status, _ = check(capsys)
    assert re.match(f"problem  .*{says}", status)


def test_an_old_python_can_read_the_file():
    ast.parse(CHECK.read_text("utf-8"), feature_version=(3, 8))


def test_make_lab_stops_where_the_check_finds_a_problem(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "check.py").write_text("import sys; sys.exit('problem')")
    ran = subprocess.run(["make", "lab"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode and "problem" in ran.stderr and not (tmp_path / ".venv").exists()


# --- `make lab` ----------------------------------------------------------------------------------


@contextmanager
def make_lab(course: Path, settings: Path) -> Iterator[dict[str, str]]:
    """The url and the token of a server that answers; it keeps all of its own in `settings`."""
    places = ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_SETTINGS",
              "JUPYTERLAB_WORKSPACES")  # fmt: skip
    own = {f"{name}_DIR": str(settings / name) for name in places}
    silent = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    # In the environment of this test, as it stands.
    command = ["make", "lab", "-o", ".venv/installed", "LAB_ARGS=--no-browser"]
    process = subprocess.Popen(
        command, cwd=course, env=os.environ | own, start_new_session=True, **silent
    )
    try:
        deadline = time.monotonic() + 60
        while not (servers := list(list_running_servers(settings / "JUPYTER_RUNTIME"))):
            assert time.monotonic() < deadline, "no JupyterLab within a minute"
            time.sleep(0.2)
        yield servers[0]
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # the server ends its kernels, and make waits for it
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(the server, when `make lab` was started), with a cache that is still empty."""
    course, settings = tmp_path_factory.mktemp("course"), tmp_path_factory.mktemp("jupyter")
    for name in ("lora_lib", "lora_course", "notebooks", "requirements"):
        shutil.copytree(ROOT / name, course / name, ignore=shutil.ignore_patterns(".*", "__py*"))
    for name in ("Makefile", "check.py", "pyproject.toml", "requirements.txt"):
        shutil.copy2(ROOT / name, course)
    (course / ".venv").symlink_to(sys.prefix)
    notebook = read(NOTEBOOK)
    notebook.cells = notebook.cells[:CUT]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    (course / "my").mkdir()
    nbformat.write(notebook, course / "my" / f"{NOTEBOOK}.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LORA_LIB_STRICT", raising=False)  # as a learner has it
        patch.setenv("LORA_LIB_CACHE", str(settings / "cache"))
        start = time.monotonic()
        with make_lab(course, settings) as server:
            yield server, start


def test_make_lab_copies_the_notebooks_and_trusts_them(lab):
    address = "{url}api/contents/my/02_lora_from_scratch.ipynb?token={token}".format_map(lab[0])
    with urllib.request.urlopen(address, timeout=10) as page:
        cells = [c for c in json.load(page)["content"]["cells"] if c["cell_type"] == "code"]
    assert all(cell["metadata"]["trusted"] for cell in cells)  # or figures lose their alt text


def test_a_learners_notebook_is_left_alone_and_kept_when_it_is_given_back(tmp_path):
    for name in ("03_lora_transformer", "07_summary_and_exercises", "solutions/07_solutions"):
        target = tmp_path / "notebooks" / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", target)
    assert len(copy_missing(tmp_path)) == 3
    mine = tmp_path / "my" / "07_summary_and_exercises.ipynb"
    fresh = mine.read_bytes()
    mine.write_text("my answers")
    assert copy_missing(tmp_path) == [] and mine.read_text() == "my answers"
    target, kept = give_back("07", tmp_path)
    assert target == mine and mine.read_bytes() == fresh and kept.read_text() == "my answers"
    for wrong in ("0", "9"):
        with pytest.raises(ValueError, match="the name of one notebook"):
            give_back(wrong, tmp_path)


# --- in a browser --------------------------------------------------------------------------------


ALL_RUN = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
  .every(prompt => /^\\[\\d+\\]:$/.test(prompt.textContent.trim()))"""
# The index of the cell of each figure that can be seen.
FIGURES = """() => [...document.querySelectorAll('.jp-Notebook-cell')].flatMap((cell, index) =>
  [...cell.querySelectorAll('.jp-OutputArea-output img')]
    .filter(image => image.complete && image.naturalWidth > 100 && image.clientWidth > 100)
    .map(() => index))"""


def wait_for(page, script: str) -> None:
    """Until it is true, or a cell has failed: then the later ones never run."""
    failed = "document.querySelector('.jp-Notebook').textContent.includes('Traceback (most')"
    page.wait_for_function(f"({script})() || {failed}", timeout=LIMIT)


@pytest.fixture(scope="module")
def page(browser, lab):
    """Notebook 01 in the browser, all its cells run: what a learner sees."""
    server, started = lab
    page, errors = browser.new_page(viewport={"width": 1400, "height": 900}), []
    page.set_default_timeout(60_000)
    page.on("console", lambda m: m.type == "error" and errors.append(f"{m.text} {m.location}"))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto("{url}?token={token}".format_map(server))  # `make lab` itself leads to notebook 01
    page.wait_for_function(f"document.querySelectorAll('.jp-Notebook-cell').length == {CUT}")
    idle = '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
    page.wait_for_selector(idle, timeout=LIMIT)
    page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
    page.locator(".lm-Menu").get_by_text("Run All Cells", exact=True).click()
    wait_for(page, f"() => ({FIGURES})().length")
    assert time.monotonic() - started < 90, "no figure 90 seconds after `make lab`"
    wait_for(page, ALL_RUN)
    page.wait_for_selector(idle, timeout=LIMIT)
    assert errors == []
    yield page
    page.close()


def test_every_cell_runs_without_a_word_on_stderr_and_every_figure_is_seen(page):
    assert page.url.endswith(f"/lab/tree/my/{NOTEBOOK}.ipynb")
    stderr = page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')
    assert stderr.all_text_contents() == []
    assert page.evaluate(FIGURES) == [n for n in FIGURE_CELLS if n < CUT]


def test_a_figure_has_its_caption_below_and_its_alt_text_beside_it(page):
    """JupyterLab gives an image of a notebook no alt text, and cleans what is shown."""
    from playwright.sync_api import expect

    for n in (n for n in FIGURE_CELLS if n < CUT):
        [alt] = [output.metadata["image/png"]["alt"] for output in CELLS[n].outputs
                 if "image/png" in output.get("data", ())]  # fmt: skip
        caption = page.locator(".jp-Notebook-cell").nth(n).locator("[role=img][aria-label]")
        caption.scroll_into_view_if_needed()
        expect(caption).to_have_text(re.compile(r"\w+( \S+){4}"), use_inner_text=True)
        assert caption.get_attribute("aria-label") == alt


def test_an_exercise_turns_from_not_attempted_to_right(page):
    solutions = {c.id: c.source for c in read("solutions/01_to_06_solutions").cells}
    lines = solutions[CELLS[EXERCISE_CELL].id].split("\n")
    inside = [line.strip() for line in lines]
    cell = page.locator(".jp-Notebook-cell").nth(EXERCISE_CELL)
    assert cell.locator(".jp-OutputArea").text_content().startswith("Not attempted yet.")
    cell.locator(".cm-line", has_text=STUB).click()
    keyboard = page.keyboard
    keyboard.press("Home")  # behind the indent
    keyboard.press("Shift+End")
    keyboard.insert_text("\n".join(lines[inside.index(BEGIN) + 1 : inside.index(END)]).lstrip())
    keyboard.press("Shift+Enter")
    output = cell.locator(".jp-OutputArea", has_text=re.compile("^(?!Not attempted yet)."))
    output.wait_for()
    assert output.text_content().startswith("Right.")
