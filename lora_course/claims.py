"""What a notebook says of its results: claims, each with its bound."""

import os
import textwrap
from collections.abc import Mapping

FAILS = "✗ Does not hold under your settings."  # begins the line of a claim that fails


def strict() -> bool:
    """Whether a claim that fails, or a wrong answer, raises: in the tests, not for a learner."""
    return os.environ.get("LORA_LIB_STRICT") == "1"


def claim(
    statement: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    equals: float | None = None,
) -> None:
    """Print a tick, a statement, the measured value and its bound; a cross if it fails.

    Raises ValueError unless exactly one bound is given; AssertionError if the claim fails while
    LORA_LIB_STRICT=1 is set, as the tests do.
    """
    bounds = {"at least": at_least, "at most": at_most, "exactly": equals}
    given = [(word, bound) for word, bound in bounds.items() if bound is not None]
    if len(given) != 1:
        raise ValueError(
            f"claim needs one of at_least, at_most and equals; {len(given)} were given"
        )
    word, bound = given[0]
    holds = {"at least": value >= bound, "at most": value <= bound, "exactly": value == bound}[word]
    report = f"{statement}: {_number(value)} ({word} {_number(bound)})"
    if strict() and not holds:
        raise AssertionError(report)
    print("✓" if holds else FAILS, report)


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"


LINE = 80  # characters of a printed line; longer ones are broken inside a word


def say(text: str, indent: str = "") -> None:
    """Print text in lines that fit the page, all but the first behind `indent`."""
    print(textwrap.fill(text, LINE, subsequent_indent=indent))


def say_options(options: Mapping[str, str]) -> None:
    """Print the options of a question, {letter: text}."""
    for letter, text in options.items():
        say(f"  {letter}) {text}", indent="     ")
