"""The checks of notebook 02: a stub, right answers written differently, typical wrong ones."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_lib import LoRALinear
from lora_lib.exercises import layer as exercises


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


def said(capsys, exercise, answer) -> str:
    exercise(answer)
    return capsys.readouterr().out


def stub(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize("name", ["forward", "initialise"])
def test_a_stub_is_not_attempted(capsys, name):
    assert said(capsys, getattr(exercises, name), stub).startswith("Not attempted")


@pytest.mark.parametrize("name", ["first_step", "scaling"])
def test_a_question_without_answer_is_not_attempted(capsys, name):
    assert "Not attempted" in said(capsys, getattr(exercises, name), None)


# --- forward -------------------------------------------------------------------------------------


def small_middle(x, weight, A, B, alpha):
    return x @ weight.T + alpha / A.shape[0] * (x @ A.T) @ B.T


def functional(x, weight, A, B, alpha):
    scaling = alpha / len(A)
    return F.linear(x, weight) + F.linear(F.linear(x, A) * scaling, B)


def materialised(x, weight, A, B, alpha):
    return x @ (weight + alpha / B.shape[1] * B @ A).T


def with_the_library(x, weight, A, B, alpha):
    linear = nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight
    layer = LoRALinear(linear, rank=len(A), alpha=alpha)
    del layer.lora_A, layer.lora_B
    layer.lora_A, layer.lora_B = A, B
    return layer(x)


@pytest.mark.parametrize("answer", [small_middle, functional, materialised, with_the_library])
def test_right_forwards(capsys, answer):
    assert said(capsys, exercises.forward, answer).startswith("Right.")


def in_place(x, weight, A, B, alpha):
    weight += alpha / len(A) * (B @ A).detach()
    return x @ weight.T


def without_gradient(x, weight, A, B, alpha):
    with torch.no_grad():
        return small_middle(x, weight, A, B, alpha)


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda x, W, A, B, alpha: x @ W.T, "frozen layer alone"),
        (lambda x, W, A, B, alpha: alpha / len(A) * x @ A.T @ B.T, "low-rank path alone"),
        (lambda x, W, A, B, alpha: x @ W.T + x @ A.T @ B.T, "not scaled"),
        (lambda x, W, A, B, alpha: x @ W.T + alpha * x @ A.T @ B.T, "forgot to divide"),
        (lambda x, W, A, B, alpha: x @ W.T + len(A) / alpha * x @ A.T @ B.T, "other way up"),
        (
            lambda x, W, A, B, alpha: x @ W.T + alpha / math.sqrt(len(A)) * x @ A.T @ B.T,
            "rsLoRA",
        ),
        (
            lambda x, W, A, B, alpha: alpha / len(A) * (x @ W.T + x @ A.T @ B.T),
            "scaled the frozen path too",
        ),
        (lambda x, W, A, B, alpha: x @ W.T - alpha / len(A) * x @ A.T @ B.T, "subtracted"),
        (lambda x, W, A, B, alpha: x @ W.T + alpha / 10 * x @ A.T @ B.T, "off by up to"),
        (lambda x, W, A, B, alpha: x @ W + x @ A @ B, "shapes do not fit"),
        (lambda x, W, A, B, alpha: x @ A.T, "has shape"),
        (lambda x, W, A, B, alpha: None, "does it end in a return"),
        (in_place, "changed W itself"),
        (without_gradient, "no gradient reaches"),
    ],
)
def test_wrong_forwards_are_diagnosed(capsys, answer, message):
    out = said(capsys, exercises.forward, answer)
    assert out.startswith("Not right yet") and message in out


# --- initialisation ------------------------------------------------------------------------------


def gaussian(d_out, d_in, rank):
    return torch.randn(rank, d_in) / math.sqrt(d_in), torch.zeros(d_out, rank)


def as_the_library(d_out, d_in, rank):
    layer = LoRALinear(nn.Linear(d_in, d_out), rank)
    return layer.lora_A, layer.lora_B


def as_the_lesson(d_out, d_in, rank):
    A = nn.Parameter(0.01 * torch.randn(rank, d_in))
    return [A, nn.Parameter(torch.zeros(d_out, rank))]


@pytest.mark.parametrize("answer", [gaussian, as_the_library, as_the_lesson])
def test_right_initialisations(capsys, answer):
    assert said(capsys, exercises.initialise, answer).startswith("Right.")


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda o, i, r: (torch.zeros(r, i), torch.zeros(o, r)), "both factors are zero"),
        (lambda o, i, r: (torch.zeros(r, i), torch.randn(o, r)), "other way round"),
        (lambda o, i, r: (torch.randn(r, i) / i, torch.randn(o, r)), "before it has learned"),
        (lambda o, i, r: (torch.ones(r, i), torch.zeros(o, r)), "rows of A are equal"),
        (lambda o, i, r: (torch.randn(r, i), torch.zeros(o, r)), "divide by √d_in"),
        (lambda o, i, r: (torch.zeros(o, r), torch.randn(r, i)), "return A first"),
        (lambda o, i, r: (torch.randn(i, r), torch.zeros(r, o)), "A is (rank, d_in)"),
        (lambda o, i, r: torch.randn(r, i), "return two tensors"),
        (lambda o, i, r: (0.0, 0.0), "must be tensors"),
        (lambda o, i, r: None, "returned None"),
    ],
)
def test_wrong_initialisations_are_diagnosed(capsys, answer, message):
    out = said(capsys, exercises.initialise, answer)
    assert out.startswith("Not right yet") and message in out


# --- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, right, fragments",
    [
        ("first_step", "b", {"a": "no property of B", "c": "second step", "d": "both factors"}),
        ("scaling", "b", {"a": "numerator", "c": "divides", "d": "Adam makes the step"}),
    ],
)
def test_questions_name_the_misconception(capsys, name, right, fragments):
    question = getattr(exercises, name)
    assert "Right." in said(capsys, question, right)
    for letter, fragment in fragments.items():
        out = said(capsys, question, letter)
        assert "Not right yet" in out and fragment in out
    assert "is not an option" in said(capsys, question, "z")
