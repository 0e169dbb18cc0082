"""What LoRA does in a model, whoever wrote its layers: which numbers train, and what they do."""

from collections import Counter

import torch
from torch import Tensor, nn


def kinds(result) -> str:
    """What came back from a function, in words."""
    words = {nn.Module: "a model", Tensor: "a tensor", int | float: "a number"}
    return " and ".join(
        next((word for kind, word in words.items() if isinstance(part, kind)), type(part).__name__)
        for part in (result if isinstance(result, tuple | list) else [result])
    )


def is_factor(name: str) -> bool:
    """Whether it is the name of one of a LoRALinear's two factors."""
    return name.endswith(("lora_A", "lora_B"))


def last_piece(path: str, names: tuple[str, ...]) -> bool:
    """Whether the path ends in one of the names, after its last dot."""
    return path.rpartition(".")[2] in names


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Path → nn.Linear."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def numbers_that_train(model: nn.Module, base: nn.Module) -> dict[str, int]:
    """Name of a layer → how many numbers train in `model` where `base` has its nn.Linear."""
    found, counted = Counter(), set()
    for path in linear_layers(base):
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
