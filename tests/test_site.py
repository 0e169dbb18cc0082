"""The course as a web site: built once, without network; read as files, then in a browser."""

import functools
import json
import os
import re
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(
    path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts
)
SEVEN = [f"notebooks/{path.stem}" for path in NOTEBOOKS if path.stem[:2].isdigit()]
SECONDS = 60  # of CPU time, to build the site; it takes 13
SIZES = {"phone": (390, 844), "desktop": (1280, 800)}

OFFLINE = """
import socket, sys
def refuse(*arguments):
    raise OSError("the site is built without network")
socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the site, built from the working tree; a warning is an error."""
    needed = ("sphinx", "myst_nb", "furo", "sphinx-mathjax-offline")
    missing = [name for name in needed if not find_spec(name)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (pip install -e '.[site]')")
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-c", "docs", "-d", str(folder / "doctrees")]
    before = os.times()
    built = subprocess.run(
        [sys.executable, "-c", OFFLINE, *options, ".", str(folder / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    after = os.times()
    assert built.returncode == 0, built.stderr
    took = sum(after[2:4]) - sum(before[2:4])  # of a processor, so that a busy machine may wait
    assert took < SECONDS, f"building the site took {took:.0f} s"
    return folder / "html"


@pytest.fixture(scope="session")
def pages(site):
    """Path from the site's folder, without .html → the parsed page."""
    return {
        path.relative_to(site).with_suffix("").as_posix(): BeautifulSoup(
            path.read_text("utf-8"), "html.parser"
        )
        for path in sorted(site.rglob("*.html"))
        if "_static" not in path.parts
    }


# --- as files ------------------------------------------------------------------------------------


def test_every_notebook_and_document_has_a_page_that_the_contents_lead_to(site, pages):
    documents = [*NOTEBOOKS, *(ROOT / "docs").glob("*.md"), ROOT / "grading" / "README.md"]
    linked = [
        unquote(link["href"]).removesuffix(".html")
        for link in pages["README"].select(".sidebar-tree a[href]")
    ]
    wanted = [path.relative_to(ROOT).with_suffix("").as_posix() for path in documents]
    assert [name for name in wanted if name not in linked] == []
    order = ["notebooks/quiz_before", *SEVEN[:7], "notebooks/transfer"]
    assert linked[: len(order)] == order
    [redirect] = pages["index"].select("meta[http-equiv=refresh]")
    assert redirect["content"].endswith("url=README.html")


def test_links_and_images_within_the_site_resolve(site, pages):
    anchors = {name: {tag["id"] for tag in page.select("[id]")} for name, page in pages.items()}
    broken, seen = [], 0
    for name, page in pages.items():
        for tag in page.select("[href], [src]"):
            target = tag.get("href") or tag.get("src")
            address = urlsplit(urljoin(f"http://site/{name}.html", target or f"{name}.html"))
            if address.netloc != "site":
                continue
            seen += 1
            path = site / unquote(address.path).lstrip("/")
            page_name = path.relative_to(site).with_suffix("").as_posix()
            there = path.is_file() and (
                not address.fragment
                or path.suffix != ".html"
                or unquote(address.fragment) in anchors[page_name]
            )
            if not there:
                broken.append((name, target))
    assert broken == []
    assert seen > 1000


def test_no_page_loads_anything_from_elsewhere(site, pages):
    loads = "script[src], link[rel=stylesheet], link[rel~=icon], link[rel=preload], img, iframe"
    elsewhere = [
        (name, source)
        for name, page in pages.items()
        for tag in page.select(f"{loads}, source, video, audio, object[data]")
        for source in [tag.get("src") or tag.get("href") or tag.get("data") or ""]
        if re.match(r"(https?:)?//", source)
    ]
    styles = [(path, path.read_text("utf-8")) for path in site.rglob("*.css")]
    styles += [(name, tag.text) for name, page in pages.items() for tag in page("style")]
    assert len(styles) > 3
    elsewhere += [
        (name, found)
        for name, style in styles
        for found in re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)'\"]+", style)
    ]
    assert elsewhere == []


def test_figures_have_the_alt_text_of_the_notebooks(pages):
    for path in NOTEBOOKS:
        outputs = [
            output
            for cell in nbformat.read(path, as_version=4).cells
            for output in cell.get("outputs", ())
            if "image/png" in output.get("data", ())
        ]
        page = pages[path.relative_to(ROOT).with_suffix("").as_posix()]
        shown = [image["alt"] for image in page.select(".cell_output img")]
        assert shown == [output.metadata["image/png"]["alt"] for output in outputs]
    for name, page in pages.items():
        assert [image for image in page("img") if not image.get("alt", "").strip()] == [], name
    written = re.findall(r"!\[([^]]+)\]", (ROOT / "README.md").read_text("utf-8"))
    shown = [image["alt"] for image in pages["README"].select("article img")]
    assert shown == [" ".join(alt.split()) for alt in written]  # a line break is a space


def test_headings_are_in_order(pages):
    for name, page in pages.items():
        levels = [int(tag.name[1]) for tag in page.select("article :is(h1,h2,h3,h4,h5,h6)")]
        if name not in ("index", "search"):
            assert levels[0] == 1 and levels.count(1) == 1, (name, levels)
        assert all(b - a <= 1 for a, b in pairwise(levels)), (name, levels)


def test_answers_stay_folded_and_formulas_are_formulas(pages):
    for path in NOTEBOOKS:
        source = "".join(
            cell.source
            for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "markdown"
        )
        article = pages[path.relative_to(ROOT).with_suffix("").as_posix()].article
        folded = article("details")
        assert len(folded) == source.count("<details>")
        assert all(len(tag.text) > len(tag.summary.text) + 10 for tag in folded)
        assert len(article.select("div.math")) == source.count("$$") / 2
        for tag in article.select("pre, code, .math"):
            tag.extract()
        assert "$" not in article.text


def test_the_search_index_knows_the_words_of_the_notebooks(site):
    text = (site / "searchindex.js").read_text("utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    training = index["docnames"].index("notebooks/04_training")
    for word in ("clinic", "стокхолм"):  # of the text, of a table that a cell drew
        found = [index[where].get(word, []) for where in ("terms", "titleterms")]
        assert any(training in (p if isinstance(p, list) else [p]) for p in found), word


# --- in a browser --------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def served(site):
    """The site's address on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def visit(browser, served):
    """visit(size): an empty page of that size. Whatever it shows afterwards, nothing may have been
    asked of another machine, and nothing may have gone wrong."""
    contexts, asked, wrong = [], [], []

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # the reader went on before all was there
            wrong.append(request.url)

    def new_page(size):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height},
            has_touch=size == "phone",
            base_url=served,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", failed)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        return page

    yield new_page
    for context in contexts:
        context.close()
    elsewhere = [url for url in asked if not url.startswith((served, "data:", "blob:"))]
    assert (elsewhere, wrong) == ([], [])
    assert asked


SCROLLS = """
() => [document.scrollingElement, document.querySelector(".content")]
    .some(box => box && box.scrollWidth > box.clientWidth + 1)
"""
MISSING = "() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
MATH_WAITS = """
() => [...document.querySelectorAll(".math")].every(m => m.querySelector("mjx-container"))
"""
MATH_ERRORS = "() => document.querySelectorAll('mjx-merror').length"


@pytest.mark.parametrize("size", SIZES)
def test_pages_fit_and_show_their_images_and_formulas(visit, pages, size):
    page = visit(size)
    for name in pages:
        if name.startswith("lora_lib/") and name != "lora_lib/lora":
            continue  # the pages of the library are alike
        page.goto(f"{name}.html")
        if name == "index":
            page.wait_for_url("**/README.html")
        page.wait_for_function(MATH_WAITS)
        assert not page.evaluate(SCROLLS), f"{name} is wider than a {size}"
        assert page.evaluate(MISSING) == [], name
        assert page.evaluate(MATH_ERRORS) == 0, name


def test_an_answer_unfolds(visit):
    page = visit("phone")
    page.goto("notebooks/02_lora_from_scratch.html")
    folded = page.locator("details").first
    answer = folded.locator("p").last
    assert not answer.is_visible()
    folded.locator("summary").click()
    assert answer.is_visible()


def test_hebrew_runs_right_to_left(visit):
    page = visit("desktop")
    page.goto("notebooks/01_rank_intuition.html")
    words = page.locator("td", has_text=re.compile("[א-ת]"))
    assert words.count() > 3
    for word in words.all():
        assert word.evaluate("cell => getComputedStyle(cell).direction") == "rtl"


@pytest.mark.parametrize("size", SIZES)
def test_a_reader_goes_through_the_course_and_searches_it(visit, size):
    page = visit(size)
    page.goto("index.html")
    page.get_by_role("link", name="1. Rank intuition").and_(page.locator("article a")).click()
    for title in ("2. LoRA from scratch", "3. A LoRA transformer"):
        page.locator(".next-page").click()
        assert page.locator("h1").inner_text().startswith(title)
    if size == "phone":
        page.locator(".mobile-header .nav-overlay-icon").click()
    box = page.get_by_role("textbox", name="Search")
    box.fill("clinic")
    box.press("Enter")
    page.get_by_text("Search finished").wait_for()
    page.wait_for_load_state("networkidle")  # the excerpts are there
    page.locator("#search-results a", has_text="4. Training").click()
    page.wait_for_url("**/notebooks/04_training.html**")


def test_the_site_can_be_read_and_searched_from_its_folder(browser, site):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((site / "notebooks" / "02_lora_from_scratch.html").as_uri())
    page.wait_for_function(MATH_WAITS)
    page.goto((site / "search.html").as_uri() + "?q=clinic")
    page.locator("#search-results a", has_text="4. Training").wait_for()
    page.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
