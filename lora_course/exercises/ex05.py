"""Checks of the exercises in notebook 05."""

from collections.abc import Callable

import torch
from torch import Tensor

from lora_course.exercises.checker import Choice, Exercise, Wrong


def _test_merge(merged_weight: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
    # A square layer first: there a transposed product has the right shape and the wrong values.
    for d_out, d_in, rank, alpha in ((12, 12, 3, 10.5), (14, 6, 4, 2.0), (5, 9, 2, 7.0)):
        weight, a, b = torch.randn(d_out, d_in), torch.randn(rank, d_in), torch.randn(d_out, rank)
        before = weight.clone()
        try:
            result = merged_weight(weight, a.clone(), b.clone(), alpha)
        except NotImplementedError:
            raise
        except RuntimeError as error:
            raise Wrong(
                f"the shapes do not fit: W is {(d_out, d_in)}, A is {(rank, d_in)}, B is "
                f"{(d_out, rank)}; only one order of B and A gives the shape of W ({error})"
            ) from error
        _compare(result, before, weight, a, b, alpha)


def _compare(result, before: Tensor, weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    if not isinstance(result, Tensor):
        raise Wrong(f"it returns {type(result).__name__}, not a tensor; is the `return` there?")
    if not torch.equal(weight, before):
        raise Wrong(
            "W itself was changed (an in-place operation such as W += …); the caller then has no "
            "way back to the base. Return a new tensor"
        )
    if result.shape != before.shape:
        raise Wrong(
            f"the result has shape {tuple(result.shape)}, but a merged weight has the shape of W, "
            f"{tuple(before.shape)}; B @ A has it, A @ B has not"
        )
    rank, product = len(a), b @ a
    scale = alpha / rank

    def near(other: Tensor) -> bool:
        return torch.allclose(result, other, rtol=1e-4, atol=1e-4)

    if near(before + scale * product):
        return
    mistakes = [
        (before + product, "the scaling is left out: ΔW is (α / r) · B A, and here α / r is not 1"),
        (before + alpha * product, "B A is multiplied by α instead of α / r; r is A.shape[0]"),
        (before + product / scale, "the scaling is upside down: it is α / r, not r / α"),
        (before + alpha / a.shape[1] * product, "α is divided by A.shape[1], which is d_in; the "
         "rank r is the other axis, A.shape[0]"),
        (scale * product, "this is ΔW alone; the base weight W is missing from the sum"),
        (before - scale * product, "ΔW is subtracted; merging adds it"),
    ]  # fmt: skip
    if before.shape[0] == before.shape[1]:
        mistakes.append(
            (before + scale * product.T, "ΔW is transposed: B A, not (B A)ᵀ = Aᵀ Bᵀ. On a square "
             "layer PyTorch cannot notice")
        )  # fmt: skip
    for wrong, message in mistakes:
        if near(wrong):
            raise Wrong(message)
    raise Wrong(
        "the values differ from W + (α / r) · B A by up to "
        f"{(result - before - scale * product).abs().max():.3g}"
    )


merge = Exercise(
    "05 merge",
    _test_merge,
    contract="merged_weight(W, A, B, alpha) returns a tensor of W's shape.",
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
        "a": "Training starts afresh from the merged model, as after a new injection.",
        "b": "Nothing: both gradients are zero, at this step and all later ones.",
        "c": "It is stuck for one step only, as A is after a normal start.",
        "d": "It works with a higher learning rate; the gradients are merely small.",
    },
    "b",
    why="A's gradient carries a factor B and B's a factor A, so zero meets zero; a fresh start "
    "needs B = 0, a redrawn A and an optimizer with empty state.",
    misconceptions={
        "a": "a new injection sets only B to zero; A is random, and B's gradient needs it. Look at "
        "the table of gradients above",
        "c": "after a normal start B gets a gradient at step one, because A is not zero; here "
        "neither factor ever moves, so nothing changes at step two",
        "d": "the table above shows zeros, not small numbers; any learning rate times zero is zero",
    },
)

overhead = Choice(
    "05 overhead",
    "“LoRA adds no time at inference.” When does that hold?",
    {
        "a": "Always: the factors are tiny beside W.",
        "b": "Once A and B are set to zero after merging.",
        "c": "Once merged: W + ΔW is all that is used.",
        "d": "Whenever the rank is at most 8.",
    },
    "c",
    why="Merged, the layer is one matrix product of the base's size; unmerged, two more small "
    "products run in every adapted layer, whatever the factors hold.",
    misconceptions={
        "a": "few parameters are not few operations: each small product is a call of its own, and "
        "the times above show it",
        "b": "products with zeros take as long as products with other numbers; what counts is "
        "whether they are computed",
        "d": "the two extra products run at every rank; a smaller one only makes them thinner",
    },
)

undo = Choice(
    "05 undo",
    "A server keeps one base in bf16 and swaps adapters all day by W ← W + ΔW and W ← W − ΔW. "
    "Which statement is true?",
    {
        "a": "Subtraction undoes addition, so the base is what it was.",
        "b": "In float32 this is exact; only bf16 rounds.",
        "c": "Each swap can leave rounding in W; keep W and put it back.",
        "d": "The error only matters while training, since inference rounds anyway.",
    },
    "c",
    why="Floating-point addition rounds, so (W + ΔW) − ΔW need not be W; a kept copy is the very "
    "bits.",
    misconceptions={
        "a": "that holds for real numbers, not for floating-point ones: count the weights that "
        "differ in the table above",
        "b": "float32 rounds as well, only later in the digits: the table above counts weights "
        "that differ in float32 too",
        "d": "the figure above shows an error that grows with the swaps, and every later adapter "
        "is added to the damaged base",
    },
)
