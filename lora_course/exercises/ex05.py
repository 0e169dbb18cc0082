"""Exercises of notebook 05: merging, and three questions."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_course.exercises.checker import Exercise, variants
from lora_course.exercises.choices import Choice
from lora_course.exercises.factors import WRONG_SUMS, right_sum


@variants
def merge_with(W, A, B, alpha, total=right_sum) -> Tensor:
    return total(W, B @ A, alpha / len(A), len(A))


def draw_merge() -> Iterator[tuple]:
    """A square layer first: there a transposed product has the right shape and wrong values."""
    for d_out, d_in, rank, alpha in ((12, 12, 3, 10.5), (14, 6, 4, 2.0), (5, 9, 2, 7.0)):
        yield torch.randn(d_out, d_in), torch.randn(rank, d_in), torch.randn(d_out, rank), alpha


merge = Exercise(
    "05 merge",
    merge_with(),
    draw_merge,
    mistakes={message: merge_with(total=total) for message, total in WRONG_SUMS.items()}
    | {
        "the shapes do not fit: A is (r, d_in), B is (d_out, r), and only B @ A has W's shape": (
            lambda W, A, B, alpha: W + alpha / len(A) * A @ B
        ),
        "ΔW is B A, not (B A)ᵀ = Aᵀ Bᵀ; only a square W lets that pass": (
            lambda W, A, B, alpha: W + alpha / len(A) * A.T @ B.T
        ),
        "W itself was changed, as W += … does, and the caller has no way back to the base; return "
        "a new tensor": lambda W, A, B, alpha: W.add_(alpha / len(A) * B @ A),
        "α is divided by d_in; the rank is A.shape[0]": (
            lambda W, A, B, alpha: W + alpha / A.shape[1] * B @ A
        ),
        "α is divided by d_out; the rank is B.shape[1]": (
            lambda W, A, B, alpha: W + alpha / len(B) * B @ A
        ),
        "ΔW is added twice, as by a second merge": merge_with(
            total=lambda W, BA, s, r: W + 2 * s * BA
        ),
        "W is multiplied by the change; the change is added": (
            merge_with(total=lambda W, BA, s, r: W * s * BA)
        ),
    },
)

zeroing = Choice("05 zeroing")
overhead = Choice("05 overhead")
undo = Choice("05 undo")
