"""Notebook 05."""

import torch


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


RIGHT = {"merge": [plain, by_einsum]}

WRONG = {
    "merge": {
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
}
