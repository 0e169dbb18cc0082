"""How an answer is checked: mistakes are data.

An `Exercise` holds the right function, what it is tried on, and the wrong functions that people
write, each under the message that it deserves. The tests loop over the same dictionary. The other
words of a check stand in exercises.toml, under its name.
"""

import copy
import inspect
import math
import random
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property, partial
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor, nn

from lora_course.claims import say, strict


class NotAttempted(Exception):
    """Raised for an answer that was not begun; its text says what to do."""


class WrongAnswer(AssertionError):
    """In a notebook, graded or not, its message stands alone, without a traceback of the check."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [str(self)]


@cache
def read_words(file: str) -> dict:
    """What stands in a TOML file beside this module."""
    return tomllib.loads(files(__package__).joinpath(file).read_text("utf-8"))


class Check:
    """Call it with an answer, and it prints a verdict that begins with "Right." only if it is.

    It raises nothing, but for an AssertionError if LORA_LIB_STRICT=1 and the answer is wrong.
    `name` is the notebook's number and the name in its module, as in "01 k90".
    """

    def __init__(self, name: str):
        self.name, self._hints_given = name, 0

    @cached_property
    def words(self) -> dict:
        """What it says: its table in exercises.toml, read when it first speaks."""
        return read_words("exercises.toml")[self.name]

    @property
    def why(self) -> str:
        return self.words["why"]

    def judge(self, answer) -> str | None:
        """What is wrong with the answer, None if it is right; raises NotAttempted."""
        raise NotImplementedError

    def __call__(self, answer=None) -> None:
        try:
            mistake = self.judge(answer)
        except NotAttempted as to_do:
            say(f"Not attempted yet. {to_do}")
            return
        if mistake and strict():
            raise WrongAnswer(mistake)
        verdict = f"Not right yet: {mistake}" if mistake else f"Right. {self.why}"
        for line in verdict.split("\n"):
            say(line)

    def grade(self, answer) -> None:
        """For nbgrader: raises AssertionError, with the message, unless the answer is right."""
        try:
            mistake = self.judge(answer)
        except NotAttempted as to_do:
            mistake = f"not attempted. {to_do}"
        if mistake:
            raise WrongAnswer(mistake)

    def hint(self) -> None:
        """One hint more with every call."""
        hints = self.words["hints"]
        number = self._hints_given = min(self._hints_given + 1, len(hints))
        last = " (the last one)" if number == len(hints) else ""
        say(f"Hint {number} of {len(hints)}{last}: {hints[number - 1]}")


# --- functions -----------------------------------------------------------------------------------


def result(function: Callable, *arguments) -> dict:
    """What is compared unless an exercise observes more: the result alone."""
    return {"the result": function(*arguments)}


class Exercise(Check):
    """A function to write.

    `draw` yields fresh arguments, a tuple for each call. `observe(function, *arguments)` calls the
    function and returns what it did, as {fact in words: value}; the facts are compared one after
    the other with those of `reference`, and at the first that differs with those of `mistakes`,
    {message: wrong function}. A function gets copies, which it leaves alone unless `may_change`.
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        draw: Callable[[], Iterable[tuple]],
        mistakes: Mapping[str, Callable],
        *,
        observe: Callable[..., dict] = result,
        may_change: bool = False,
    ):
        super().__init__(name)
        self.reference, self.draw, self.mistakes = reference, draw, mistakes
        self.observe, self.may_change = observe, may_change

    def judge(self, answer) -> str | None:
        name = self.name.partition(" ")[2]
        to_do = f"Write the function and run the cell again; exercises.{name}.hint() helps"
        if answer is None:
            raise NotAttempted(f"{to_do}.")
        if not callable(answer):
            return f"this is {describe(answer)}; pass the function itself, without calling it"
        with fresh_numbers():
            calls, right, wrong = self.trial()
            given = self._facts(answer, calls)
            if any(type(e) is NotImplementedError and not e.args for e in given["an error"]):
                raise NotAttempted(f"{to_do}.")
            if same(given, self._facts(lambda *_: None, calls)):
                what = (
                    "changes nothing" if self.may_change else "returns None; is a return missing?"
                )
                raise NotAttempted(f"{to_do}. So far it {what}")
        fact = _first_difference(given, right)
        return fact and _say_what_differs(fact, given, right, wrong, answer, calls)

    def grade(self, answer) -> None:
        if answer is self.reference:
            raise WrongAnswer("this is the function of the check itself; write one of your own")
        super().grade(answer)

    def trial(self) -> tuple[list, dict, dict]:
        """Arguments on which every mistake gets its own message: no wrong answer passes by luck."""
        for _ in range(50):
            calls = list(self.draw())
            right = self._facts(self.reference, calls)
            wrong = {m: self._facts(function, calls) for m, function in self.mistakes.items()}
            mixed = [m for m, facts in wrong.items() if _message(facts, right, wrong) != m]
            if not mixed:
                return calls, right, wrong
        raise RuntimeError(f"{self.name}: 50 draws did not tell these mistakes apart: {mixed}")

    def _facts(self, function: Callable, calls: list[tuple]) -> dict[str, list]:
        """{fact: its value in each of the calls}"""
        observed = [self._observe(function, arguments) for arguments in calls]
        return {fact: [one.get(fact) for one in observed] for one in observed for fact in one}

    def _observe(self, function: Callable, arguments: tuple) -> dict:
        given, changed = copy.deepcopy(arguments), []
        try:
            facts = self.observe(function, *given)
        except Exception as error:
            return {"an error": error}
        if not self.may_change:
            names = inspect.signature(self.reference).parameters
            pairs = zip(names, given, arguments, strict=False)
            changed = [name for name, now, then in pairs if not same(now, then)]
        return {"an error": None, "changed": changed} | facts


def _first_difference(given: dict, right: dict) -> str | None:
    return next((fact for fact in right if not same(given.get(fact), right[fact])), None)


def _message(given: dict, right: dict, wrong: Mapping[str, dict]) -> str | None:
    """That of the first mistake which begins to differ in the same fact, with the same values."""
    fact = _first_difference(given, right)
    for message, facts in wrong.items():
        if (
            fact
            and fact == _first_difference(facts, right)
            and same(facts.get(fact), given.get(fact))
        ):
            return message
    return None


def _say_what_differs(fact: str, given, right, wrong, answer, calls) -> str:
    message = _message(given, right, wrong)
    values = zip(given.get(fact, [None] * len(calls)), right[fact], calls, strict=True)
    came, wanted, arguments = next(v for v in values if not same(v[0], v[1]))
    if isinstance(came, Exception):
        return (f"{message}; " if message else "") + _explain(answer, came)
    if message:
        return message
    if fact == "changed":
        return f"your function changed {', '.join(came)}, which it was given; make new ones"
    shown = ", ".join(map(repr, arguments))
    return f"{fact}{f' for ({shown})' if len(shown) < 100 else ''}: {difference(came, wanted)}"


def _explain(answer: Callable, error: Exception) -> str:
    short = str(error).strip().partition("\n")[0]
    short = f"{type(error).__name__}: {short if len(short) < 200 else short[:200] + ' …'}"
    line = _line_of(answer, error)
    return f"your code raised {short} at: {line}" if line else f"it could not be used ({short})"


def _line_of(answer: Callable, error: Exception) -> str:
    """The learner's own last line before the error, not one of torch or of the check."""
    functions = vars(answer).values() if isinstance(answer, type) else [inspect.unwrap(answer)]
    files = {f.__code__.co_filename for f in functions if hasattr(f, "__code__")}
    lines = [f.line for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return lines[-1] if lines else ""


def variants(function: Callable) -> Callable:
    """`f(part=another)` is then the function with another part, a wrong one; `f()` is as it was."""
    return partial(partial, function)


@contextmanager
def fresh_numbers() -> Iterator[None]:
    """Draw anew at every check, and leave the learner's own random numbers alone."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        seed = new_seed()
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def new_seed() -> int:
    return random.SystemRandom().randrange(2**31)


# --- results -------------------------------------------------------------------------------------


def same(a, b) -> bool:
    """Whether two results say the same: numbers and tensors of any dtype, and what holds them.

    Whole numbers are compared exactly, others up to the rounding of float32. A list is as good as a
    tuple; a numpy array is not as good as a tensor.
    """
    a, b = (x.item() if isinstance(x, Tensor | np.generic) and x.ndim == 0 else x for x in (a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        exact = isinstance(a, int) or isinstance(b, int)
        close = math.isclose(a, b, rel_tol=0 if exact else 1e-4, abs_tol=0 if exact else 1e-6)
        return close or (math.isnan(a) and math.isnan(b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        x, y = (t.detach().cpu().to_dense().double() for t in (a, b))
        return x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, nn.Module):
        return same(_parts(a), _parts(b))
    if isinstance(a, Exception):
        return str(a) == str(b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def _parts(model: nn.Module) -> list:
    modules = [(path, type(module).__name__) for path, module in model.named_modules()]
    return [modules, [p.requires_grad for p in model.parameters()], dict(model.state_dict())]


def difference(came, wanted) -> str:
    """What was expected and what came, in a few words."""
    if isinstance(came, Tensor) and isinstance(wanted, Tensor) and came.shape == wanted.shape:
        off = (came.detach().double() - wanted.detach().double()).abs().max().item()
        return f"the shape {tuple(came.shape)} is right, and the values are off by up to {off:.3g}"
    if isinstance(came, set) and isinstance(wanted, set):
        parts = {"too much": came - wanted, "missing": wanted - came}
        return "; ".join(f"{word}: {', '.join(sorted(p)[:3])}" for word, p in parts.items() if p)
    return f"expected {describe(wanted)}, and {describe(came)} came"


def describe(value) -> str:
    """A value in a few words: its kind, or itself if it is short."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "numpy array"
        return f"a {kind} of shape {tuple(value.shape)}"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(repr(value).split())
    return text if len(text) < 100 else f"{text[:80]} … ({type(value).__name__})"
