"""How an exercise answers: not attempted, wrong and why, or right and why it matters."""

import traceback
from collections.abc import Callable, Mapping, Sequence

from lora_lib.notebook import say, strict


class Wrong(Exception):
    """Raised by a test with a message for the learner: what is wrong, and where to look."""


class Exercise:
    """Call it with your answer. It never raises (but in the course's own tests, if you are wrong).

    `test` gets the answer and raises Wrong; an answer of None, or NotImplementedError from the
    learner's function, means that it was not attempted.
    """

    def __init__(self, test: Callable, why: str, hints: Sequence[str]):
        self.test, self.why, self.hints = test, why, hints
        self._hints_given = 0

    def __call__(self, answer=None) -> None:
        try:
            if answer is None:
                raise NotImplementedError
            self.test(answer)
        except NotImplementedError:
            print("Not attempted yet. Fill in the blank and run the cell again; hint() helps.")
        except Wrong as wrong:
            self._say_wrong(str(wrong))
        except Exception as error:
            line = _line_of(answer, error)
            self._say_wrong(f"your code raised {type(error).__name__}: {error}{line}")
        else:
            say(f"Right. {self.why}")

    def hint(self) -> None:
        """One hint more with every call."""
        number = min(self._hints_given, len(self.hints) - 1)
        self._hints_given += 1
        say(f"Hint {number + 1} of {len(self.hints)}: {self.hints[number]}")

    @staticmethod
    def _say_wrong(message: str) -> None:
        if strict():
            raise AssertionError(message)
        say(f"Not right yet: {message}")


def _line_of(answer: object, error: Exception) -> str:
    """The learner's own last line before the error, not one of torch or of the check."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [f.line for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" at: {lines[-1]}" if lines and lines[-1] else ""


class Choice(Exercise):
    """A question with options; every wrong one carries the misconception that leads to it."""

    def __init__(self, question: str, options: Mapping[str, str], right: str, why: str,
                 misconceptions: Mapping[str, str]):  # fmt: skip
        missing = options.keys() - misconceptions.keys() - {right}
        if missing:
            raise ValueError(f"options {sorted(missing)} have no misconception to name")
        self.question, self.options = question, options
        self.right, self.misconceptions = right, misconceptions
        super().__init__(self._test, why, ["Rule out first what contradicts a number above."])

    def __call__(self, answer: str | None = None) -> None:
        say(self.question)
        for letter, text in self.options.items():
            say(f"  {letter}) {text}", indent="     ")
        super().__call__(answer)

    def _test(self, answer: str) -> None:
        if answer not in self.options:
            raise Wrong(f"{answer!r} is not an option; give one of {', '.join(self.options)}")
        if answer != self.right:
            raise Wrong(self.misconceptions[answer])
