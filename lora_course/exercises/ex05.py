"""Exercises of notebook 05: merging, and three questions."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lora_course.exercises.checker import Choice, Exercise


def reference_merge(W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    return W + alpha / len(A) * B @ A


def draw_merge() -> Iterator[tuple]:
    """A square layer first: there a transposed product has the right shape and wrong values."""
    for d_out, d_in, rank, alpha in ((12, 12, 3, 10.5), (14, 6, 4, 2.0), (5, 9, 2, 7.0)):
        yield torch.randn(d_out, d_in), torch.randn(rank, d_in), torch.randn(d_out, rank), alpha


def mixing(weights: Callable[[float, int, int, int], tuple[float, float]]) -> Callable:
    """A merge that adds W and B A with `weights`, of (α, r, d_in, d_out)."""

    def wrong(W, A, B, alpha):
        base, change = weights(alpha, *A.shape, len(B))
        return base * W + change * B @ A

    return wrong


def in_place(W, A, B, alpha):
    W += alpha / len(A) * B @ A
    return W


merge = Exercise(
    "05 merge",
    reference_merge,
    draw_merge,
    mistakes={
        "the shapes do not fit: A is (r, d_in), B is (d_out, r), and only B @ A has W's shape": (
            lambda W, A, B, alpha: W + alpha / len(A) * A @ B
        ),
        "ΔW is B A, not (B A)ᵀ = Aᵀ Bᵀ; only a square W lets that pass": (
            lambda W, A, B, alpha: W + alpha / len(A) * A.T @ B.T
        ),
        "W itself was changed, as W += … does, and the caller has no way back to the base; return "
        "a new tensor": in_place,
        "B A is not scaled; ΔW is (α / r) · B A": mixing(lambda a, r, i, o: (1, 1)),
        "B A is multiplied by α alone; divide by r = A.shape[0]": mixing(lambda a, r, i, o: (1, a)),
        "the scaling is upside down; it is α / r": mixing(lambda a, r, i, o: (1, r / a)),
        "α is divided by √r, as rsLoRA does; here it is r": (
            mixing(lambda a, r, i, o: (1, a / r**0.5))
        ),
        "α is divided by d_in; the rank is A.shape[0]": mixing(lambda a, r, i, o: (1, a / i)),
        "α is divided by d_out; the rank is B.shape[1]": mixing(lambda a, r, i, o: (1, a / o)),
        "the scaling is applied twice": mixing(lambda a, r, i, o: (1, (a / r) ** 2)),
        "ΔW is added twice, as by a second merge": mixing(lambda a, r, i, o: (1, 2 * a / r)),
        "W is multiplied by the change; the change is added": (
            lambda W, A, B, alpha: W * (alpha / len(A) * B @ A)
        ),
        "ΔW is subtracted; merging adds it": mixing(lambda a, r, i, o: (1, -a / r)),
        "this is ΔW alone; the base weight W is missing": mixing(lambda a, r, i, o: (0, a / r)),
        "W is scaled too; α / r is for B A alone": mixing(lambda a, r, i, o: (a / r, a / r)),
    },
    why="One matrix of W's own shape now holds both, so the forward pass costs what the base's "
    "does; and because W was left alone, there is a way back.",
    hints=[
        "The rank is the axis that A and B share: A is (r, d_in), B is (d_out, r).",
        "Which of A @ B and B @ A has the shape of W? Multiply that by α / r.",
        "return W + (alpha / A.shape[0]) * (… @ …): a sum makes a new tensor, += would not.",
    ],
)

zeroing = Choice(
    "05 zeroing",
    "You merge an adapter, set A = 0 and B = 0 so that nothing is added twice, and train on. "
    "What happens?",
    {
        "Training starts afresh from the merged model, as after a new injection.": "a new "
        "injection sets only B to zero; A is random, and B's gradient needs it. Look at the table "
        "of gradients above",
        "It is stuck for one step only, as A is after a normal start.": "after a normal start B "
        "gets a gradient at step one, because A is not zero; here neither factor ever moves, so "
        "nothing changes at step two",
        "It works with a higher learning rate; the gradients are merely small.": "the table above "
        "shows zeros, not small numbers; any learning rate times zero is zero",
        "Nothing: both gradients are zero, at this step and all later ones.": "A's gradient "
        "carries a factor B and B's a factor A, so zero meets zero; a fresh start needs B = 0, a "
        "redrawn A and an optimizer with empty state.",
    },
    right="d",
    hint="Put A = 0 and B = 0 into both gradients, s G Aᵀ for B and s Bᵀ G for A.",
)

overhead = Choice(
    "05 overhead",
    "“LoRA adds no time at inference.” When does that hold?",
    {
        "Always: the factors are tiny beside W.": "few parameters are not few operations: each "
        "small product is a call of its own, and the times above show it",
        "Once A and B are set to zero after merging.": "products with zeros take as long as "
        "products with other numbers; what counts is whether they are computed",
        "Once merged: W + ΔW is all that is used.": "Merged, the layer is one matrix product of "
        "the base's size; unmerged, two more small products run in every adapted layer, whatever "
        "the factors hold.",
        "Whenever the rank is at most 8.": "the two extra products run at every rank; a smaller "
        "one only makes them thinner",
    },
    right="c",
    hint="Count the matrix products that one adapted layer computes, in each of the four cases.",
)

undo = Choice(
    "05 undo",
    "A server keeps one base in bf16 and swaps adapters all day by W ← W + ΔW and W ← W − ΔW. "
    "Which statement is true?",
    {
        "Subtraction undoes addition, so the base is what it was.": "that holds for real numbers, "
        "not for floating-point ones: count the weights that differ in the table above",
        "In float32 this is exact; only bf16 rounds.": "float32 rounds as well, only later in the "
        "digits: the table above counts weights that differ in float32 too",
        "Each swap can leave rounding in W; keep W and put it back.": "Floating-point addition "
        "rounds, so (W + ΔW) − ΔW need not be W; a kept copy has every bit.",
        "The error only matters while training, since inference rounds anyway.": "the figure above "
        "shows an error that grows with the swaps, and every later adapter is added to the damaged "
        "base",
    },
    right="c",
    hint="The table above counts the weights that differ after one swap, in bf16 and in float32.",
)
