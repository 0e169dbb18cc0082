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
    "You have added ΔW to W by hand. How do you set A and B, so that the outputs stay right at "
    "first and training goes on?",
    {
        "A = 0 and B = 0, and a learning rate ten times as high": "both gradients are exactly "
        "zero, and ten times zero is zero; the cell above measured it",
        "A and B as they were trained": "then ΔW counts twice, in W and beside it, as at λ = 2: "
        "the outputs are wrong from the start",
        "A as it was trained, and B = 0": "One zero is enough. s · B A is zero, so nothing counts "
        "twice, and B's gradient contains A, which is not zero. A newly drawn A does it as well. "
        "Make a new optimizer either way, because Adam's running means belong to the old factors.",
        "A and B drawn at random": "then s · B A is a random change on top of W + ΔW, and the "
        "outputs are wrong from the start",
    },
    right="c",
    hint="B's gradient contains A, and A's contains B. What is the least that you have to set to "
    "zero?",
)

overhead = Choice(
    "05 overhead",
    "You merge an adapter of rank 64 instead of one of rank 8. What does that change in the time "
    "of a forward pass, once merged?",
    {
        "Nothing.": "B A has the shape of W at every rank, so the merged layer is one product of "
        "W's own size. Unmerged, a larger rank does cost more.",
        "It takes eight times as long.": "not even the unmerged path alone does, and after merging "
        "there is no path: how many products does a merged layer compute?",
        "It adds a little, because the file is eight times as large.": "the file is read once; "
        "what counts afterwards is the shape of W + s · B A",
        "Nothing, but only if A and B are set to zero afterwards.": "a merged layer does not "
        "compute with A and B at all, whatever they hold; and products with zeros would take as "
        "long as others",
    },
    right="a",
    hint="What is the shape of W + s · B A at rank 8, and what at rank 64?",
)

undo = Choice(
    "05 undo",
    "You merged into W in bf16, by hand, and kept no copy of W. You still have A and B. Which way "
    "gives W back to the bit?",
    {
        "Subtract s · B A in bf16, as you added it.": "each sum is rounded: 1 + 0.003 − 0.003 was "
        "0.9961 above",
        "Turn W into float32 first, and then subtract s · B A.": "the digits were lost when the "
        "sum was rounded to bf16; no later subtraction knows what they were",
        "Add the adapter once more, with −α for α.": "that is subtracting under another name, "
        "with the same rounding",
        "None of these: load the base again from its file.": "Rounding cannot be undone, only "
        "avoided: keep a copy, in memory or in a file. `unmerge_lora_weights` puts back a copy "
        "that it kept.",
    },
    right="d",
    hint="Where do the digits go that bf16 has no room for?",
)
