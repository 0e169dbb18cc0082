"""Where a change points: subspaces that two matrices share, and directions that are new."""

import torch
from torch import Tensor, nn

from lora_lib.lora import LoRALinear


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Path → a copy of W (d_out, d_in) for every nn.Linear."""
    linears = {p: module for p, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: linear.weight.detach().clone() for path, linear in linears.items()}


def lora_by_path(model: nn.Module) -> dict[str, LoRALinear]:
    """Path → LoRA layer, in the order of `named_modules`."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def subspace_similarity(a: Tensor, b: Tensor) -> float:
    """φ = ‖Uᵀ V‖²_F / min(i, j) for orthonormal columns `a` (d, i) and `b` (d, j): 1 if the smaller
    space lies in the larger, 0 if they are orthogonal (Hu et al. 2021, §7.2).

    Random spaces give about max(i, j) / d, not 0: hold every φ against that.
    """
    return ((a.T @ b).square().sum() / min(a.shape[1], b.shape[1])).item()


def nearest_cosines(before: Tensor, after: Tensor, k: int = 10) -> Tensor:
    """(k,): for each of the k strongest left singular vectors of `after`, its largest |cosine| with
    one of `before` (the sign of a singular vector is arbitrary). A matrix has as many of them as
    singular values; those that would complete a basis of ℝᵐ are arbitrary and do not count."""
    old, new = (
        torch.linalg.svd(m.detach().double(), full_matrices=False)[0] for m in (before, after)
    )
    return (old.T @ new[:, :k]).abs().max(dim=0).values


def nearest_cosines_by_chance(width: int, count: int = 2000, seed: int = 0) -> Tensor:
    """(count,): the same for directions drawn at random in `width` dimensions, the null of the
    intruder test. Every orthonormal basis gives the same distribution; this is the standard one."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, width, generator=generator)
    return vectors.abs().max(dim=1).values / vectors.norm(dim=1)


def intruder_dimensions(before: Tensor, after: Tensor, k: int = 10, epsilon: float = 0.3) -> int:
    """How many of the k strongest left singular vectors of `after` have a cosine below `epsilon`
    with every one of `before` (Shuttleworth et al. 2024, arXiv 2410.21228)."""
    return int((nearest_cosines(before, after, k) < epsilon).sum())
