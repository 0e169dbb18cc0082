"""Checks for notebook 02: a forward, an initialisation, and two questions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lora_course.exercises.checker import Choice, Exercise, Wrong

# --- the forward ---------------------------------------------------------------------------------


def _test_forward(answer: Callable) -> None:
    """On fresh numbers, with α / r away from 1, 2 and 1 / √r, and d_in ≠ d_out."""
    d_in, d_out, rank, alpha = 10, 7, 3, 15.0
    x = torch.randn(4, 5, d_in)
    weight = torch.randn(d_out, d_in)
    A = torch.randn(rank, d_in, requires_grad=True)
    B = torch.randn(d_out, rank, requires_grad=True)
    before = weight.clone()
    given = _call_forward(answer, x.clone(), weight, A, B, alpha)
    if not torch.equal(weight, before):
        raise Wrong(
            "your forward changed W itself, so every further call adds the change once more; "
            "W is frozen: add to its output, not to it"
        )
    base = x @ weight.T
    path = x @ A.T @ B.T
    _diagnose_forward(given, base, path, rank, alpha)
    if not (given.requires_grad and _reaches(given, A) and _reaches(given, B)):
        raise Wrong(
            "the numbers are right, but no gradient reaches A and B, so they could never train; "
            "leave out torch.no_grad, .detach() and .data"
        )


def _call_forward(answer: Callable, x, weight, A, B, alpha) -> Tensor:
    try:
        given = answer(x, weight, A, B, alpha)
    except RuntimeError as error:
        if "shape" not in str(error) and "size" not in str(error):
            raise
        raise Wrong(
            f"the shapes do not fit ({error}); x is {tuple(x.shape)}, W {tuple(weight.shape)}, "
            f"A {tuple(A.shape)}, B {tuple(B.shape)}, and all three stand transposed behind x: "
            "x @ A.T has the rank as its last size"
        ) from error
    if not isinstance(given, Tensor):
        raise Wrong(
            f"your forward returned {type(given).__name__}, not a tensor; does it end in a return?"
        )
    if given.shape != (*x.shape[:-1], weight.shape[0]):
        raise Wrong(
            f"the output has shape {tuple(given.shape)}; it must be (…, d_out), here "
            f"{(*x.shape[:-1], weight.shape[0])}"
        )
    return given


def _diagnose_forward(given: Tensor, base: Tensor, path: Tensor, rank: int, alpha: float) -> None:
    scaling = alpha / rank
    if _close(given, base + scaling * path):
        return
    wrong = {
        "that is the frozen layer alone; the low-rank path x Aᵀ Bᵀ has to be added to it": base,
        "that is the low-rank path alone; the frozen path x Wᵀ belongs to the output as well": (
            scaling * path
        ),
        "the path is there, but not scaled: multiply it by α / r, where r is A.shape[0]": (
            base + path
        ),
        "you multiplied by α and forgot to divide by the rank r = A.shape[0]": base + alpha * path,
        "you multiplied by r / α; the scaling is the other way up, α / r": base
        + rank / alpha * path,
        "you divided α by √r, which is rsLoRA; here the scaling is α / r": (
            base + alpha / math.sqrt(rank) * path
        ),
        "you scaled the frozen path too; α / r belongs to the low-rank path alone": (
            scaling * (base + path)
        ),
        "you subtracted the change; it is added: W x + (α / r) B A x": base - scaling * path,
    }
    for message, output in wrong.items():
        if _close(given, output):
            raise Wrong(message)
    difference = (given - base - scaling * path).abs().max().item()
    raise Wrong(
        f"the output is off by up to {difference:.3g}; compare it, piece by piece, with "
        "x Wᵀ + (α / r) x Aᵀ Bᵀ, and take r from A.shape[0], d_in from nothing"
    )


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.detach(), b.detach(), rtol=1e-3, atol=1e-3)


def _reaches(output: Tensor, leaf: Tensor) -> bool:
    (gradient,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True, allow_unused=True)
    return gradient is not None and gradient.any().item()


forward = Exercise(
    "02 forward",
    _test_forward,
    contract="forward(x, weight, A, B, alpha) returns the layer's output, a tensor (…, d_out).",
    why="This is the whole of LoRALinear.forward but for merging and dropout; gradients reach A "
    "and B, and nothing of the size of W is ever built.",
    hints=[
        "Two paths are added: what the frozen layer gives, and the low-rank path.",
        "The low-rank path first makes the input small, x @ A.T with shape (…, r), and then wide "
        "again with B.T.",
        "Scale the low-rank path alone, by alpha / A.shape[0].",
    ],
)


# --- the initialisation --------------------------------------------------------------------------


def _test_initialise(answer: Callable) -> None:
    d_out, d_in, rank = 48, 512, 4
    A, B = _factors(answer(d_out, d_in, rank), d_out, d_in, rank)
    a_zero, b_zero = not A.any(), not B.any()
    if a_zero and b_zero:
        raise Wrong(
            "both factors are zero: the output is the base model's, but A's gradient contains B "
            "and B's contains A, so both stay zero for ever; start one of them at random"
        )
    if a_zero:
        raise Wrong(
            "this starts at the base model and would train, but it is the other way round from "
            "the paper and from every library that reads your adapters: A random, B zero"
        )
    if not b_zero:
        raise Wrong(
            "with both factors different from zero, B A is not zero: the layer changes the model "
            "before it has learned anything; make B zero"
        )
    if torch.linalg.matrix_rank(A.double()) < rank:
        raise Wrong(
            "the rows of A are equal or depend on each other; equal rows get equal gradients, so "
            f"the change could never use all of its rank {rank}: draw every entry at random"
        )
    spread = A.std().item() * math.sqrt(d_in)
    if spread > 8:
        raise Wrong(
            f"the entries of A are so large that A x is about {spread:.0f} times as large as x's "
            "entries (a sum over d_in of them); divide by √d_in, as kaiming_uniform_ does"
        )


def _factors(given, d_out: int, d_in: int, rank: int) -> tuple[Tensor, Tensor]:
    if given is None:
        raise Wrong("your function returned None; end it with return A, B")
    if not (isinstance(given, tuple | list) and len(given) == 2):
        raise Wrong("return two tensors, A and B")
    A, B = given
    if not (isinstance(A, Tensor) and isinstance(B, Tensor)):
        raise Wrong("A and B must be tensors (nn.Parameter is one too)")
    shapes = tuple(A.shape), tuple(B.shape)
    if shapes == ((d_out, rank), (rank, d_in)):
        raise Wrong("these are B and A; return A first, with shape (rank, d_in)")
    if shapes != ((rank, d_in), (d_out, rank)):
        raise Wrong(
            f"A has shape {shapes[0]} and B {shapes[1]}; for d_out {d_out}, d_in {d_in} and rank "
            f"{rank}, A is (rank, d_in) = {(rank, d_in)} and B (d_out, rank) = {(d_out, rank)}: "
            "A makes the input small, B makes it wide again"
        )
    return A.detach(), B.detach()


initialise = Exercise(
    "02 initialise",
    _test_initialise,
    contract="initialise(d_out, d_in, rank) returns A, (rank, d_in), and B, (d_out, rank).",
    why="B = 0 makes the start an exact no-op, and a random A of full rank lets B's gradient "
    "through on the first step.",
    hints=[
        "The product B A has to be zero, and yet one factor must let the gradient of the other "
        "through.",
        "B is torch.zeros(d_out, rank). A needs a different number in every entry.",
        "A = torch.randn(rank, d_in) / math.sqrt(d_in) has a sensible size.",
    ],
)


# --- two questions -------------------------------------------------------------------------------

first_step = Choice(
    "02 first_step",
    "A colleague starts the other way round, A zero and B random, and takes one step of plain SGD. "
    "After one optimizer step, which of A, B changed?",
    {
        "a": "only B, as always on the first step",
        "b": "only A",
        "c": "A and B",
        "d": "neither: with a factor at zero nothing moves",
    },
    right="b",
    why="A's gradient is s Bᵀ G, which a random B lets through; B's is s G Aᵀ, zero while A is: "
    "the factor that starts at zero is the one that moves first.",
    misconceptions={
        "a": "that holds for the usual start; it is no property of B. Look at the formulas: B's "
        "gradient is s G Aᵀ, and here A is the one that is zero",
        "c": "B's gradient is s G Aᵀ, and A is zero on this step; B moves from the second step on",
        "d": "that needs both factors at zero. Each gradient contains the other factor: A's, "
        "s Bᵀ G, contains B, which is random here",
    },
)

scaling = Choice(
    "02 scaling",
    "You raise the rank from r = 8 to r = 32 and leave α = 16. What happens to the factor in front "
    "of B A?",
    {
        "a": "it stays 2: α fixes it",
        "b": "it falls from 2 to 0.5",
        "c": "it rises from 2 to 8, since the rank is four times as large",
        "d": "it changes, but Adam takes no notice: it rescales every gradient anyway",
    },
    right="b",
    why="The factor is α / r; a rank raised at a fixed α is also a change four times weaker, so "
    "two ranks compared at one α and one learning rate differ in more than rank.",
    misconceptions={
        "a": "α is the numerator alone; the factor is α / r, 16 / 8 and then 16 / 32",
        "c": "the rank divides, it does not multiply: 16 / 8 = 2 and then 16 / 32",
        "d": "Adam makes the step of B independent of the gradient's size, but the output still "
        "gets that step multiplied by α / r, as the last table shows",
    },
)
