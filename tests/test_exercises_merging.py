"""The checks of notebook 05: right answers pass, wrong ones get a message of their own."""

import pytest
import torch

from lora_lib.exercises import merging


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


def stub(W, A, B, alpha):
    raise NotImplementedError


def plain(W, A, B, alpha):
    return W + (alpha / A.shape[0]) * B @ A


def by_einsum(W, A, B, alpha):
    total = W.clone()
    total += torch.einsum("or,ri->oi", B, A).mul(alpha).div(B.shape[1])
    return total


def in_place(W, A, B, alpha):
    W += (alpha / len(A)) * B @ A
    return W


def no_return(W, A, B, alpha):
    W + (alpha / len(A)) * B @ A


WRONG = {
    "scaling is left out": lambda W, A, B, alpha: W + B @ A,
    "α instead of α / r": lambda W, A, B, alpha: W + alpha * B @ A,
    "upside down": lambda W, A, B, alpha: W + len(A) / alpha * B @ A,
    "which is d_in": lambda W, A, B, alpha: W + alpha / A.shape[1] * B @ A,
    "ΔW alone": lambda W, A, B, alpha: alpha / len(A) * B @ A,
    "subtracted": lambda W, A, B, alpha: W - alpha / len(A) * B @ A,
    "transposed": lambda W, A, B, alpha: W + alpha / len(A) * A.T @ B.T,
    "shapes do not fit": lambda W, A, B, alpha: W + alpha / len(A) * A @ B,
    "has shape": lambda W, A, B, alpha: alpha / len(A) * A @ B,
    "W itself was changed": in_place,
    "is the `return` there": no_return,
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("answer", [plain, by_einsum])
def test_right_answers_pass(answer, seed, capsys):
    torch.manual_seed(seed)
    merging.merge(answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_answer_gets_its_own_message(message, seed, capsys):
    torch.manual_seed(seed)
    merging.merge(WRONG[message])
    out = capsys.readouterr().out
    assert out.startswith("Not right yet") and message in out


def test_the_untouched_stub_was_not_attempted(capsys):
    merging.merge(stub)
    merging.merge()
    assert capsys.readouterr().out.count("Not attempted") == 2


@pytest.mark.parametrize("name, right", [("zeroing", "b"), ("overhead", "c"), ("undo", "c")])
def test_choices(name, right, capsys):
    choice = getattr(merging, name)
    choice(None)
    assert "Not attempted" in capsys.readouterr().out
    messages = set()
    for letter in choice.options:
        choice(letter)
        answer = capsys.readouterr().out.strip().splitlines()[-1]
        assert answer.startswith("Right." if letter == right else "Not right yet")
        messages.add(answer)
    assert len(messages) == len(choice.options)
