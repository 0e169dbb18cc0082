"""Predictions: you commit to an answer before you see it. Their words are in predictions.toml."""

import tomllib
from functools import cache
from pathlib import Path

from lora_course.claims import say, say_options

_guesses: dict[str, str | None] = {}


@cache
def all_predictions() -> dict[str, dict]:
    """Name → {question, options, right: the letter of one, why}."""
    path = Path(__file__).with_name("predictions.toml")
    return tomllib.loads(path.read_text("utf-8"))


def _options(name: str) -> dict[str, str]:
    """Letter → text. Raises LookupError for a name that is not there."""
    if name not in all_predictions():
        raise LookupError(
            f"there is no prediction {name!r}; there are: {', '.join(all_predictions())}"
        )
    return dict(zip("abcdefgh", all_predictions()[name]["options"], strict=False))


def predict(name: str, guess: str | None = None) -> str | None:
    """Ask a question, and keep your guess, the letter of an option, until `reveal`.

    Returns the guess; None if there is none yet. Raises LookupError for an unknown question.
    """
    options = _options(name)
    say(all_predictions()[name]["question"])
    say_options(options)
    letter = str(guess).strip().lower()
    _guesses[name] = letter if letter in options else None
    if letter in options:
        print(f"Your prediction: {letter}) {options[letter]}")
    elif guess is None:
        print('Put a letter, such as "a", in place of None, and run the cell again.')
    else:
        say(f"{guess!r} is not one of the options; give {', '.join(options)}, in quotes.")
    return _guesses[name]


def reveal(name: str, measured: object = "") -> None:
    """Say what was measured, which option was right and why, and what you predicted."""
    options, right = _options(name), all_predictions()[name]["right"]
    if measured != "":
        print(f"Measured: {measured}")
    guess = _guesses.get(name)
    yours = (
        "" if guess is None else " You were right." if guess == right else f" You said {guess})."
    )
    say(f"Right: {right}) {options[right]}.{yours} {all_predictions()[name]['why']}")
