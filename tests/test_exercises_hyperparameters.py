"""The checks of notebook 06: right answers pass, wrong ones get a message of their own."""

import math
import random

import pytest

from lora_lib.exercises import hyperparameters


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


def bits(row, split="validation"):
    return row[split]["bits"]


def finite(rows):
    return [row for row in rows if math.isfinite(bits(row))]


def by_min(rows):
    return min(finite(rows), key=bits)["lr"]


def by_loop(rows):
    best, rate = float("inf"), None
    for row in rows:
        if bits(row) < best:  # false for nan
            best, rate = bits(row), row["lr"]
    return rate


WRONG_CHOICE = {
    "picks by the test score": lambda rows: min(finite(rows), key=lambda r: bits(r, "test"))["lr"],
    "most bits": lambda rows: max(finite(rows), key=bits)["lr"],
    "largest rate": lambda rows: max(row["lr"] for row in rows),
    "diverged": lambda rows: min(rows, key=bits)["lr"],
    "the whole row": lambda rows: min(finite(rows), key=bits),
    "it returns the bits": lambda rows: min(bits(row) for row in finite(rows)),
    "is the `return` there": lambda rows: None,
    "not the learning rate of any": lambda rows: 0.123,
}

WRONG_COUNT = {
    "whole matrices": lambda shapes, r: sum(o * i for o, i in shapes),
    "whole matrix by r": lambda shapes, r: r * sum(o * i for o, i in shapes),
    "counts A alone": lambda shapes, r: r * sum(i for _, i in shapes),
    "counts B alone": lambda shapes, r: r * sum(o for o, _ in shapes),
    "d_in on both sides": lambda shapes, r: 2 * r * sum(i for _, i in shapes),
    "d_out on both sides": lambda shapes, r: 2 * r * sum(o for o, _ in shapes),
    "rank is left out": lambda shapes, r: sum(o + i for o, i in shapes),
    "only the first": lambda shapes, r: r * sum(shapes[0]),
    "only the last": lambda shapes, r: r * sum(shapes[-1]),
    "not a number": lambda shapes, r: None,
}


def count_by_loop(shapes, rank):
    total = 0
    for d_out, d_in in shapes:
        total += rank * d_in
        total += d_out * rank
    return total


def stub(*_):
    raise NotImplementedError


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("answer", [by_min, by_loop])
def test_right_choices_of_a_rate_pass(answer, seed, capsys):
    random.seed(seed)
    hyperparameters.choose_rate(answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("message", WRONG_CHOICE)
def test_a_wrong_choice_gets_its_own_message(message, seed, capsys):
    random.seed(seed)
    hyperparameters.choose_rate(WRONG_CHOICE[message])
    out = capsys.readouterr().out
    assert out.startswith("Not right yet") and message in out


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "answer", [count_by_loop, lambda shapes, rank: sum(rank * sum(shape) for shape in shapes)]
)
def test_right_counts_pass(answer, seed, capsys):
    random.seed(seed)
    hyperparameters.lora_parameters(answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("message", WRONG_COUNT)
def test_a_wrong_count_gets_its_own_message(message, seed, capsys):
    random.seed(seed)
    hyperparameters.lora_parameters(WRONG_COUNT[message])
    out = capsys.readouterr().out
    assert out.startswith("Not right yet") and message in out


@pytest.mark.parametrize("name", ["choose_rate", "lora_parameters"])
def test_the_untouched_stub_was_not_attempted(name, capsys):
    getattr(hyperparameters, name)(stub)
    getattr(hyperparameters, name)()
    assert capsys.readouterr().out.count("Not attempted") == 2


@pytest.mark.parametrize(
    "name, right", [("alpha", "b"), ("memory", "b"), ("single_seed", "c"), ("one_rate", "b")]
)
def test_choices(name, right, capsys):
    choice = getattr(hyperparameters, name)
    choice(None)
    assert "Not attempted" in capsys.readouterr().out
    messages = set()
    for letter in choice.options:
        choice(letter)
        answer = capsys.readouterr().out.strip().splitlines()[-1]
        assert answer.startswith("Right." if letter == right else "Not right yet")
        messages.add(answer)
    assert len(messages) == len(choice.options)
