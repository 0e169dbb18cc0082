"""The checks of notebook 01: right answers pass, wrong ones get a message of their own."""

import pytest
import torch

from lora_lib.exercises import rank


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


def stub(values):
    raise NotImplementedError


def below(values):
    return int(((values**2).cumsum(0) / (values**2).sum() < 0.9).sum())


def by_counting(values):
    return below(values) + 1


def by_loop(values):
    total, held = sum(v * v for v in values.tolist()), 0.0
    for k, value in enumerate(values.tolist(), start=1):
        held += value**2
        if held >= 0.9 * total:
            return k


def as_a_tensor(values):
    energy = values.square().cumsum(0) / values.square().sum()
    return torch.searchsorted(energy, torch.tensor(0.9, dtype=torch.float64)) + 1


WRONG = {
    "square the singular values": lambda values: (
        int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    ),
    "one too few": below,
    "one too many": lambda values: by_counting(values) + 1,
    "you compare each value with the largest": lambda values: (values > 0.1 * values[0]).sum(),
    "a whole number": lambda values: by_counting(values) / len(values),
    "and you returned 1": lambda values: 1,
    "your code raised AttributeError": lambda values: values.k90(),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("answer", [by_counting, by_loop, as_a_tensor])
def test_right_answers_pass(answer, seed, capsys):
    torch.manual_seed(seed)
    rank.k90(answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_answer_gets_its_own_message(message, seed, capsys):
    torch.manual_seed(seed)
    rank.k90(WRONG[message])
    out = capsys.readouterr().out
    assert out.startswith("Not right yet") and message in out


@pytest.mark.parametrize("answer", [stub, None, lambda values: None])
def test_a_stub_was_not_attempted(answer, capsys):
    rank.k90(answer)
    assert capsys.readouterr().out.startswith("Not attempted")


def test_the_choice_names_the_misconception(capsys):
    rank.half_of_the_directions(None)
    assert "Not attempted" in capsys.readouterr().out
    for letter, fragment in {
        "a": "what pure noise shows",
        "b": "Right.",
        "c": "a question about training",
        "d": "not exactly zero",
    }.items():
        rank.half_of_the_directions(letter)
        answer = capsys.readouterr().out.splitlines()[-1]
        assert fragment in answer
        assert answer.startswith("Right." if letter == "b" else "Not right yet")
