"""The class of 90 minutes: its cells need no others, and its slides need no network."""

import subprocess
import sys
from pathlib import Path

import make_slides
import pytest

CLASS = make_slides.class_notebook()


def test_no_name_is_used_that_the_cells_of_the_class_do_not_define():
    """Those that are only run ("skip") among them."""
    for path in sorted((make_slides.ROOT / "notebooks").glob("0*.ipynb")):
        cells = make_slides.nbformat.read(path, as_version=4).cells
        taught = [c for c in cells if "core90" in c.metadata.get("tags", ())]
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


def test_every_slide_shows_something_and_every_picture_has_its_alt_text(page):
    for _ in range(page.evaluate("Reveal.getTotalSlides()")):
        assert page.evaluate("Reveal.getCurrentSlide().innerText.trim()")
        page.keyboard.press("Space")
    assert page.evaluate("Reveal.isLastSlide()")
    pictures = page.evaluate("[...document.images].map(i => i.naturalWidth > 0 && i.alt)")
    assert len(pictures) > 3 and all(pictures) and "No description" not in str(pictures)
    assert page.locator("aside.notes").count() > 20
