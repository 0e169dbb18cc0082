"""Notebook 02."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lora_lib import LoRALinear

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


def in_place(x, weight, A, B, alpha):
    weight += alpha / len(A) * (B @ A).detach()
    return x @ weight.T


def without_gradient(x, weight, A, B, alpha):
    with torch.no_grad():
        return small_middle(x, weight, A, B, alpha)


# --- initialisation ------------------------------------------------------------------------------


def gaussian(d_out, d_in, rank):
    return torch.randn(rank, d_in) / math.sqrt(d_in), torch.zeros(d_out, rank)


def as_the_library(d_out, d_in, rank):
    layer = LoRALinear(nn.Linear(d_in, d_out), rank)
    return layer.lora_A, layer.lora_B


def as_the_lesson(d_out, d_in, rank):
    A = nn.Parameter(0.01 * torch.randn(rank, d_in))
    return [A, nn.Parameter(torch.zeros(d_out, rank))]


RIGHT = {
    "forward": [small_middle, functional, materialised, with_the_library],
    "initialise": [gaussian, as_the_library, as_the_lesson],
}

WRONG = {
    "forward": {
        "frozen layer alone": lambda x, W, A, B, alpha: x @ W.T,
        "low-rank path alone": lambda x, W, A, B, alpha: alpha / len(A) * x @ A.T @ B.T,
        "not scaled": lambda x, W, A, B, alpha: x @ W.T + x @ A.T @ B.T,
        "forgot to divide": lambda x, W, A, B, alpha: x @ W.T + alpha * x @ A.T @ B.T,
        "other way up": lambda x, W, A, B, alpha: x @ W.T + len(A) / alpha * x @ A.T @ B.T,
        "rsLoRA": lambda x, W, A, B, alpha: x @ W.T + alpha / math.sqrt(len(A)) * x @ A.T @ B.T,
        "scaled the frozen path too": lambda x, W, A, B, alpha: (
            alpha / len(A) * (x @ W.T + x @ A.T @ B.T)
        ),
        "subtracted": lambda x, W, A, B, alpha: x @ W.T - alpha / len(A) * x @ A.T @ B.T,
        "off by up to": lambda x, W, A, B, alpha: x @ W.T + alpha / 10 * x @ A.T @ B.T,
        "shapes do not fit": lambda x, W, A, B, alpha: x @ W + x @ A @ B,
        "has shape": lambda x, W, A, B, alpha: x @ A.T,
        "does it end in a return": lambda x, W, A, B, alpha: None,
        "changed W itself": in_place,
        "no gradient reaches": without_gradient,
    },
    "initialise": {
        "both factors are zero": lambda o, i, r: (torch.zeros(r, i), torch.zeros(o, r)),
        "other way round": lambda o, i, r: (torch.zeros(r, i), torch.randn(o, r)),
        "before it has learned": lambda o, i, r: (torch.randn(r, i) / i, torch.randn(o, r)),
        "rows of A are equal": lambda o, i, r: (torch.ones(r, i), torch.zeros(o, r)),
        "divide by √d_in": lambda o, i, r: (torch.randn(r, i), torch.zeros(o, r)),
        "return A first": lambda o, i, r: (torch.zeros(o, r), torch.randn(r, i)),
        "A is (rank, d_in)": lambda o, i, r: (torch.randn(i, r), torch.zeros(r, o)),
        "return two tensors": lambda o, i, r: torch.randn(r, i),
        "must be tensors": lambda o, i, r: (0.0, 0.0),
        "returned None": lambda o, i, r: None,
    },
}
