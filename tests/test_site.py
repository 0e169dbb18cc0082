"""The course as a web site: built once, without network; read as files, then in a browser."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [p for p in sorted((ROOT / "notebooks").rglob("*.ipynb")) if ".ipynb_" not in str(p)]
OFFLINE = """
import socket, sys
def refuse(*arguments):
    raise OSError("the site is built without network")
socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


def name_of(file: Path, folder: Path = ROOT) -> str:
    """Its path from the folder, without its ending."""
    return file.relative_to(folder).with_suffix("").as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built from the working tree; a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-c", "docs", "-d", str(folder / "doctrees")]
    build = [sys.executable, "-c", OFFLINE, *options, ".", str(folder / "html")]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    """The parsed pages by their names in the site's folder."""
    files = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    return {name_of(f, site): BeautifulSoup(f.read_text("utf-8"), "html.parser") for f in files}


def test_the_contents_lead_to_every_notebook_and_document(pages):
    linked = {
        unquote(link["href"]).removesuffix(".html")
        for link in pages["README"].select(".sidebar-tree a[href]")
    }
    documents = [*NOTEBOOKS, *(ROOT / "docs").glob("*.md"), ROOT / "grading" / "README.md"]
    assert set(map(name_of, documents)) <= linked


def test_links_within_the_site_resolve_and_nothing_is_loaded_from_elsewhere(site, pages):
    anchors = {name: {tag["id"] for tag in page.select("[id]")} for name, page in pages.items()}
    wrong, seen = [], 0
    for name, page in pages.items():
        for tag in page.select("[href], [src]"):
            target = tag.get("href") or tag.get("src")
            address = urlsplit(urljoin(f"http://site/{name}.html", target))
            if address.netloc != "site":
                if tag.name != "a" and address.scheme.startswith("http"):
                    wrong.append((name, f"loads {target}"))
                continue
            seen += 1
            path = site / unquote(address.path).lstrip("/")
            known = anchors.get(name_of(path, site), ())
            if not path.is_file() or (address.fragment and unquote(address.fragment) not in known):
                wrong.append((name, target))
    for style in site.rglob("*.css"):
        wrong += re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//.+", style.read_text("utf-8"))
    assert wrong == [] and seen > 1000


def test_figures_have_the_alt_text_of_the_notebooks(pages):
    for path in NOTEBOOKS:
        outputs = [o for c in nbformat.read(path, 4).cells for o in c.get("outputs", ())]
        alt = [o.metadata["image/png"]["alt"] for o in outputs if "image/png" in o.get("data", ())]
        page = pages[name_of(path)]
        assert [image["alt"] for image in page.select(".cell_output img")] == alt
    assert all(image.get("alt", "").strip() for page in pages.values() for image in page("img"))


def test_a_notebook_can_be_downloaded_from_its_page(site, pages):
    for path in NOTEBOOKS:
        name = name_of(path)
        [link] = pages[name].select("a.download, a:has(.download)")
        assert (site / name).parent.joinpath(link["href"]).read_bytes() == path.read_bytes()


def test_a_search_finds_the_lessons_before_the_source_of_the_library(browser, site):
    page = browser.new_page()
    page.goto((site / "search.html").as_uri() + "?q=forward")
    summary = "document.querySelector('#search-results .search-summary')?.innerText"
    page.wait_for_function(f"/found \\d+/.test({summary})")
    found = page.eval_on_selector_all("#search-results li a", "all => all.map(a => a.href)")
    page.close()
    lessons, sources = ([i for i, a in enumerate(found) if part in a] for part in
                        ("/notebooks/0", "/lora_lib/"))  # fmt: skip
    assert lessons[0] == 0 and lessons[-1] < sources[0], found


def test_pages_fit_every_screen_and_show_their_images_and_formulas(browser, site):
    page, errors = browser.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    for name in ["README", *map(name_of, NOTEBOOKS)]:
        page.goto((site / f"{name}.html").as_uri())
        formulas = "[...document.querySelectorAll('.math')]"
        page.wait_for_function(f"{formulas}.every(m => m.querySelector('mjx-container'))")
        missing = "[...document.images].some(i => !i.naturalWidth)"
        broken = "document.querySelectorAll('mjx-merror').length > 0"
        assert not page.evaluate(f"{missing} || {broken}"), name
        for width in (390, 1280):  # a phone, a desktop
            page.set_viewport_size({"width": width, "height": 844})
            wide = "document.scrollingElement.scrollWidth > innerWidth + 1"
            assert not page.evaluate(wide), (name, width)
            figure = "[...document.querySelectorAll('.cell_output img')]"
            cut = f"{figure}.some(i => i.width > i.closest('.cell_output').clientWidth + 1)"
            assert not page.evaluate(cut), (name, width)
    page.close()
    assert errors == []


def test_the_page_on_which_the_model_runs_leads_back_to_the_course(site, pages):
    [link] = [a for a in pages["playground/index"]("a") if a.text == "LoRA from Scratch"]
    assert (site / "playground" / link["href"]).resolve() == (site / "index.html").resolve()
