"""Exercises of notebook 02: TinyLoRA, its two halves alone, and two questions."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Builds, Choice, Exercise, NotAttempted
from lora_course.tiny_lora import TinyLoRA

# --- the forward ---------------------------------------------------------------------------------


def reference_forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    return x @ weight.T + alpha / len(A) * (x @ A.T) @ B.T


def draw_forward() -> Iterator[tuple]:
    """α / r is neither 1 nor 2 nor 1 / √r. No product but B A is as large as W: see Builds."""
    for shape, d_in, d_out, rank, alpha in (((4, 5), 11, 7, 3, 15.0), ((6,), 7, 13, 5, 8.0)):
        A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
        A, B = A.requires_grad_(), B.requires_grad_()
        yield torch.randn(*shape, d_in), torch.randn(d_out, d_in), A, B, alpha


def observe_forward(forward: Callable, x, weight, A, B, alpha) -> dict:
    with Builds(weight) as watch:
        output = forward(x, weight, A, B, alpha)
    if not isinstance(output, Tensor):
        return {"the output": output}
    gradients = (None, None)
    if output.requires_grad:
        gradients = torch.autograd.grad(output.sum(), (A, B), allow_unused=True)
    return {
        "the output": output,
        "whether gradients reach A and B": [g is not None and bool(g.any()) for g in gradients],
        "whether a matrix of the size of W is made": watch.found,
    }


def mixing(weights: Callable[[float, int], tuple[float, float]]) -> Callable:
    """A forward that adds its two paths with `weights`, of (α, r)."""

    def wrong(x, weight, A, B, alpha):
        frozen, path = weights(alpha, len(A))
        return frozen * (x @ weight.T) + path * (x @ A.T @ B.T)

    return wrong


def without_gradient(x, weight, A, B, alpha):
    with torch.no_grad():
        return reference_forward(x, weight, A, B, alpha)


forward = Exercise(
    "02 forward",
    reference_forward,
    draw_forward,
    observe=observe_forward,
    mistakes={
        "the shapes do not fit: W, A and B stand transposed behind x": (
            lambda x, weight, A, B, alpha: x @ weight + x @ A @ B
        ),
        "that is the path alone; add the frozen x Wᵀ": mixing(lambda a, r: (0, a / r)),
        "the path is not scaled: multiply it by α / r": mixing(lambda a, r: (1, 1)),
        "you multiplied by α alone; divide by r = A.shape[0]": mixing(lambda a, r: (1, a)),
        "you multiplied by r / α; the scaling is α / r": mixing(lambda a, r: (1, r / a)),
        "you scaled the frozen path too; α / r is for B A alone": (
            mixing(lambda a, r: (a / r, a / r))
        ),
        "the order is wrong: x meets A first, then B": (
            lambda x, weight, A, B, alpha: x @ weight.T + alpha / len(A) * (x @ B) @ A
        ),
        "√r divides only in rsLoRA; here the scaling is α / r": mixing(
            lambda a, r: (1, a / r**0.5)
        ),
        "the path is taken away; it is added": mixing(lambda a, r: (1, -a / r)),
        "the numbers are right, but no gradient reaches A and B, so they could never train; leave "
        "out torch.no_grad, .detach() and .data": without_gradient,
        "the numbers are right, but a matrix as large as W is made, such as B A, W + ΔW or a copy "
        "of W; two thin products, first x @ A.T and then @ B.T, need none": (
            lambda x, weight, A, B, alpha: x @ (weight + alpha / len(A) * B @ A).T
        ),
    },
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
    A = A.detach().double()
    zero = {"A": not A.any(), "B": not B.any()}
    size = A.square().mean().sqrt().item() * math.sqrt(d_in)  # about ‖A x‖ / ‖x‖ · √(d_in / r)
    negative = (A < 0).double().mean().item()
    return facts | {
        "which factor is zero": [name for name, is_zero in zero.items() if is_zero],
        "the size of A x": "far smaller" if size < 0.1 else "as x" if size < 8 else "far larger",
        "the number of inputs that A reads": int((A != 0).any(dim=0).sum()),
        "the rank of A": torch.linalg.matrix_rank(A, rtol=1e-4).item(),
        "the signs in A": "both" if 0.25 < negative < 0.75 else "mostly one",
        "a second call": "the same A" if same_again(initialise, A) else "another A",
    }


def same_again(initialise: Callable, A: Tensor) -> bool:
    d_out, (rank, d_in) = 5, A.shape
    return torch.equal(initialise(d_out, d_in, rank)[0].detach().double(), A)


def reference_initialise(d_out: int, d_in: int, rank: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, d_in) / math.sqrt(d_in), torch.zeros(d_out, rank)


def starting_with(make_a: Callable[[int, int], Tensor], b: float = 0.0) -> Callable:
    """An initialisation with another A, made of (rank, d_in), and `b` in every entry of B."""
    return lambda d_out, d_in, rank: (make_a(rank, d_in), torch.full((d_out, rank), b))


initialise = Exercise(
    "02 initialise",
    reference_initialise,
    draw_initialise,
    observe=observe_initialise,
    mistakes={
        "A holds whole numbers, which can have no gradient; draw floating-point ones": (
            starting_with(lambda r, d_in: torch.randint(-1, 2, (r, d_in)))
        ),
        "both factors are zero, and each has the other in its gradient, so both stay zero; start A "
        "at random": starting_with(torch.zeros),
        "this would train, but it is the other way round from the paper and every library that "
        "reads your adapters: A random, B zero": starting_with(torch.zeros, b=1.0),
        "B is not exactly zero, so the layer changes the model before it has learned anything": (
            starting_with(torch.randn, b=1e-9)
        ),
        "A is so large that A x is many times as large as x; divide by √d_in": (
            starting_with(torch.randn)
        ),
        "A is so small that hardly anything of x, and of B's gradient, comes through; divide by "
        "√d_in and no further": starting_with(lambda r, d_in: 1e-9 * torch.randn(r, d_in)),
        "A reads only some of the inputs, as the identity does; draw every entry at random": (
            starting_with(torch.eye)
        ),
        "A has rank 1: all its rows are multiples of one; draw each row anew": starting_with(
            lambda r, d_in: torch.randn(r, 1) * torch.randn(1, d_in) / math.sqrt(d_in)
        ),
        "A is the same at every call; draw it at random, and set no seed inside": starting_with(
            lambda r, d_in: (
                torch.randn(r, d_in, generator=torch.Generator().manual_seed(0)) / math.sqrt(d_in)
            )
        ),
        "A and B have each other's shape; A is (rank, d_in) and B (d_out, rank)": (
            lambda d_out, d_in, rank: (
                torch.randn(d_in, rank) / math.sqrt(d_in),
                torch.zeros(rank, d_out),
            )
        ),
        "nearly all of A has one sign, so all its rows see much the same, the mean of x; draw "
        "around zero": starting_with(lambda r, d_in: torch.rand(r, d_in) / math.sqrt(d_in)),
    },
    why="B = 0 makes the start an exact no-op, and a random A of full rank lets B's gradient "
    "through on the first step.",
    hints=[
        "The product B A has to be zero, and yet one factor must let the gradient of the other "
        "through.",
        "B is torch.zeros(d_out, rank). A needs a different number in every entry.",
        "A = torch.randn(rank, d_in) / math.sqrt(d_in) has a sensible size.",
    ],
)


# --- TinyLoRA ------------------------------------------------------------------------------------


def draw_tiny() -> Iterator[tuple]:
    """W, x, the values that A and B get, and α; α / r is neither 1 nor 2."""
    for x, weight, A, B, alpha in draw_forward():
        yield weight, x, A.detach(), B.detach(), alpha


def observe_tiny(make: Callable, weight, x, A, B, alpha) -> dict:
    """How the class starts, and what it does once its factors have the values of A and B."""
    original = nn.Linear(*reversed(weight.shape))
    original.weight, original.bias = nn.Parameter(weight), nn.Parameter(weight.sum(dim=1))
    layer = make(original, len(A), alpha)
    if not isinstance(layer, nn.Module):
        return {"the layer": layer}
    parameters = dict(layer.named_parameters())
    facts = {"the layer": "a module", "the names of its parameters": sorted(parameters)}
    if sorted(parameters) != ["lora_A", "lora_B", "original.bias", "original.weight"]:
        return facts
    factors = layer.lora_A, layer.lora_B
    start, values = layer(x), layer.lora_A.detach()
    size = values.square().mean().sqrt().item()
    facts |= {
        "whether layer.original is the layer it was given": layer.original is original,
        "what trains": sorted(name for name, p in parameters.items() if p.requires_grad),
        "the shapes of lora_A and lora_B": [tuple(factor.shape) for factor in factors],
        "which factor is zero": [n for n in ("lora_A", "lora_B") if not parameters[n].any()],
        "the entries of lora_A": "different" if values.unique().numel() > 1 else "all alike",
        "the signs in lora_A": "both" if values.min() < 0 < values.max() else "one",
        "the size of lora_A": "small" if 0.001 < size < 0.6 else "another",
        "the scaling": getattr(layer, "scaling", "none"),
        "the output at the start": start.detach() if isinstance(start, Tensor) else start,
    }
    fits = facts["the shapes of lora_A and lora_B"] == [tuple(A.shape), tuple(B.shape)]
    if not (fits and isinstance(start, Tensor)):
        return facts
    with torch.no_grad():
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    with Builds(original.weight) as watch:
        output = layer(x)
    gradients = (None, None)
    if output.requires_grad:
        gradients = torch.autograd.grad(output.sum(), factors, allow_unused=True)
    return facts | {
        "the output with B ≠ 0": output.detach(),
        "whether gradients reach lora_A and lora_B": [g is not None for g in gradients],
        "whether a matrix of the size of W is made": watch.found,
    }


def variant(
    A: Callable | None = None,
    B: Callable | None = None,
    scaling: Callable | None = None,
    forward: Callable = TinyLoRA.forward,
    frozen: bool = True,
) -> type[TinyLoRA]:
    """TinyLoRA with other factors, of (rows, columns), another scaling, of (α, r), or forward."""

    class Variant(TinyLoRA):
        def __init__(self, original: nn.Linear, rank: int = 8, alpha: float = 16.0):
            super().__init__(original, rank, alpha)
            original.requires_grad_(not frozen)
            d_out, d_in = original.weight.shape
            self.lora_A = nn.Parameter(A(rank, d_in)) if A else self.lora_A
            self.lora_B = nn.Parameter(B(d_out, rank)) if B else self.lora_B
            self.scaling = scaling(alpha, rank) if scaling else self.scaling

    Variant.forward = forward
    return Variant


class PlainTensors(TinyLoRA):
    def __init__(self, original: nn.Linear, rank: int = 8, alpha: float = 16.0):
        super().__init__(original, rank, alpha)
        A, B = self.lora_A.data, self.lora_B.data
        del self.lora_A, self.lora_B
        self.lora_A, self.lora_B = A, B


def path(layer: TinyLoRA, x: Tensor) -> Tensor:
    return layer.scaling * (x @ layer.lora_A.T) @ layer.lora_B.T


tiny_lora = Exercise(
    "02 tiny_lora",
    TinyLoRA,
    draw_tiny,
    observe=observe_tiny,
    mistakes={
        "lora_A and lora_B are plain tensors, which no optimizer finds; wrap each in "
        "nn.Parameter": PlainTensors,
        "the original layer would train too; call original.requires_grad_(False)": (
            variant(frozen=False)
        ),
        "lora_A stands the wrong way; its shape is (rank, in_features)": variant(
            A=lambda r, d_in: 0.01 * torch.randn(d_in, r)
        ),
        "lora_A and lora_B have each other's size; A takes in_features numbers in": variant(
            A=lambda r, d_in: 0.01 * torch.randn(r, r), B=lambda d_out, r: torch.zeros(r, r)
        ),
        "both factors are zero, and each has the other in its gradient, so neither ever moves; "
        "draw A at random": variant(A=torch.zeros),
        "it is the other way round: A starts at random and B at zero": variant(
            A=torch.zeros, B=torch.randn
        ),
        "B does not start at zero, so the layer changes the model before it has learned "
        "anything": variant(B=torch.randn),
        "all entries of lora_A are alike, so its rows ask one question rank times; draw them "
        "with torch.randn": variant(A=lambda r, d_in: torch.full((r, d_in), 0.01)),
        "all of lora_A has one sign; torch.randn draws around zero": variant(
            A=lambda r, d_in: 0.01 * (0.1 + torch.rand(r, d_in))
        ),
        "lora_A has another size than asked; multiply torch.randn by 0.01": variant(A=torch.randn),
        "the scaling is alpha / rank; yours is alpha alone": variant(scaling=lambda a, r: a),
        "the scaling is alpha / rank; √rank divides in rsLoRA alone": variant(
            scaling=lambda a, r: a / r**0.5
        ),
        "the scaling is alpha / rank; yours is always 1": variant(scaling=lambda a, r: 1.0),
        "the scaling is alpha / rank; yours is rank / alpha": variant(scaling=lambda a, r: r / a),
        "forward returns the low-rank path alone; add self.original(x)": variant(forward=path),
        "forward scales the original too; the scaling is for B A x alone": variant(
            forward=lambda self, x: self.scaling * self.original(x) + path(self, x)
        ),
        "forward loses the bias of the original layer; call self.original(x)": variant(
            forward=lambda self, x: x @ self.original.weight.T + path(self, x)
        ),
        "forward takes the path away; it is added": variant(
            forward=lambda self, x: self.original(x) - path(self, x)
        ),
        "forward does not use the factors; add the path through lora_A and lora_B": variant(
            forward=lambda self, x: self.original(x)
        ),
        "forward forgets the scaling": variant(
            forward=lambda self, x: self.original(x) + path(self, x) / self.scaling
        ),
        "the numbers are right, but no gradient reaches lora_A and lora_B, so they could never "
        "train; leave out torch.no_grad, .detach() and .data": variant(
            forward=lambda self, x: self.original(x) + path(self, x).detach()
        ),
        "forward builds a matrix as large as W; let x meet A first, then B": variant(
            forward=lambda self, x: (
                self.original(x) + self.scaling * x @ (self.lora_B @ self.lora_A).T
            )
        ),
    },
    why="You have just written LoRA: W frozen, A random, B zero, two thin products, one scaling.",
    hints=[
        "x has in_features numbers. A makes rank numbers of them, B makes out_features of those.",
        "A = nn.Parameter(0.01 * torch.randn(rank, original.in_features)); B has the shape "
        "(original.out_features, rank) and starts at zero, in nn.Parameter too.",
        "self.scaling = alpha / rank, and forward returns self.original(x) + self.scaling * "
        "(x @ self.lora_A.T) @ self.lora_B.T",
    ],
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

first_step = Choice(
    "02 first_step",
    "A colleague starts the other way round, A zero and B random, and takes one step of plain SGD. "
    "After one optimizer step, which of A, B changed?",
    {
        "only B, as always on the first step": "that holds for the usual start; it is no property "
        "of B. Each gradient contains the other factor: B's contains A, and here A is zero",
        "only A": "A's gradient contains B, which is random, and B's contains A, which is zero: "
        "the factor that starts at zero is the one that moves first.",
        "A and B": "B's gradient contains A, and A is zero on this step; B moves from the second "
        "step on",
        "neither: with a factor at zero nothing moves": "that needs both factors at zero. A's "
        "gradient contains B, and B is random here",
    },
    right="b",
    hint="Do it with numbers, as above: W = 2, target 5, x = 1, now A = 0 and B = 1. A's gradient "
    "is the slope times B, and B's the slope times A.",
)

scaling = Choice(
    "02 scaling",
    "You raise the rank from r = 8 to r = 32 and leave α = 16. What happens to the factor in front "
    "of B A?",
    {
        "it stays 2: α fixes it": "α is the numerator alone; the factor is α / r, 16 / 8 and then "
        "16 / 32",
        "it falls from 2 to 0.5": "The factor is α / r; a rank raised at a fixed α is also a "
        "change four times weaker, so two ranks compared at one α and one learning rate differ in "
        "more than rank.",
        "it rises from 2 to 8, since the rank is four times as large": "the rank divides, it does "
        "not multiply: 16 / 8 = 2 and then 16 / 32",
        "it changes, but Adam takes no notice: it rescales every gradient anyway": "Adam makes the "
        "step of B independent of the gradient's size, but the output still gets that step "
        "multiplied by α / r, as the two columns above show",
    },
    right="b",
    hint="Work out α / r twice, for r = 8 and for r = 32.",
)
