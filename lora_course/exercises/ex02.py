"""Exercises of notebook 02: TinyLoRA, its two halves alone, and two questions."""

from collections.abc import Callable, Iterator
from functools import partial
from operator import truediv

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Exercise, NotAttempted, variants
from lora_course.exercises.choices import Choice
from lora_course.exercises.factors import WRONG_SUMS, Builds, right_sum
from lora_course.tiny_lora import TinyLoRA

# --- the forward ---------------------------------------------------------------------------------


@variants
def forward_with(x, weight, A, B, alpha, total=right_sum) -> Tensor:
    return total(x @ weight.T, x @ A.T @ B.T, alpha / len(A), len(A))


def draw_forward() -> Iterator[tuple]:
    """α / r is neither 1 nor 2 nor 1 / √r. No product but B A is as large as W: see Builds."""
    for shape, d_in, d_out, rank, alpha in (((4, 5), 11, 7, 3, 15.0), ((6,), 7, 13, 5, 8.0)):
        A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
        A, B = A.requires_grad_(), B.requires_grad_()
        yield torch.randn(*shape, d_in), torch.randn(d_out, d_in), A, B, alpha


def observe_forward(forward: Callable, x, W, A, B, alpha) -> dict:
    return watched(lambda: forward(x, W, A, B, alpha), W, A, B)


def watched(run: Callable, W: Tensor, *factors: Tensor) -> dict:
    """What `run()` gives, and on the way: for the gradients, and for the memory."""
    with Builds(W) as watch:
        output = run()
    if not isinstance(output, Tensor):
        return {"the output": output}
    gradients = [None, None]
    if output.requires_grad:
        gradients = torch.autograd.grad(output.sum(), factors, allow_unused=True)
    return {
        "the output": output.detach(),
        "whether gradients reach A and B": [g is not None and bool(g.any()) for g in gradients],
        "whether a matrix of the size of W is made": watch.found,
    }


NO_GRADIENT = (
    "the numbers are right, but no gradient reaches A and B, so they could never train; leave out "
    "torch.no_grad, .detach() and .data"
)
AS_LARGE_AS_W = (
    "the numbers are right, but a matrix as large as W is made, such as B A, W + ΔW or a copy of "
    "W; two thin products, first x @ A.T and then @ B.T, need none"
)


def detached(W: Tensor, BA: Tensor, s: float, r: int) -> Tensor:
    return W + s * BA.detach()


forward = Exercise(
    "02 forward",
    forward_with(),
    draw_forward,
    observe=observe_forward,
    mistakes={message: forward_with(total=total) for message, total in WRONG_SUMS.items()}
    | {
        "the shapes do not fit: W, A and B stand transposed behind x": (
            lambda x, W, A, B, alpha: x @ W + x @ A @ B
        ),
        "the order is wrong: x meets A first, then B": (
            lambda x, W, A, B, alpha: x @ W.T + alpha / len(A) * (x @ B) @ A
        ),
        NO_GRADIENT: forward_with(total=detached),
        AS_LARGE_AS_W: lambda x, W, A, B, alpha: x @ (W + alpha / len(A) * B @ A).T,
    },
)


# --- the initialisation --------------------------------------------------------------------------


def draw_initialise() -> Iterator[tuple[int, int, int]]:
    yield from ((48, 512, 4), (20, 400, 8))


def observe_initialise(initialise: Callable, d_out: int, d_in: int, rank: int) -> dict:
    """What matters about random factors, in words and counts."""
    given = initialise(d_out, d_in, rank)
    pair = isinstance(given, tuple | list) and len(given) == 2
    if not (pair and all(isinstance(factor, Tensor) for factor in given)):
        return {"the result": given}
    A, B = given
    facts = {
        "the result": "two tensors",
        "the shapes of A and B": [tuple(A.shape), tuple(B.shape)],
        "whether A and B are floating-point": [A.is_floating_point(), B.is_floating_point()],
    }
    if A.shape != (rank, d_in) or not A.is_floating_point():
        return facts
    A, again = A.detach().double(), initialise(d_out, d_in, rank)[0]
    zero = {"A": not A.any(), "B": not B.any()}
    size = A.square().mean().sqrt().item() * d_in**0.5  # about ‖A x‖ / ‖x‖ · √(d_in / r)
    negative = (A < 0).double().mean().item()
    return facts | {
        "which factor is zero": [name for name, is_zero in zero.items() if is_zero],
        "the size of A x": "far smaller" if size < 0.1 else "as x" if size < 8 else "far larger",
        "the number of inputs that A reads": int((A != 0).any(dim=0).sum()),
        "the rank of A": torch.linalg.matrix_rank(A, rtol=1e-4).item(),
        "the signs in A": "both" if 0.25 < negative < 0.75 else "mostly one",
        "a second call": "the same A" if torch.equal(again.detach().double(), A) else "another A",
    }


def small(rows: int, columns: int) -> Tensor:
    return 0.01 * torch.randn(rows, columns)


@variants
def starting_with(d_out, d_in, rank, A=small, B=torch.zeros) -> tuple[Tensor, Tensor]:
    return A(rank, d_in), B(d_out, rank)


WRONG_STARTS = {  # A and B, each made of its two sides
    "both factors are zero, and each has the other in its gradient, so neither ever moves; draw A "
    "at random": (torch.zeros, torch.zeros),
    "it is the other way round from the paper and every library that reads your adapters: A starts "
    "at random, B at zero": (torch.zeros, torch.randn),
    "B is not exactly zero, so the layer changes the model before it has learned anything": (
        (small, lambda d_out, r: torch.full((d_out, r), 1e-9))
    ),
    "A has rank 1: all its rows are multiples of one; draw each row anew": (
        (lambda r, d_in: 0.05 * torch.randn(r, 1) * torch.randn(1, d_in), torch.zeros)
    ),
    "nearly all of A has one sign, so all its rows see much the same, the mean of x; draw around "
    "zero": (lambda r, d_in: 0.02 * torch.rand(r, d_in), torch.zeros),
}

initialise = Exercise(
    "02 initialise",
    starting_with(),
    draw_initialise,
    observe=observe_initialise,
    mistakes={message: starting_with(A=A, B=B) for message, (A, B) in WRONG_STARTS.items()}
    | {
        "A holds whole numbers, which can have no gradient; draw floating-point ones": (
            starting_with(A=lambda r, d_in: torch.randint(-1, 2, (r, d_in)))
        ),
        "A is so large that A x is many times as large as x; divide by √d_in": (
            starting_with(A=torch.randn)
        ),
        "A is so small that hardly anything of x, and of B's gradient, comes through; divide by "
        "√d_in and no further": starting_with(A=lambda r, d_in: 1e-9 * torch.randn(r, d_in)),
        "A reads only some of the inputs, as the identity does; draw every entry at random": (
            starting_with(A=torch.eye)
        ),
        "A is the same at every call; draw it at random, and set no seed inside": starting_with(
            A=lambda r, d_in: torch.linspace(-1, 1, r * d_in).view(r, d_in).sin() / d_in**0.5
        ),
        "A and B have each other's shape; A is (rank, d_in) and B (d_out, rank)": (
            lambda d_out, d_in, rank: (small(d_in, rank), torch.zeros(rank, d_out))
        ),
    },
)


# --- TinyLoRA ------------------------------------------------------------------------------------


def draw_tiny() -> Iterator[tuple]:
    """W, x, the values that A and B get, and α; α / r is neither 1 nor 2."""
    for x, weight, A, B, alpha in draw_forward():
        yield weight, x, A.detach(), B.detach(), alpha


def observe_tiny(make: Callable, W, x, A, B, alpha) -> dict:
    """How the class starts, and what it does once its factors have the values of A and B."""
    original = nn.Linear(*reversed(W.shape))
    original.weight, original.bias = nn.Parameter(W), nn.Parameter(W.sum(dim=1))
    layer = make(original, len(A), alpha)
    if not isinstance(layer, nn.Module):
        return {"the layer": layer}
    parameters = dict(layer.named_parameters())
    facts = {"the layer": "a module", "the names of its parameters": sorted(parameters)}
    if sorted(parameters) != ["lora_A", "lora_B", "original.bias", "original.weight"]:
        return facts
    factors, start, values = (layer.lora_A, layer.lora_B), layer(x), layer.lora_A.detach()
    size = values.square().mean().sqrt().item()
    facts |= {
        "whether layer.original is the layer it was given": layer.original is original,
        "what trains": sorted(name for name, p in parameters.items() if p.requires_grad),
        "the shapes of lora_A and lora_B": [tuple(factor.shape) for factor in factors],
        "which factor is zero": [n for n in ("lora_A", "lora_B") if not parameters[n].any()],
        "the rank of lora_A": torch.linalg.matrix_rank(values, rtol=1e-4).item(),
        "the signs in lora_A": "both" if values.min() < 0 < values.max() else "one",
        "the size of lora_A": "small" if 0.001 < size < 0.6 else "another",
        "the scaling": getattr(layer, "scaling", "none"),
        "the output at the start": start.detach() if isinstance(start, Tensor) else start,
    }
    if [factor.shape for factor in factors] != [A.shape, B.shape]:
        return facts
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    return facts | watched(lambda: layer(x), original.weight, *factors)


@variants
def tiny(
    original, rank, alpha, A=small, B=torch.zeros, scaling=truediv, forward=TinyLoRA.forward
) -> TinyLoRA:
    """With other factors, of (rows, columns), another scaling, of (α, r), or another forward."""
    layer = TinyLoRA(original, rank, alpha)
    layer.lora_A = nn.Parameter(A(rank, original.in_features))
    layer.lora_B = nn.Parameter(B(original.out_features, rank))
    layer.scaling, layer.forward = scaling(alpha, rank), partial(forward, layer)
    return layer


def adding(total: Callable, original: Callable = lambda self, x: self.original(x)) -> Callable:
    """A forward, from what adds the two paths."""

    def forward(self: TinyLoRA, x: Tensor) -> Tensor:
        path = x @ self.lora_A.T @ self.lora_B.T
        return total(original(self, x), path, self.scaling, len(self.lora_A))

    return forward


def with_plain_tensors(original: nn.Linear, rank: int, alpha: float) -> TinyLoRA:
    layer = TinyLoRA(original, rank, alpha)
    A, B = layer.lora_A.data, layer.lora_B.data
    del layer.lora_A, layer.lora_B
    layer.lora_A, layer.lora_B = A, B
    return layer


tiny_lora = Exercise(
    "02 tiny_lora",
    TinyLoRA,
    draw_tiny,
    observe=observe_tiny,
    mistakes={m: tiny(forward=adding(total)) for m, total in WRONG_SUMS.items()}
    | {m: tiny(A=A, B=B) for m, (A, B) in WRONG_STARTS.items()}
    | {
        "lora_A and lora_B are plain tensors, which no optimizer finds; wrap each in "
        "nn.Parameter": with_plain_tensors,
        "the original layer would train too; call original.requires_grad_(False)": (
            lambda *given: tiny()(*given).requires_grad_(True)
        ),
        "lora_A stands the wrong way; its shape is (rank, in_features)": tiny(
            A=lambda r, d_in: small(d_in, r)
        ),
        "lora_A and lora_B have each other's size; A takes in_features numbers in": tiny(
            A=lambda r, d_in: small(r, r), B=lambda d_out, r: torch.zeros(r, r)
        ),
        "lora_A has another size than asked; multiply torch.randn by 0.01": tiny(A=torch.randn),
        "self.scaling is alpha / rank; yours is alpha alone": tiny(scaling=lambda a, r: a),
        "self.scaling is alpha / rank; √rank divides in rsLoRA alone": tiny(
            scaling=lambda a, r: a / r**0.5
        ),
        "self.scaling is alpha / rank; yours is always 1": tiny(scaling=lambda a, r: 1.0),
        "self.scaling is alpha / rank; yours is rank / alpha": tiny(scaling=lambda a, r: r / a),
        "forward loses the bias of the original layer; call self.original(x)": tiny(
            forward=adding(right_sum, lambda self, x: x @ self.original.weight.T)
        ),
        NO_GRADIENT: tiny(forward=adding(detached)),
        AS_LARGE_AS_W: tiny(
            forward=lambda self, x: (
                self.original(x) + self.scaling * x @ (self.lora_B @ self.lora_A).T
            )
        ),
    },
)


def yours_or_complete(yours: type | None) -> type:
    """The TinyLoRA that a page goes on with: the learner's if it is right, or a complete one."""
    try:
        right = yours is not TinyLoRA and tiny_lora.judge(yours) is None
    except NotAttempted:
        right = False
    print("The page goes on with", "your class." if right else "a complete TinyLoRA.")
    return yours if right else TinyLoRA


# --- two questions -------------------------------------------------------------------------------

first_step = Choice("02 first_step")
scaling = Choice("02 scaling")
