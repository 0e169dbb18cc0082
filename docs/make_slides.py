"""Slides of the 90-minute class: `python docs/make_slides.py` writes them into slides/.

One file that needs no network. What is on the slides comes from the notebooks: their cells tagged
`core90`, as committed, with their outputs. The order, the minutes and the speaker's notes come from
instructor_guide.md: a `###` heading there is a part of the class, a `####` heading a section of a
notebook, and the text below it the notes.

A cell's slide type (JupyterLab: Property Inspector) says where it goes: "-" on the slide of the
cell before it if there is room, "slide" and "subslide" on a new one, "skip" nowhere.
"""

import re
import struct
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import latex2mathml.converter
import nbformat
import sphinx_revealjs
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
OUTPUT = HERE.parent / "slides" / "lora_in_90_minutes.html"
REVEAL = Path(sphinx_revealjs.__file__).parent / "_static" / "revealjs"
# What a slide holds below its title, in pixels. It is 640 high, and the page makes smaller what is
# a little too tall.
WIDTH, ROOM = 1240, 690

PART = re.compile(r"^### \d\. (.+) \((\d+) minutes\)$", re.MULTILINE)
STEP = re.compile(r"^#### (.+) \(notebook (\d\d), (\d+) minutes?\)$", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)


@dataclass
class Step:
    """A section of a notebook, as the class takes it."""

    heading: str
    notebook: str
    minutes: int
    notes: str  # Markdown


@dataclass
class Part:
    title: str
    minutes: int
    steps: list[Step]


@dataclass
class Slide:
    title: str
    html: list[str] = field(default_factory=list)
    height: float = 0


# --- the guide -----------------------------------------------------------------------------------


def read_plan(guide: str) -> list[Part]:
    """The parts of the 90 minutes, in order."""
    plan = []
    for (title, minutes), text in _pieces(PART, guide):
        text = re.split(r"^#{1,3} ", text, maxsplit=1, flags=re.MULTILINE)[0]
        steps = [Step(h, n, int(m), notes.strip()) for (h, n, m), notes in _pieces(STEP, text)]
        plan.append(Part(title, int(minutes), steps))
    return plan


def _pieces(pattern: re.Pattern, text: str) -> list[tuple[tuple[str, ...], str]]:
    """The groups of every match, with the text from there to the next match."""
    found = list(pattern.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return [(m.groups(), text[m.end() : end]) for m, end in zip(found, ends, strict=True)]


# --- the notebooks -------------------------------------------------------------------------------


def read_sections(notebook: NotebookNode) -> dict[str, list[NotebookNode]]:
    """Heading → cells of the class below it; a text cell is divided where a heading stands in it.

    Cells that are only run ("skip") are left out, and so is a section of which nothing is shown.
    """
    sections, heading = {}, ""
    for cell in notebook.cells:
        taken = "core90" in cell.metadata.get("tags", ()) and slide_type(cell) != "skip"
        is_text = cell.cell_type == "markdown"
        pieces = [(None, cell.source)]
        if is_text and (found := list(HEADING.finditer(cell.source))):
            pieces = [(None, cell.source[: found[0].start()])]
            pieces += [(groups[0], text) for groups, text in _pieces(HEADING, cell.source)]
        for new_heading, text in pieces:
            heading = new_heading or heading
            if taken and text.strip():
                piece = NotebookNode(cell | {"source": text.strip()}) if is_text else cell
                sections.setdefault(heading, []).append(piece)
    return sections


def read_notebooks(folder: Path = NOTEBOOKS) -> dict[str, dict[str, list[NotebookNode]]]:
    """Number of a notebook, "01" to "07" → its sections."""
    paths = sorted(folder.glob("0*.ipynb"))
    return {path.name[:2]: read_sections(nbformat.read(path, as_version=4)) for path in paths}


def slide_type(cell: NotebookNode) -> str:
    return cell.metadata.get("slideshow", {}).get("slide_type", "-")


def section_slides(heading: str, cells: list[NotebookNode]) -> list[Slide]:
    """The slides of a section. What does not fit below the rest of a slide gets another one."""
    slides = [Slide(heading)]

    def put(html: str, height: float) -> None:
        if slides[-1].html and slides[-1].height + height > ROOM:
            slides.append(Slide(heading))
        slides[-1].html.append(html)
        slides[-1].height += height

    for cell in cells:
        if slide_type(cell) in ("slide", "subslide") and slides[-1].html:
            slides.append(Slide(heading))
        if cell.cell_type == "markdown":
            put(markdown(cell.source), text_height(cell.source))
            continue
        if not draws(cell):
            code = re.sub(r"  # fmt: skip$", "", cell.source, flags=re.MULTILINE)
            put(highlight(code, PythonLexer(), HtmlFormatter()), 30 + 27 * len(code.splitlines()))
        for output in cell.outputs:
            for html, height in shown(output):
                put(html, height)
    return slides


def draws(cell: NotebookNode) -> bool:
    """Whether its output is a figure: then its code is about drawing, and is not shown."""
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


def text_height(source: str) -> float:
    """Pixels, about, at the sizes of the template; so are the other heights here."""
    return sum(14 + 39 * -(-len(block) // 85) for block in source.split("\n\n"))


def shown(output: NotebookNode) -> Iterator[tuple[str, float]]:
    """What an output shows, as HTML, and its height; printed text in pieces between empty lines."""
    if output.output_type == "stream":
        for piece in re.split(r"\n\n+", output.text.strip("\n")):
            yield f"<pre class='printed'>{escape(piece)}</pre>", 45 + 27 * piece.count("\n")
        return
    data = output.data
    if "image/png" in data:
        width, height = struct.unpack(">II", b64decode(data["image/png"][:32])[16:24])
        alt = escape(output.metadata.get("image/png", {}).get("alt", ""), quote=True)
        source = f"data:image/png;base64,{data['image/png'].strip()}"
        yield f'<img alt="{alt}" src="{source}">', height * min(1, WIDTH / width)
    elif "text/html" in data:
        html = data["text/html"]
        height = 20 + max(45 * html.count("<tr"), 27 * html.count("\n"))
        yield f"<div class='rich'>{html}</div>", height
    else:
        yield f"<pre class='printed'>{escape(data['text/plain'])}</pre>", 45


# --- Markdown ------------------------------------------------------------------------------------


class _Renderer(IPythonRenderer):
    """Formulas become MathML, which browsers draw themselves; links become what they say."""

    def inline_math(self, body: str) -> str:
        return latex2mathml.converter.convert(body)

    def block_math(self, body: str) -> str:
        return latex2mathml.converter.convert(body.strip(), display="block")

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return text


def markdown(source: str) -> str:
    renderer = _Renderer(escape=False, exclude_anchor_links=True)
    return f"<div class='text'>{MarkdownWithMath(renderer).render(source)}</div>"


# --- the page ------------------------------------------------------------------------------------


def stacks(plan: list[Part], notebooks: dict) -> Iterator[list[str]]:
    """The slides in order: first one for each part, then a stack for each of its sections.

    Raises ValueError if the plan names a section of which nothing is shown, or leaves one out.
    """
    left = {(number, heading) for number, found in notebooks.items() for heading in found}
    minute = 0
    for number, part in enumerate(plan, start=1):
        rows = "".join(f"<li>{escape(step.heading)}</li>" for step in part.steps)
        html = f"<p>{part.minutes} minutes, from minute {minute}</p><ul>{rows}</ul>"
        notes = "\n".join(
            f"- {s.minutes} min: {s.heading}, notebook {s.notebook}" for s in part.steps
        )
        yield [_section(Slide(f"{number}. {part.title}", [html]), markdown(notes), 0, "part")]
        minute += part.minutes
        for step in part.steps:
            cells = notebooks.get(step.notebook, {}).get(step.heading)
            if cells is None:
                raise ValueError(
                    f"the guide names {step.heading!r} of notebook {step.notebook}, and no cell "
                    "tagged core90 is shown there; mend the guide's heading or the notebook's tags"
                )
            left.discard((step.notebook, step.heading))
            slides = section_slides(step.heading, cells)
            seconds = 60 * step.minutes // len(slides)
            notes = markdown(f"**{step.minutes} min, notebook {step.notebook}**\n\n{step.notes}")
            yield [_section(slide, notes, seconds, step.notebook) for slide in slides]
    if left:
        raise ValueError(f"tagged core90, but not in the guide: {sorted(left)}")


def _section(slide: Slide, notes: str, seconds: int, kind: str) -> str:
    body = "\n".join(slide.html)
    return (
        f'<section class="n{kind}" data-timing="{seconds}"><h2>{escape(slide.title)}</h2>\n'
        f'<div class="body" tabindex="-1"><div class="fit">{body}</div></div>\n'
        f'<aside class="notes">{notes}</aside></section>'
    )


def page(guide: str, notebooks: dict) -> str:
    """The whole of the slides, as one HTML page."""
    plan = read_plan(guide)
    slides = "\n".join(f"<section>{''.join(stack)}</section>" for stack in stacks(plan, notebooks))
    dist, plugin = REVEAL / "dist", REVEAL / "plugin"
    styles = [(dist / name).read_text("utf-8") for name in ("reset.css", "reveal.css")]
    styles += [HtmlFormatter(style="friendly").get_style_defs(".highlight")]
    files = (dist / "reveal.js", plugin / "notes" / "notes.js")
    values = {
        "STYLES": "\n".join(styles),
        "SCRIPTS": "\n".join(map(_script, files)),
        "MINUTES": str(sum(part.minutes for part in plan)),
        "SLIDES": slides,
    }
    template = (HERE / "slides_template.html").read_text("utf-8")
    return re.sub(r"<!-- ([A-Z]+) -->", lambda match: values[match[1]], template)


def _script(file: Path) -> str:
    """Its text as a script of the page, in whose strings no script may end."""
    text = file.read_text("utf-8").replace("</script", "<\\/script")
    return f"<script>{text}</script>"


def main() -> None:
    guide = (HERE / "instructor_guide.md").read_text("utf-8")
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(page(guide, read_notebooks()), "utf-8")
    print(f"{OUTPUT.relative_to(HERE.parent)}: open it in a browser; press S for the notes")


if __name__ == "__main__":
    main()
