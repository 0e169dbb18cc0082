"""The course as a web site (`make site`): the pages are README.md, the notebooks with their
committed outputs, docs/*.md, grading/README.md, and the library's source; under playground/ lies
the page on which the model runs. No notebook is executed, and neither the build nor a page needs a
network."""

import fnmatch
import posixpath
import re
import sys
from binascii import a2b_base64
from hashlib import sha256
from pathlib import Path, PurePosixPath

import nbformat
from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

project = "LoRA from Scratch"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
root_doc = "README"
include_patterns = [
    "notebooks/**.ipynb",
    "docs/*.md",
    "grading/README.md",
    "*.md",
    "lora_lib/**.py",
]
exclude_patterns = [".venv", "**/.ipynb_checkpoints", "docs/_build"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".py": "myst-nb"}

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
smartquotes = False  # the site says, to the letter, what the notebooks say

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_css_files = ["course.css"]
html_search_scorer = "docs/_static/scorer.js"
templates_path = ["_templates"]
html_additional_pages = {"index": "index.html"}  # leads to README.html
html_copy_source = False
html_use_index = False
html_show_copyright = False

CONTENTS = {
    "The course": [
        "notebooks/quiz_before",
        "notebooks/0*",
        "notebooks/transfer",
        "notebooks/assignment",
    ],
    "Going deeper": ["notebooks/going_deeper/*"],
    "Solutions": ["notebooks/solutions/*"],
    "Teaching and help": ["docs/*", "grading/README", "C*", "LICENSE*"],
    "The library": ["lora_lib/__init__"],
}


def table_of_contents(app, patterns: list[str], *options: str) -> str:
    """A toctree of the pages that match; nothing, if there are none."""
    entries = [f"/{p}" for p in patterns if fnmatch.filter(app.env.found_docs, p)]
    if not entries:
        return ""
    return "\n".join(["\n```{toctree}", ":glob:", *options, "", *entries, "```\n"])


def read_page(app, docname: str, content: list[str]) -> None:
    """The README gets the table of contents, a notebook a link to itself; a module of the library
    becomes a page."""
    if docname == root_doc:
        # An alt text may be broken into lines; MyST would join their words.
        content[0] = re.sub(r"!\[[^]]*\]", lambda alt: alt[0].replace("\n", " "), content[0])
        for caption, patterns in CONTENTS.items():
            content[0] += table_of_contents(app, patterns, ":hidden:", f":caption: {caption}")
    elif docname.startswith("notebooks/"):
        notebook = nbformat.reads(content[0], as_version=4)
        for cell in notebook.cells:
            # Source that is shown is folded already; it need not be unfolded twice.
            tags = cell.metadata.get("tags", [])
            cell.metadata["tags"] = [tag for tag in tags if tag != "hide-output"]
        name = f"{posixpath.basename(docname)}.ipynb"
        link = f"{{download}}`Download this notebook <{name}>`"
        notebook.cells.append(nbformat.v4.new_markdown_cell(link, id="download"))
        content[0] = nbformat.writes(notebook)
    elif docname.startswith("lora_lib/"):
        package = docname.removesuffix("/__init__")
        name = f"{docname}.py" if package == docname else package
        content[0] = f"# {name}\n\n``````python\n{content[0]}``````\n"
        if package != docname:
            content[0] += table_of_contents(app, [f"{package}/*", f"{package}/*/__init__"])


def link_folders(app, doctree) -> None:
    """A link to a folder leads to its first page; to a folder without pages, it is only text."""
    here = posixpath.dirname(app.env.docname)
    for link in list(doctree.findall(addnodes.pending_xref)):
        folder = posixpath.normpath(posixpath.join(here, link["reftarget"]))
        if link["refdomain"] is None and (ROOT / folder).is_dir():
            pages = sorted(page for page in app.env.found_docs if page.startswith(f"{folder}/"))
            if pages:
                link.attributes |= {"refdomain": "doc", "reftarget": pages[0], "reftargetid": None}
            else:
                link.replace_self(link.children)


def describe_figures(app, doctree) -> None:
    """The alt text of a figure, which MyST-NB leaves in the notebook; it names an image by the
    hash of its bytes."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    alt = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                name = sha256(a2b_base64(output.data["image/png"])).hexdigest()
                alt[name] = output.metadata["image/png"]["alt"]
    for image in doctree.findall(nodes.image):
        if (name := PurePosixPath(image["uri"]).stem) in alt:
            image["alt"] = alt[name]


def part_cells(app, doctree) -> None:
    """A space between the cells of a drawn table, or the search index takes them for one word."""
    for raw in doctree.findall(nodes.raw):
        raw.children = [nodes.Text(re.sub("(?=</t[dh]>)", " ", raw.astext()))]


def add_playground(app, error: Exception | None) -> None:
    """The page on which the model runs, with a link back to the course."""
    if error is None and app.builder.format == "html":
        from make_playground import write

        page = write(Path(app.outdir) / "playground")
        course = '<a href="../index.html">LoRA from Scratch</a>'
        text = page.read_text("utf-8").replace("<em>LoRA from Scratch</em>", course)
        page.write_text(text, "utf-8")


def setup(app) -> None:
    app.connect("source-read", read_page)
    app.connect("doctree-read", link_folders)
    app.connect("doctree-read", describe_figures)
    app.connect("doctree-read", part_cells)
    app.connect("build-finished", add_playground)
