"""Tables, and the library's source, on the page of a notebook."""

import html
import inspect
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real

from IPython.display import HTML, display
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer


def show_source(*objects: Callable | type) -> None:
    """The very source of library functions or classes, highlighted."""
    style = HtmlFormatter(
        noclasses=True, nobackground=True, prestyles="font-family: monospace; line-height: 1.3"
    )
    for item in objects:
        display(HTML(highlight(inspect.getsource(item), PythonLexer(), style)))


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    caption: str = "",
    recorded: bool = False,
) -> None:
    """A table; floats get three digits, `recorded` marks numbers that come from committed results.

    Text of any script is set in its own direction.
    """
    mark = "recorded results" if recorded else ""
    display(HTML(table_html(columns, rows, "; ".join(filter(None, (mark, caption))))))


def table_html(columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """The HTML of such a table."""
    # An interrupted run leaves rows short.
    numbers = [
        all(_is_number(x) for row in rows for x in row[i : i + 1]) for i in range(len(columns))
    ]
    head = "".join(
        f"<th style='text-align:{'right' if number else 'left'}'>{html.escape(column)}</th>"
        for column, number in zip(columns, numbers, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return (
        f"<table style='font-size:1.05em'><caption style='caption-side:bottom;"
        f"text-align:left'>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


_NUMBER = re.compile(r"|([−+-]?[\d.,]+(e[−+-]?\d+)?( ?%)?)")


def _is_number(value: object) -> bool:
    """Also text that is one, such as "1e-3", "−0.5" or "12 %"; and no value at all."""
    return isinstance(value, Real) or bool(_NUMBER.fullmatch(str(value)))


def _cell(value: object) -> str:
    if _is_number(value):
        form = ".3f" if isinstance(value, float) else "," if isinstance(value, Integral) else ""
        return f"<td style='text-align:right'>{value:{form}}</td>"
    return f"<td dir='auto' style='text-align:left'>{html.escape(str(value))}</td>"
