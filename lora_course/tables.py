"""Tables, and the library's source, on the page of a notebook."""

import html
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real

from IPython.display import HTML, display
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from lora_course.georgian import reads
from lora_lib.names import load_spellings


def show_source(*objects: Callable | type) -> None:
    """The source of library functions or classes, highlighted and folded."""
    style = HtmlFormatter(
        noclasses=True, nobackground=True, prestyles="font-family: monospace; line-height: 1.3"
    )
    for item in objects:
        name = f"{item.__module__}.{item.__qualname__}"
        source = highlight(inspect.getsource(item), PythonLexer(), style)
        summary = f"<summary>Source of <code>{name}</code></summary>"
        display(HTML(f"<details>{summary}{source}</details>"))


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    caption: str = "",
    recorded: bool = False,
) -> None:
    """A table; floats get three digits, `recorded` marks numbers that come from committed results.

    Text of any script is set in its own direction.
    """
    # An interrupted run leaves rows short.
    numbers = [
        all(_is_number(x) for row in rows for x in row[i : i + 1]) for i in range(len(columns))
    ]
    head = "".join(
        f"<th style='text-align:{'right' if number else 'left'}'>{html.escape(column)}</th>"
        for column, number in zip(columns, numbers, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    mark = "recorded results" if recorded else ""
    display(HTML(_table(head, body, "; ".join(filter(None, (mark, caption))))))


def show_rewards(
    town: str, texts: Sequence[str], rewards: Sequence[float], recorded: Sequence[str]
) -> None:
    """Samples of a Georgian name, a row each, with their rewards and advantages: the reward minus
    the mean of all."""
    mean = sum(rewards) / len(rewards)
    rows = [
        [f"{text}, reads {reads(text)}", f"{reward:.2f}", f"{reward - mean:+.2f}".replace("-", "−")]
        for text, reward in zip(texts, rewards, strict=True)
    ]
    caption = f"recorded: {recorded[0]}, reads {reads(recorded[0])}; mean reward {mean:.2f}"
    show_table([f"sample of {town}", "reward", "advantage"], rows, caption)


def show_names(
    towns: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    script: str | Mapping[str, str] = "georgian",
    caption: str = "",
    first: str = "",
) -> None:
    """A row of names, one a town, for every label in `rows`; ✓ and ✗ say whether a name is a
    recorded spelling of a test town, no mark that none is recorded. `script` is that of all rows,
    or {label: script}; `first` the heading of the labels. Georgian is also shown as it is read.
    """
    display(HTML(names_html(towns, rows, script, caption, first)))


def names_html(towns, rows, script="georgian", caption="", first="") -> str:
    """The HTML of what `show_names` shows."""
    scripts = dict.fromkeys(rows, script) if isinstance(script, str) else script
    head = "".join(f"<th style='text-align:left'>{html.escape(x)}</th>" for x in (first, *towns))
    body = "".join(
        f"<tr><td style='text-align:left'>{html.escape(str(label))}</td>"
        + "".join(map(partial(_name_cell, scripts[label]), towns, names))
        + "</tr>"
        for label, names in rows.items()
    )
    return _table(head, body, caption)


def _name_cell(script: str, town: str, name: str) -> str:
    """A name, its mark, and below it how it is read."""
    right = load_spellings(script, "test").get(town)
    mark = {None: "", True: _RIGHT, False: _WRONG}[right and name in right]
    latin = reads(name)
    below = f"<br><small>reads {html.escape(latin)}</small>" if latin != name else ""
    return f"<td style='text-align:left'><bdi>{html.escape(name)}</bdi>{mark}{below}</td>"


RIGHT, WRONG = "#007A5A", "#B84A00"  # the colours of the marks
_RIGHT = f" <span style='color:{RIGHT}' title='as recorded'>✓</span>"
_WRONG = f" <span style='color:{WRONG}' title='not as recorded'>✗</span>"


def span(values: Iterable[float]) -> str:
    """The lowest and the highest, such as "31.2 to 56": one of them, if both read the same."""
    values = list(values)
    return " to ".join(dict.fromkeys(f"{end:.3g}" for end in (min(values), max(values))))


def _table(head: str, body: str, caption: str) -> str:
    return (
        f"<table style='font-size:1.05em'><caption style='caption-side:bottom;"
        f"text-align:left'>{html.escape(caption)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


_NUMBER = re.compile(r"|([−+-]?[\d.,]+(e[−+-]?\d+)?( ?%)?)|[\d.]+ to [\d.]+")


def _is_number(value: object) -> bool:
    """Also text that is one, such as "1e-3", "−0.5", "12 %" or a `span`; and no value at all."""
    return isinstance(value, Real) or bool(_NUMBER.fullmatch(str(value)))


def _cell(value: object) -> str:
    if _is_number(value):
        form = ".3f" if isinstance(value, float) else "," if isinstance(value, Integral) else ""
        return f"<td style='text-align:right'>{value:{form}}</td>"
    return f"<td dir='auto' style='text-align:left'>{html.escape(str(value))}</td>"
