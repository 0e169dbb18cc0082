"""How an exercise answers: not attempted, wrong and why, or right and why it matters."""

import inspect
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from lora_course.claims import say, strict


class Wrong(Exception):
    """Raised by a test with a message for the learner: what is wrong, and where to look."""


class Exercise:
    """Call it with your function. It never raises (only in the course's own tests, if it is wrong).

    `name` is the notebook's number and the exercise's name, as in "01 k90". `test` gets the
    function, tries it on numbers drawn anew at every call, and raises Wrong; an answer of None, or
    NotImplementedError from the function, means that it was not attempted. `contract` says what
    the function takes and returns, for whoever returns something that the test cannot use.
    """

    def __init__(self, name: str, test: Callable, *, contract: str, why: str, hints: Sequence[str]):
        self.name, self.test, self.contract, self.why, self.hints = name, test, contract, why, hints
        self.to_do = (
            f"Fill in the blank and run the cell again; exercises.{name.split()[1]}.hint() helps."
        )
        self._hints_given = 0

    def __call__(self, answer=None) -> None:
        try:
            mistake = self.judge(answer)
        except NotImplementedError as error:
            returned_none = answer is not None and not _line_of(answer, error)
            forgotten = " If you wrote one, is a return missing?" if returned_none else ""
            say(f"Not attempted yet. {self.to_do}{forgotten}")
            return
        if mistake and strict():
            raise AssertionError(mistake)
        say(f"Not right yet: {mistake}" if mistake else f"Right. {self.why}")

    def judge(self, answer) -> str | None:
        """What is wrong with the answer, or None if it is right.

        Raises NotImplementedError if it was not attempted.
        """
        if answer is None:
            raise NotImplementedError
        try:
            with fresh_numbers():
                self._test(answer)
        except NotImplementedError:
            raise
        except Wrong as wrong:
            return str(wrong)
        except Exception as error:
            return self._explain(answer, error)
        return None

    def grade(self, answer) -> None:
        """For grading a class: raises AssertionError, with the message, unless it is right."""
        try:
            mistake = self.judge(answer)
        except NotImplementedError:
            mistake = "not attempted"
        if mistake:
            raise AssertionError(mistake)

    def hint(self) -> None:
        """One hint more with every call."""
        number = min(self._hints_given, len(self.hints) - 1)
        self._hints_given += 1
        last = " (the last one)" if number + 1 == len(self.hints) else ""
        say(f"Hint {number + 1} of {len(self.hints)}{last}: {self.hints[number]}")

    def _test(self, answer) -> None:
        if not callable(answer):
            raise Wrong(
                f"this is a value ({type(answer).__name__}), not a function; pass the function "
                "itself, without calling it"
            )
        self.test(answer)

    def _explain(self, answer: Callable, error: Exception) -> str:
        short = str(error).strip().partition("\n")[0]
        short = f"{type(error).__name__}: {short if len(short) < 200 else short[:200] + ' …'}"
        line = _line_of(answer, error)
        if line:
            return f"your code raised {short} at: {line}"
        return f"your answer could not be used ({short}). What is asked for: {self.contract}"


@contextmanager
def fresh_numbers() -> Iterator[None]:
    """Draw anew at every call, and leave the notebook's own sequence of random numbers alone."""
    state, seed = random.getstate(), new_seed()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def new_seed() -> int:
    return random.SystemRandom().randrange(2**31)


def _line_of(answer: Callable, error: Exception) -> str:
    """The learner's own last line before the error, not one of torch or of the check."""
    functions = vars(answer).values() if isinstance(answer, type) else [inspect.unwrap(answer)]
    files = {f.__code__.co_filename for f in functions if hasattr(f, "__code__")}
    lines = [f.line for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return lines[-1] if lines else ""


class Choice(Exercise):
    """A question with options; every wrong one carries the misconception that leads to it."""

    def __init__(self, name: str, question: str, options: Mapping[str, str], right: str, why: str,
                 misconceptions: Mapping[str, str]):  # fmt: skip
        missing = options.keys() - misconceptions.keys() - {right}
        if missing:
            raise ValueError(f"options {sorted(missing)} have no misconception to name")
        self.question, self.options = question, options
        self.right, self.misconceptions = right, misconceptions
        hint = "Rule out first what contradicts a number above."
        super().__init__(name, self._test, contract="a letter", why=why, hints=[hint])
        self.to_do = "Replace None by a letter and run the cell again."

    def __call__(self, answer: str | None = None) -> None:
        self.ask()
        super().__call__(answer)

    def ask(self) -> None:
        """Print the question and its options."""
        say(self.question)
        for letter, text in self.options.items():
            say(f"  {letter}) {text}", indent="     ")

    def _test(self, answer: str) -> None:
        letter = answer.strip().lower() if isinstance(answer, str) else answer
        if letter not in tuple(self.options):
            raise Wrong(f"{answer!r} is not an option; give one of {', '.join(self.options)}")
        if letter != self.right:
            raise Wrong(self.misconceptions[letter])
