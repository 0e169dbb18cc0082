"""Questions with options; what they say stands in exercises.toml, under their names."""

from collections.abc import Mapping

from lora_course.claims import say, say_options
from lora_course.exercises.checker import Check, NotAttempted


def ask(question: str, options: Mapping[str, str]) -> None:
    """Print a question and its options, {letter: text}."""
    say(question)
    say_options(options)


def letter_of(answer, options: Mapping[str, object]) -> str:
    """The answer as a key of `options`; raises NotAttempted where it is none."""
    if answer is None:
        raise NotAttempted("Replace None by a letter and run the cell again.")
    letter = answer.strip().lower() if isinstance(answer, str) else answer
    if not isinstance(letter, str) or letter not in options:
        raise NotAttempted(f"{answer!r} is not an option; give one of {', '.join(options)}.")
    return letter


class Choice(Check):
    """A question; each option has its reply: why it is right, or the misconception behind it.

    In `words`: question, options {letter: text}, right (its letter), because {letter: reply}.
    """

    def __call__(self, answer: str | None = None) -> None:
        ask(self.words["question"], self.words["options"])
        super().__call__(answer)

    def record(self, answer: str | None = None) -> None:
        """For an assignment: say which answer is kept, and leave the verdict to the grade."""
        ask(self.words["question"], self.words["options"])
        try:
            say(f"Recorded: {letter_of(answer, self.words['options'])}")
        except NotAttempted as to_do:
            say(f"Nothing is recorded yet. {to_do}")

    @property
    def why(self) -> str:
        return self.words["because"][self.words["right"]]

    def judge(self, answer) -> str | None:
        letter = letter_of(answer, self.words["options"])
        return None if letter == self.words["right"] else self.words["because"][letter]
