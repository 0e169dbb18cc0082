"""The class of 60 minutes: its cells need no others, and its slides need no network."""

import re
import subprocess
import sys
from pathlib import Path

import make_slides
import pytest

SEVEN = sorted((make_slides.ROOT / "notebooks").glob("0*.ipynb"))


def test_no_name_is_used_that_the_cells_of_the_class_do_not_define():
    """Those that are only run ("skip") among them."""
    for path in SEVEN:
        cells = make_slides.nbformat.read(path, as_version=4).cells
        taught = [c for c in cells if "core" in c.metadata.get("tags", ())]
        code = "\n".join(c.source for c in taught if c.cell_type == "code")
        ruff = [sys.executable, "-m", "ruff", "check", "-q", "--isolated", "--select=F821", "-"]
        found = subprocess.run(ruff, input=code, capture_output=True, text=True)
        assert found.returncode == 0, f"{path.name}: {found.stdout}"


@pytest.fixture
def page(browser, tmp_path):
    context = browser.new_context(viewport={"width": 1280, "height": 720}, offline=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.goto(Path(make_slides.write(tmp_path)).as_uri())
    page.wait_for_function("Reveal.isReady() && document.querySelector('mjx-container')")
    yield page
    context.close()
    assert wrong == []


def test_every_slide_is_one_screen_and_its_code_can_be_read_from_the_last_row(page):
    assert page.evaluate("Reveal.getTotalSlides()") <= 28
    for number in range(1, page.evaluate("Reveal.getTotalSlides()") + 1):
        slide = page.locator("section.present:not(.stack)").first
        assert slide.inner_text().strip(), number
        assert slide.evaluate("s => s.scrollHeight <= s.clientHeight + 1"), f"{number} scrolls"
        for code in slide.locator(".jp-InputArea pre").all():
            assert len(code.inner_text().strip().splitlines()) <= 12, f"{number}: much code"
            assert code.evaluate("c => parseFloat(getComputedStyle(c).fontSize)") >= 22
        page.keyboard.press("Space")
    assert page.evaluate("Reveal.isLastSlide()")
    pictures = page.evaluate("[...document.images].map(i => i.naturalWidth > 0 && i.alt)")
    assert len(pictures) > 3 and all(pictures) and "No description" not in str(pictures)
    assert page.locator("aside.notes").count() > 15
    assert page.evaluate("document.fonts.check('22px Letters', 'ბრემენი')")
    assert page.evaluate("[...document.fonts].some(f => f.family == 'Letters')")


def test_a_star_marks_the_sections_of_the_class_and_no_others():
    """So that it is seen in JupyterLab, too: tags are not."""
    for path in SEVEN:
        heading, marked, taught = "", set(), set()
        for cell in make_slides.nbformat.read(path, as_version=4).cells:
            found = re.findall(r"^## (.+)$", cell.source, re.MULTILINE)
            if cell.cell_type == "markdown" and found:
                heading = found[-1]
                marked |= {heading} if heading.startswith("★") else set()
            if heading and "core" in cell.metadata.get("tags", ()):
                taught.add(heading)
        assert marked == taught, path.name
