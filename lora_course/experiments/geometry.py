"""Directions of trained LoRA factors: `python -m lora_course.experiments.geometry`.

At our scale, what Hu et al. 2021 ask in §7.2 (do two ranks, or two seeds, find the same
directions?) and §7.3 (how does ΔW lie to W?), and the intruder test of Shuttleworth et al. 2024.
Five seeds of LoRA at three ranks on Georgian and of r = 8 on Greek. Some minutes on a GPU, an hour
on two CPU cores.

It makes three tables, a row a weight matrix: `similarity` (two runs, i and j), `projections` and
`intruders`.
"""

from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from lora_course.directions import (
    intruder_dimensions,
    linear_weights,
    lora_by_path,
    subspace_similarity,
)
from lora_course.experiments.questions import SEEDS, lora, method
from lora_course.experiments.recording import in_parallel, place, record_tables, workers_argument
from lora_course.experiments.runs import Run, chosen_rate, prepare_model, train
from lora_course.results import load_runs
from lora_lib.model import default_device
from lora_lib.pretrained import load_pretrained

SETTINGS = {
    "r = 4": lora(4),
    "r = 8": lora(8),
    "r = 64": lora(64),
    "r = 8, Greek": lora(8, script="greek"),
}
MATRICES = ("W_q", "W_v")
COUNTS = (1, 2, 4, 8, 16, 32, 64)  # i and j of φ(i, j), as far as the ranks go

Factors = dict[str, tuple[Tensor, Tensor, float]]  # path → A (r, d_in), B (d_out, r), scaling


def trained_factors(run: Run) -> Factors:
    """Train `run` and return the factors of its LoRA layers, on the CPU."""
    model, tokenizer = prepare_model(run)
    train(run, model.to(default_device()), tokenizer)
    return {
        path: (layer.lora_A.detach().cpu(), layer.lora_B.detach().cpu(), layer.scaling)
        for path, layer in lora_by_path(model).items()
    }


def directions(factors: Factors, path: str, side: str) -> Tensor:
    """Orthonormal directions of A in input space (d_in, r), or of B in output space (d_out, r),
    strongest first."""
    A, B, _ = factors[path]
    return torch.linalg.svd(A.T if side == "A" else B, full_matrices=False)[0]


def similarities(one: Factors, other: Factors, side: str) -> Iterator[dict]:
    """φ(i, j) of every attention matrix in MATRICES between two runs, as far as the ranks go."""
    for path in one:
        if path.endswith(MATRICES):
            a, b = directions(one, path, side), directions(other, path, side)
            for i in COUNTS:
                for j in COUNTS:
                    if i <= a.shape[1] and j <= b.shape[1]:
                        phi = subspace_similarity(a[:, :i], b[:, :j])
                        yield place(path) | {"side": side, "i": i, "j": j, "phi": phi}


def projections(weight: Tensor, factors: Factors, path: str, seed: int) -> dict:
    """‖Uᵀ W Vᵀ‖_F with the r strongest directions of ΔW, of W itself, and random ones, beside
    ‖W‖_F and ‖ΔW‖_F (Hu et al. 2021, Table 7)."""
    A, B, scaling = factors[path]
    change, rank = scaling * B @ A, A.shape[0]
    torch.manual_seed(seed)

    def norm_within(matrix: Tensor) -> float:
        u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
        return (u[:, :rank].T @ weight @ vt[:rank].T).norm().item()

    return {
        "rank": rank,
        "seed": seed,
        **place(path),
        "within ΔW": norm_within(change),
        "within W": norm_within(weight),
        "within random": norm_within(torch.randn_like(weight)),
        "norm of W": weight.norm().item(),
        "norm of ΔW": change.norm().item(),
    }


def intruders(base: dict[str, Tensor], changed: dict[str, Tensor]) -> Iterator[dict]:
    """Intruder dimensions among the ten strongest of every square attention matrix."""
    for path in base:
        if path.rpartition(".")[2].startswith("W_"):
            yield place(path) | {"intruders": intruder_dimensions(base[path], changed[path])}


def merged_weights(base: dict[str, Tensor], factors: Factors) -> dict[str, Tensor]:
    return {path: base[path] + s * B @ A for path, (A, B, s) in factors.items()}


def full_weights(run: Run) -> dict[str, Tensor]:
    model, tokenizer = prepare_model(run)
    train(run, model.to(default_device()), tokenizer)
    return linear_weights(model.cpu())


def measure(runs: pd.DataFrame, workers: int) -> dict[str, list[dict]]:
    """Train every setting at its chosen learning rate and compare the factors: rows by table."""

    def jobs(setting: Run) -> list[Run]:
        rate = chosen_rate(runs, setting)
        return [replace(setting, lr=rate, seed=seed) for seed in SEEDS]

    names = [(name, seed) for name in SETTINGS for seed in SEEDS]
    training = [run for setting in SETTINGS.values() for run in jobs(setting)]
    trained = dict(zip(names, in_parallel(trained_factors, training, workers), strict=True))
    full = dict(zip(SEEDS, in_parallel(full_weights, jobs(method("full")), workers), strict=True))
    base = linear_weights(load_pretrained()[0])
    pairs = {  # the seed decides A's start and the order of the batches
        "r = 8 and r = 64, other seed": ("r = 8", "r = 64", 1),
        "r = 8, other seed": ("r = 8", "r = 8", 1),
        "r = 64, other seed": ("r = 64", "r = 64", 1),
        "r = 8, other task, same seed": ("r = 8", "r = 8, Greek", 0),
        "r = 8, other task, other seed": ("r = 8", "r = 8, Greek", 1),
    }
    return {
        "similarity": [
            {"pair": name, "seed": seed} | found
            for name, (one, other, shift) in pairs.items()
            for seed in SEEDS
            for side in ("A", "B")
            for found in similarities(
                trained[one, seed], trained[other, (seed + shift) % len(SEEDS)], side
            )
        ],
        "projections": [
            projections(base[path], trained[name, seed], path, seed)
            for name in ("r = 4", "r = 64")
            for seed in SEEDS
            for path in base
            if path.endswith(MATRICES)
        ],
        "intruders": [
            {"method": name, "seed": seed} | found
            for seed in SEEDS
            for name, changed in (
                ("LoRA r = 8", merged_weights(base, trained["r = 8", seed])),
                ("LoRA r = 64", merged_weights(base, trained["r = 64", seed])),
                ("full fine-tuning", full[seed]),
            )
            for found in intruders(base, changed)
        ],
    }


def main() -> None:
    tables = measure(load_runs(), workers_argument(__doc__))
    record_tables("geometry", default_device(), tables)


if __name__ == "__main__":
    main()
