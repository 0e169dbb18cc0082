"""What a notebook says beside its results: claims with their bounds, and predictions."""

import os
import textwrap
from collections.abc import Sequence

from lora_course.tables import show_table

FAILS = "Does not hold under your settings."  # begins the line of a claim that fails


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
    """Print a statement, the measured value and its bound, and whether it holds.

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
    report = f"{statement}: measured {_number(value)}, claimed {word} {_number(bound)}"
    if strict() and not holds:
        raise AssertionError(report)
    print("Holds." if holds else FAILS, report)


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"


LINE = 96  # characters of a printed line; JupyterLab breaks longer ones inside a word


def say(text: str, indent: str = "") -> None:
    """Print text in lines that fit the page, all but the first behind `indent`."""
    print(textwrap.fill(text, LINE, subsequent_indent=indent))


_predictions: dict[str, tuple[str, Sequence[str], str | None]] = {}


def predict(name: str, question: str, options: Sequence[str], guess: str | None) -> None:
    """Store your guess, the letter of an option, before you see the answer; `reveal` shows both.

    Raises ValueError for a guess that is neither None nor the letter of an option.
    """
    letters = "abcdefgh"[: len(options)]
    if guess is not None and guess not in tuple(letters):
        raise ValueError(f"guess is {guess!r}; it must be None or one of {', '.join(letters)}")
    chosen = None if guess is None else options[letters.index(guess)]
    _predictions[name] = question, options, chosen
    say(question)
    for letter, option in zip(letters, options, strict=True):
        say(f"  {letter}) {option}", indent="     ")
    print(
        f"Your prediction: {chosen}" if chosen else 'Set guess to a letter, such as "a", and run.'
    )


def reveal(name: str, outcome: str) -> None:
    """Show what happened beside what you predicted under `name`."""
    question, _, chosen = _predictions.get(name, ("", (), None))
    show_table(["question", "you predicted", "measured"], [[question, chosen or "—", outcome]])
