"""The class of 90 minutes: its cells run by themselves, and its slides work without network."""

import re
from html import unescape
from pathlib import Path

import make_slides as slides
import nbformat
import pytest
from nbclient import NotebookClient
from test_notebooks import SEVEN, SHORT

ROOT = Path(__file__).parent.parent

GUIDE = (ROOT / "docs" / "instructor_guide.md").read_text("utf-8")
PLAN = slides.read_plan(GUIDE)
NOTEBOOKS = slides.read_notebooks()


def of_the_class(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if "core90" in cell.metadata.get("tags", ())]


TAUGHT = [path for path in SEVEN if of_the_class(path)]


# --- the cells -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TAUGHT, ids=lambda path: path.stem)
def test_the_cells_of_the_class_run_by_themselves(path, monkeypatch):
    """Training is cut to three steps, enough to see whether a cell lacks another one."""
    monkeypatch.setenv("LORA_LIB_STRICT", "1")
    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in of_the_class(path) if cell.cell_type == "code"]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in (SHORT, *sources)]
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()


@pytest.mark.parametrize("path", SEVEN, ids=lambda path: path.stem)
def test_slides_are_divided_by_slide_types_that_jupyterlab_knows(path):
    for cell in nbformat.read(path, as_version=4).cells:
        taken = "core90" in cell.metadata.get("tags", ())
        allowed = ("slide", "subslide", "-", "skip") if taken else (None,)
        assert cell.metadata.get("slideshow", {}).get("slide_type") in allowed, cell.source


# --- making them ---------------------------------------------------------------------------------


def test_the_plan_and_the_notebooks_name_the_same_sections_in_the_same_order():
    planned = [(step.notebook, step.heading) for part in PLAN for step in part.steps]
    tagged = [(number, heading) for number, found in NOTEBOOKS.items() for heading in found]
    assert planned == tagged


def test_a_section_that_no_notebook_has_is_refused():
    guide = GUIDE.replace("#### The ledger (", "#### The leger (")
    with pytest.raises(ValueError, match="'The leger' of notebook 01"):
        slides.page(guide, NOTEBOOKS)


def test_a_tagged_section_that_the_guide_leaves_out_is_refused():
    guide = re.sub(r"#### The ledger \(.*?(?=###)", "", GUIDE, flags=re.DOTALL)
    with pytest.raises(ValueError, match=r"not in the guide.*'The ledger'"):
        slides.page(guide, NOTEBOOKS)


def test_text_and_code_of_every_cell_are_on_the_slides():
    """But for the code of figures, which is about drawing."""
    page = "".join(html for stack in slides.stacks(PLAN, NOTEBOOKS) for html in stack)
    text = unescape(re.sub(r"<[^>]+>", "", page))
    for cells in (cells for found in NOTEBOOKS.values() for cells in found.values()):
        for cell in cells:
            if cell.cell_type == "markdown":
                assert cell.source.split()[0].strip("*`") in text
            else:
                code = re.sub(r"  # fmt: skip$", "", cell.source, flags=re.MULTILINE)
                assert (code in text) != slides.draws(cell), cell.source
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                assert data.get("image/png", "").strip() in page
                assert data.get("text/html", "") in page
                assert all(line in text for line in output.get("text", "").splitlines())


# --- in the browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(browser, tmp_path_factory):
    """The slides in a browser without network, what it complained of, and what it asked for."""
    file = tmp_path_factory.mktemp("slides") / "slides.html"
    file.write_text(slides.page(GUIDE, NOTEBOOKS), "utf-8")
    assert file.stat().st_size < 15e6
    context = browser.new_context(viewport={"width": 1280, "height": 720}, offline=True)
    page, complaints, requests = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("Reveal.isReady()")
    yield page, complaints, [url for url in requests if not url.startswith("data:")]
    context.close()


# One slide as a reader has it. A block that is cut off must scroll; what scrolls counts as shown.
LOOK = """() => {
  const slide = Reveal.getCurrentSlide(), title = slide.querySelector("h2");
  const stage = document.querySelector(".reveal").getBoundingClientRect();
  const scrolls = (box) => ["auto", "scroll"].includes(getComputedStyle(box).overflowY);
  const outside = [...slide.querySelectorAll("h2, .body, .fit > *, .fit pre, .fit td, .fit img")]
    .filter((box) => {
      const place = box.getBoundingClientRect(), body = box.closest(".body");
      const below = place.bottom > stage.bottom + 1 && (!body || body === box || !scrolls(body));
      return below || place.right > stage.right + 1 || place.left < stage.left - 1;
    });
  return {
    title: title.innerText,
    text: slide.querySelector(".body").innerText.trim(),
    pictures: [...slide.querySelectorAll("img")].map((i) => i.naturalWidth && i.alt),
    notes: slide.querySelector("aside.notes").textContent.trim(),
    outside: outside.map((box) => box.outerHTML.slice(0, 80)),
    scrolls: [...slide.querySelectorAll(".body")].some((b) => b.scrollHeight > b.clientHeight + 1),
    sizes: [...slide.querySelectorAll(".fit p, .fit pre, .fit td")].map((box) =>
      parseFloat(getComputedStyle(box).fontSize) * box.currentCSSZoom),
  };
}"""


@pytest.fixture(scope="module")
def seen(shown):
    """Every slide, reached with the space bar."""
    page, found = shown[0], []
    for _ in range(page.evaluate("Reveal.getTotalSlides()")):
        found.append(page.evaluate(LOOK))
        page.keyboard.press("Space")
    assert page.evaluate("Reveal.isLastSlide()")
    return found


def test_nothing_is_fetched_and_nothing_complains(shown, seen):
    _, complaints, requests = shown
    assert complaints == []
    assert len(requests) == 1, requests


def test_every_part_and_section_of_the_plan_is_there_in_order(seen):
    titles = [slide["title"] for slide in seen]
    once = [title for n, title in enumerate(titles) if n == 0 or titles[n - 1] != title]
    wanted = ["LoRA from scratch"]
    for number, part in enumerate(PLAN, start=1):
        wanted += [f"{number}. {part.title}", *(step.heading for step in part.steps)]
    assert once == wanted


def test_every_slide_shows_something_that_fits_it_and_can_be_read(seen):
    for slide in seen:
        assert slide["text"] or slide["pictures"], slide["title"]
        assert all(slide["pictures"]), f"{slide['title']}: a picture that does not show, or no alt"
        assert slide["outside"] == [], slide["title"]
        assert min(slide["sizes"], default=99) >= 14, slide["title"]
    assert sum(slide["scrolls"] for slide in seen) <= 3, "only long source is to be scrolled"


def test_every_slide_of_a_section_has_its_notes(seen):
    steps = {step.heading: step for part in PLAN for step in part.steps}
    for slide in seen:
        if slide["title"] in steps:
            notes = re.sub(r"\]\(.*?\)", "]", steps[slide["title"]].notes)
            words = re.sub(r"\W+", " ", notes).split()
            assert words, slide["title"]
            shown = re.sub(r"\W+", " ", slide["notes"]).split()
            assert set(words) <= set(shown), slide["title"]


def test_formulas_are_drawn(shown, seen):
    page = shown[0]
    formulas = page.evaluate("""() => [...document.querySelectorAll(".fit math")].map((m) => [
      m.namespaceURI, m.querySelectorAll("mi").length, m.textContent])""")
    assert len(formulas) >= 2
    for namespace, letters, text in formulas:
        assert namespace.endswith("MathML") and letters > 3 and "\\" not in text
    assert not [slide["title"] for slide in seen if "$" in slide["text"]]


def test_a_second_window_shows_the_notes(shown):
    page = shown[0]
    page.evaluate("Reveal.slide(3, 0)")
    with page.context.expect_page() as opened:
        page.keyboard.press("s")
    window = opened.value
    window.wait_for_selector(".speaker-controls-notes:not(.hidden) .value *", timeout=20_000)
    step = PLAN[0].steps[1]
    assert f"{step.minutes} min, notebook 01" in window.inner_text(".speaker-controls-notes")
    window.close()
