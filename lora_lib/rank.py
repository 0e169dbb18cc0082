"""How large is a change? Singular values, measures of rank, and cutting a change to rank r.

Every measure takes singular values (largest first) and raises ValueError if they are all zero or
not all finite; `noise_like` is what to hold it against: a random matrix of the same size.
"""

import copy
import math

import torch
from torch import Tensor, nn


def singular_values(matrix: Tensor) -> Tensor:
    """(m, n) → min(m, n) values, largest first, in float64 (a float32 SVD blurs exact zeros)."""
    return torch.linalg.svdvals(matrix.detach().double())


def _require_a_change(values: Tensor) -> None:
    """Every measure divides by the size of the change."""
    if not values.any():
        raise ValueError("every singular value is zero; compare two models that differ")
    if not values.isfinite().all():
        odd = values[~values.isfinite()][0].item()
        raise ValueError(
            f"a singular value is {odd}; the training diverged: train the model anew, with a lower "
            "learning rate"
        )


def cumulative_energy(values: Tensor) -> Tensor:
    """Share of Σσ² held by the first k singular values, for k = 1, 2, …; the last is 1."""
    _require_a_change(values)
    energy = values.double().square()  # in float32 the last share may miss 1
    return energy.cumsum(0) / energy.sum()


def k90(values: Tensor, share: float = 0.9) -> int:
    """How many singular values hold `share` of Σσ² (Biderman et al. 2024, arXiv 2405.09673, §4.6).

    Raises ValueError if `share` does not lie above 0 and at most at 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1")
    # The tolerance keeps rounding from asking for one component more when share is 1.
    return int((cumulative_energy(values) < share - 1e-12).sum()) + 1


def effective_rank(values: Tensor) -> float:
    """exp(entropy of σ / Σσ), between 1 and the rank (Roy & Vetterli 2007)."""
    _require_a_change(values)
    p = values[values > 0] / values.sum()
    return math.exp(-(p * p.log()).sum().item())


def stable_rank(values: Tensor) -> float:
    """‖M‖²_F / ‖M‖²₂: Σσ² over the largest σ²."""
    _require_a_change(values)
    return (values.square().sum() / values[0].square()).item()


def analyze_weight_change_rank(
    d_in: int = 768, d_out: int = 768, simulated_rank: int = 8
) -> tuple[Tensor, Tensor]:
    """Simulate a weight change of known rank; returns its singular values and cumulative energy.

    ΔW (d_out, d_in) is a product of two Gaussian factors of standard deviation 0.1, drawn with
    torch's seed. Both results have min(d_in, d_out) entries.

    Raises ValueError if `simulated_rank` does not lie between 1 and min(d_in, d_out).
    """
    if not 1 <= simulated_rank <= min(d_in, d_out):
        raise ValueError(
            f"simulated_rank is {simulated_rank}; a {d_out} × {d_in} matrix can have a rank from "
            f"1 to {min(d_in, d_out)}"
        )
    change = 0.1 * torch.randn(d_out, simulated_rank) @ (0.1 * torch.randn(simulated_rank, d_in))
    values = singular_values(change)
    return values, cumulative_energy(values)


def noise_like(matrix: Tensor, seed: int = 0) -> Tensor:
    """Gaussian noise of the same shape and Frobenius norm: what "no structure" looks like."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(matrix.shape, generator=generator)
    return noise * (matrix.norm().cpu() / noise.norm())


def low_rank_part(matrix: Tensor, rank: int) -> Tensor:
    """The nearest matrix of rank at most `rank`: the truncated SVD (Eckart & Young 1936)."""
    u, s, vt = torch.linalg.svd(matrix.detach(), full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def weight_changes(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    """Path → ΔW (d_out, d_in) for every nn.Linear that two plain models share."""
    linears = [(path, m) for path, m in before.named_modules() if isinstance(m, nn.Linear)]
    return {path: (after.get_submodule(path).weight - m.weight).detach() for path, m in linears}


@torch.no_grad()
def with_changes_cut(before: nn.Module, after: nn.Module, rank: int) -> nn.Module:
    """A copy of `after` in which the change of every nn.Linear weight is cut to `rank`.

    Embeddings, norms and biases stay as in `after`, so rank 0 is not the model of before.
    """
    cut = copy.deepcopy(after)
    for path, change in weight_changes(before, after).items():
        base = before.get_submodule(path).weight
        cut.get_submodule(path).weight.copy_(base + low_rank_part(change, rank))
    return cut
