"""Slides of the 60-minute class: `python docs/make_slides.py` writes them into slides/.

They are the notebooks' cells tagged `core`, as committed, by nbconvert's own exporter. A cell's
slide type (JupyterLab: Property Inspector) says where it goes: "-" below the cell before it,
"slide" and "subslide" on a new one, "skip" nowhere. What instructor_guide.md says below a heading
`#### section (notebook NN, …)` becomes the speaker's notes. Nothing needs a network.
"""

import re
import shutil
from base64 import b64encode
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import nbformat
from fontTools.subset import Subsetter
from fontTools.ttLib import TTFont
from matplotlib import get_data_path
from nbconvert import SlidesExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "instructor_guide.md"
TITLE = """# LoRA from scratch

In 60 minutes. Have the course open: `make lab`.

No laptop? Type your town on the page of `make playground`."""


def slide(source: str, slide_type: str) -> NotebookNode:
    return new_markdown_cell(source, metadata={"slideshow": {"slide_type": slide_type}})


def speaker_notes() -> dict[tuple[str, str], list[str]]:
    """(number of the notebook, heading of its section) → notes, Markdown."""
    pattern = r"^#### (.+) \((notebook (\d\d).*)\)\n((?:(?!#).*\n)*)"
    found = re.findall(pattern, GUIDE.read_text("utf-8"), re.MULTILINE)
    return {(number, heading): [where, "", text] for heading, where, number, text in found}


def class_notebook() -> NotebookNode:
    """The cells of the class, in order, each section's notes behind its first cell."""
    notes, cells = speaker_notes(), [slide(TITLE, "slide")]
    for path in sorted((ROOT / "notebooks").glob("0*.ipynb")):
        waiting = []
        for cell in nbformat.read(path, as_version=4).cells:
            for heading in re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE):
                waiting += notes.get((path.name[:2], heading), [])
            kind = cell.metadata.get("slideshow", {}).get("slide_type")
            if "core" not in cell.metadata.get("tags", ()) or kind == "skip":
                continue
            draws = any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))
            if draws or "show_source(" in cell.source:
                cell.metadata.tags.append("draws")  # its code is about showing
            cells.append(cell)
            if waiting:
                cells.append(slide("\n".join(waiting), "notes"))
                waiting = []
    return new_notebook(cells=cells, metadata={"title": "LoRA from scratch"})


def letters_of(text: str) -> str:
    """CSS that carries the letters of `text`, as far as matplotlib's DejaVu Sans has them: all
    scripts of the course but Hangul and katakana, which a computer with no font for them lacks."""
    font, kept = TTFont(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), BytesIO()
    del font["FFTM"]  # when it was made; the subsetter does not know this table
    subset = Subsetter()
    subset.populate(text=text)
    subset.subset(font)
    font.save(kept)
    source = f"url(data:font/ttf;base64,{b64encode(kept.getvalue()).decode()})"
    return f"<style>@font-face {{ font-family: Letters; src: {source}; }}</style>"


def write(folder: Path) -> Path:
    """The page; the scripts that it loads lie beside it."""
    hide = {"TagRemovePreprocessor": {"enabled": True, "remove_input_tags": ["draws"]}}
    exporter = SlidesExporter(
        config=Config(hide),
        extra_template_basedirs=[str(ROOT / "docs")],
        template_name="slides_template",
        reveal_url_prefix="scripts/reveal",
        reveal_theme="white",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    html, _ = exporter.from_notebook_node(class_notebook())
    reveal = Path(find_spec("sphinx_revealjs").origin).parent / "_static" / "revealjs"
    mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    shutil.copytree(reveal, folder / "scripts" / "reveal", dirs_exist_ok=True)
    shutil.copy(mathjax / "tex-svg.js", folder / "scripts")
    page = folder / "lora_in_60_minutes.html"
    page.write_text(html.replace("</head>", letters_of(html) + "</head>", 1), "utf-8")
    return page


if __name__ == "__main__":
    page = write(ROOT / "slides")
    print(f"{page.relative_to(ROOT)}: open it in a browser; press S for the notes")
