"""What LoRA does, whoever wrote it: one sum, which numbers train in a model, and what they do."""

from collections import Counter
from types import NoneType

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# --- the sum -------------------------------------------------------------------------------------
# Of W and B A, or of what the two make of an input; s is α / r.


def right_sum(W: Tensor, BA: Tensor, s: float, r: int) -> Tensor:
    return W + s * BA


WRONG_SCALINGS = {
    "B A is not scaled; multiply it by α / r": lambda W, BA, s, r: W + BA,
    "B A is multiplied by α alone; divide by r, the rank": lambda W, BA, s, r: W + s * r * BA,
    "the scaling is upside down; it is α / r": lambda W, BA, s, r: W + BA / s,
    "α is divided by √r, as rsLoRA does; here it is r": lambda W, BA, s, r: W + s * r**0.5 * BA,
    "the scaling is applied twice": lambda W, BA, s, r: W + s * s * BA,
}
WRONG_SUMS = WRONG_SCALINGS | {
    "that is B A alone; add what is frozen, W": lambda W, BA, s, r: s * BA,
    "that is W alone; add B A": lambda W, BA, s, r: W,
    "W is scaled too; α / r is for B A alone": lambda W, BA, s, r: s * (W + BA),
    "B A is taken away; it is added": lambda W, BA, s, r: W - s * BA,
}


class Builds(TorchDispatchMode):
    """Inside `with`, notes in `found` whether a tensor as large as `matrix`, or several, is made.

    Views of the matrix itself do not count. Choose sizes of which no other product is a multiple.
    """

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix, self.found = matrix, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made, given = function(*args, **(kwargs or {})), self.matrix.untyped_storage().data_ptr()
        for tensor in filter(lambda t: isinstance(t, Tensor) and t.numel(), tree_leaves(made)):
            as_large = tensor.numel() % self.matrix.numel() == 0
            self.found |= as_large and tensor.untyped_storage().data_ptr() != given
        return made


# --- in a model ----------------------------------------------------------------------------------


def kinds(result) -> str:
    """What came back from a function, in words."""
    words = {nn.Module: "a model", Tensor: "a tensor", int | float: "a number", NoneType: "None"}
    return " and ".join(
        next((word for kind, word in words.items() if isinstance(part, kind)), type(part).__name__)
        for part in (result if isinstance(result, tuple | list) else [result])
    )


def is_factor(name: str) -> bool:
    """Whether it is the name of one of a LoRALinear's two factors."""
    return name.endswith(("lora_A", "lora_B"))


# A path, and names of layers: which belongs to one of them? `is_named` says so; wrong rules are
# str.endswith and these two.


def is_one_of(path: str, names: tuple[str, ...]) -> bool:
    return path in names


def contains_one_of(path: str, names: tuple[str, ...]) -> bool:
    return any(name in path for name in names)


LAST = 'compare its last piece, path.split(".")[-1]'
WRONG_MATCHES = {
    f"no layer matched, since a path is longer than a name; {LAST}": is_one_of,
    f"a path that only ends in the letters of a name was taken, as old_NAME does; {LAST}": (
        str.endswith
    ),
    f"a path that only contains a name was taken; {LAST}": contains_one_of,
}


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def numbers_that_train(model: nn.Module, base: nn.Module) -> dict[str, int]:
    """Name of a layer → how many numbers train in `model` where `base` has its nn.Linear."""
    found, counted = Counter(), set()
    for path in (p for p, module in base.named_modules() if isinstance(module, nn.Linear)):
        parameters = trained(model.get_submodule(path))
        found[path.rpartition(".")[2]] += sum(p.numel() for p in parameters)
        counted |= {id(p) for p in parameters}
    found["elsewhere"] = sum(p.numel() for p in trained(model) if id(p) not in counted)
    return {name: count for name, count in found.items() if count}


@torch.no_grad()
def set_factors(model: nn.Module) -> None:
    """Give every matrix that trains one vector along its long side, as if it had learned.

    The product of two factors is then the same in whatever order, shape and rank they are kept.
    """
    for matrix in trained(model):
        if matrix.ndim == 2:
            rank, length = sorted(matrix.shape)
            vector = torch.arange(1, 1 + length, dtype=torch.float64).sin().to(matrix)
            vector /= vector.norm() * rank**0.5
            matrix.copy_(vector if matrix.shape[1] == length else vector[:, None])


def observe(module: nn.Module, base: nn.Module, x: Tensor) -> dict:
    """What trains in `module`, and what it does to x before and after its factors are set."""
    facts = {"the numbers that train, by layer": numbers_that_train(module, base)}
    module, base, factors = module.double(), base.double(), trained(module)
    if not factors:
        return facts

    def gradient_sizes(inputs: list[Tensor]) -> list[float]:
        found = torch.autograd.grad(module(x).square().sum(), inputs, allow_unused=True)
        return [0.0 if gradient is None else gradient.norm().item() for gradient in found]

    off = (module(x) - base(x)).abs().max().item()
    moving = sum(size > 0 for size in gradient_sizes(factors))
    set_factors(module)
    inputs = [*factors, x] if x.requires_grad else factors
    return facts | {
        "starting where the base stands": off < 1e-5,
        "the factors that move in a first step": moving,
        "the output once the factors are set": module(x),
        "the size of every gradient then": torch.tensor(sorted(gradient_sizes(inputs))),
    }
