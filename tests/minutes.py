"""What a notebook asks of its reader. Cells of exercises are counted apart: their headings say
how long they take."""

import html
import re

WORDS, CODE_LINES, TABLE_CELLS = 180, 15, 35  # read in a minute


def words(text: str) -> int:
    """Those of Markdown or HTML that are read: no tags, no pictures, no marks."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<[^>]+>", " ", text)
    return len(re.sub(r"[#*`|$\\_>-]", " ", text).split())


def minutes(notebook) -> float:
    """Minutes to read a notebook with its outputs, exercises apart; half of one for a figure, one
    for a prediction."""
    cells = [c for c in notebook.cells if "exercise" not in c.metadata.get("tags", ())]
    return sum(map(_cell, cells))


def _cell(cell) -> float:
    if cell.cell_type == "markdown":
        rows = [x for x in cell.source.splitlines() if x.lstrip().startswith("|")]
        return _time(words(cell.source), 0, sum(row.count("|") - 1 for row in rows), 0)
    tags = cell.metadata.get("tags", ())
    code = 0 if "hide-input" in tags else _lines(cell.source)
    shown = [] if "hide-output" in tags else cell.outputs
    return _time(0, code, 0, 0) + cell.source.count("predict(") + sum(map(_output, shown))


def _output(output) -> float:
    if output.output_type == "stream":
        return len(output.text.split()) / WORDS
    page = output.get("data", {}).get("text/html", "")
    source = "<pre" in page and "<td" not in page
    lines = _lines(html.unescape(re.sub(r"<[^>]+>", "", page))) if source else 0
    prose = re.sub(r"<(table|pre|style|script|svg)\b.*?</\1>", " ", page, flags=re.S)
    drawn = any(kind.startswith("image/") for kind in output.get("data", {}))
    said = words(prose) + words(output.get("data", {}).get("text/markdown", ""))
    return _time(said, lines, page.count("<td"), drawn)


def _time(word_count: int, lines: int, table_cells: int, figures: int) -> float:
    return word_count / WORDS + lines / CODE_LINES + table_cells / TABLE_CELLS + figures / 2


def _lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())
