"""The recorded results: `python -m lora_lib.experiments.sweep [--workers N]`.

One factor at a time around a stated centre, CENTRE. Learning rates are chosen on validation
towns, for every method, rank and choice of targets, on the centre's script; what is reported is
test towns. A sweep that was stopped goes on where it was: a run that stands in the results file
is not done again.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_lib.data import SCRIPTS, load_pairs, same_town_dataset, same_town_pairs
from lora_lib.experiments.provenance import provenance
from lora_lib.lora import add_lora_to_model, count_parameters, freeze_non_lora_params
from lora_lib.model import (
    SmallTransformer,
    classifier_from,
    default_device,
    load_pretrained,
    read_metadata,
)
from lora_lib.training import accuracy, adapt, classification_loss, evaluate, fit

RESULTS = Path(__file__).parent / "results" / "sweep.jsonl"

TARGETS = {
    "all-linear": "all-linear",
    "W_q, W_v": ("W_q", "W_v"),
    "attention": ("W_q", "W_k", "W_v", "W_o"),
    "feed-forward": ("linear1", "linear2"),
}


@dataclass(frozen=True)
class Run:
    """One training run; `pairs` None means all. Rank, alpha, rslora and targets are LoRA's."""

    method: str = "lora"  # or full, head, scratch
    script: str = "georgian"
    task: str = "write"  # or same-town
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: str = "all-linear"
    lr: float | None = None
    pairs: int | None = None
    steps: int = 500
    seed: int = 0


CENTRE = Run()
BATCH_SIZE = 64


# --- one run -------------------------------------------------------------------------------------


def prepare_model(run: Run) -> tuple[SmallTransformer, object]:
    """The model of a run, with exactly what its method trains set to requires_grad."""
    torch.manual_seed(run.seed)
    model, tokenizer = load_pretrained()
    if run.method == "scratch":
        model = SmallTransformer(**read_metadata()["config"])
    heads = ()
    if run.task == "same-town":
        classifier_from(model, num_classes=2)
        heads = ("classifier",)
    if run.method == "lora":
        add_lora_to_model(
            model,
            run.rank,
            run.alpha,
            TARGETS[run.targets],
            use_rslora=run.rslora,
            modules_to_save=heads,
        )
        freeze_non_lora_params(model)
    elif run.method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_()
    return model, tokenizer


def execute(run: Run, device: torch.device | None = None) -> dict:
    """Train and score one run; returns its settings and results as one flat record."""
    model, tokenizer = prepare_model(run)
    model.to(device or default_device())
    record = asdict(run) | {"trainable": count_parameters(model, only_trainable=True)}
    if run.task == "same-town":
        return record | _classify(run, model, tokenizer)
    pairs = load_pairs(run.script, "train")[: run.pairs]
    losses = adapt(
        model, tokenizer, pairs, steps=run.steps, lr=run.lr, batch_size=BATCH_SIZE, seed=run.seed
    )
    return record | {
        "losses": _thin(losses),
        "validation": evaluate(model, tokenizer, run.script, "validation", 300)._asdict(),
        "test": evaluate(model, tokenizer, run.script, "test")._asdict(),
    }


def _classify(run: Run, model: nn.Module, tokenizer) -> dict:
    loaders = {}
    for split in ("train", "validation", "test"):
        limit = run.pairs if split == "train" else None
        dataset = same_town_dataset(same_town_pairs(run.script, split, limit), tokenizer)
        generator = torch.Generator().manual_seed(run.seed)
        loaders[split] = DataLoader(
            dataset, BATCH_SIZE, split == "train", collate_fn=dataset.collate, generator=generator
        )
    losses = fit(
        model, _endless(loaders["train"]), run.steps, run.lr, loss_function=classification_loss
    )
    return {
        "losses": _thin(losses),
        "validation": {"accuracy": accuracy(model, loaders["validation"])},
        "test": {"accuracy": accuracy(model, loaders["test"])},
    }


def _endless(loader: DataLoader) -> Iterator[dict]:
    while True:
        yield from loader


def _thin(losses: list[float], every: int = 25) -> list[float]:
    """Means of `every` steps, rounded: enough to draw a curve."""
    groups = [losses[i : i + every] for i in range(0, len(losses), every)]
    return [round(sum(g) / len(g), 4) for g in groups]


# --- which runs ----------------------------------------------------------------------------------

RANKS = (1, 2, 4, 8, 16, 32, 64)
LORA_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
BEYOND = {1: 4e-2, 2: 4e-2, 64: 5e-4}  # one rate more where the best of these was at the edge
EQUAL_BUDGET = {"W_q, W_v": 38, "attention": 19, "feed-forward": 15}  # ranks, for about 78,000


def tuning_runs() -> list[Run]:
    """One seed, the centre's script, several learning rates; judged on validation."""
    lora = [
        replace(CENTRE, rank=r, alpha=2.0 * r, lr=lr)
        for r in RANKS
        for lr in (*LORA_RATES, *([BEYOND[r]] if r in BEYOND else []))
    ]
    grids = {
        "full": (3e-4, 5e-4, 1e-3, 2e-3, 4e-3),
        "head": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "scratch": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    }
    others = [replace(CENTRE, method=m, lr=lr) for m, rates in grids.items() for lr in rates]
    targets = [
        replace(CENTRE, targets=t, lr=lr)
        for t in EQUAL_BUDGET
        for lr in (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
    ]
    same_town = {
        "lora": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        "full": (1e-4, 3e-4, 1e-3, 3e-3),
        "head": (1e-3, 1e-2, 1e-1),
        "scratch": (1e-4, 3e-4, 1e-3, 3e-3),
    }
    classify = [
        replace(CENTRE, task="same-town", method=m, lr=lr)
        for m, rates in same_town.items()
        for lr in rates
    ]
    return lora + others + targets + classify


def chosen_rate(rows: list[dict], run: Run) -> float:
    """The learning rate with the best validation score among the tuning runs for this setting.

    A setting is method, task, rank (α = 2r) and targets; other ranks of a choice of targets, and
    other scripts and numbers of pairs, use the rate tuned at the centre.
    """
    rank = run.rank if run.targets == "all-linear" else CENTRE.rank
    key = replace(
        CENTRE, method=run.method, task=run.task, rank=rank, alpha=2.0 * rank, targets=run.targets
    )
    tried = [row for row in rows if _matches_setting(row, key)]
    return max(tried, key=_validation_score)["lr"]


def _matches_setting(row: dict, key: Run) -> bool:
    return all(row[name] == value for name, value in asdict(key).items() if name != "lr")


def _validation_score(row: dict) -> float:
    scores = row["validation"]
    return scores["accuracy"] if "accuracy" in scores else -scores["bits"]


def final_runs(rows: list[dict]) -> list[Run]:
    """Several seeds at the chosen rates: five at the centre, three elsewhere."""

    def tuned(run: Run) -> Run:
        return replace(run, lr=chosen_rate(rows, run))

    methods = [
        tuned(CENTRE),
        tuned(replace(CENTRE, targets="W_q, W_v")),
        *(tuned(replace(CENTRE, method=m)) for m in ("full", "head", "scratch")),
    ]
    scratch = tuned(replace(CENTRE, method="scratch"))
    runs = _seeds(methods, 5)
    runs += _seeds([replace(scratch, script=s, steps=5000) for s in SCRIPTS], 3)
    for script in SCRIPTS:
        runs += _seeds([replace(m, script=script) for m in methods], 3)
    some = [m for m in methods if m.method != "head" and m.targets == "all-linear"]
    runs += _seeds([replace(m, pairs=n) for n in (100, 300, 1000) for m in some], 3)
    runs += _seeds([tuned(replace(CENTRE, rank=r, alpha=2.0 * r)) for r in RANKS], 3)
    runs += _seeds([tuned(replace(CENTRE, targets=t)) for t in EQUAL_BUDGET], 3)
    runs += _seeds(
        [tuned(replace(CENTRE, targets=t, rank=r, alpha=2.0 * r)) for t, r in EQUAL_BUDGET.items()],
        3,
    )
    centre = tuned(CENTRE)  # alpha rules: one learning rate, as a user who does not tune has it
    for rank in (2, 32):
        runs += _seeds(
            [
                replace(centre, rank=rank),
                replace(centre, rank=rank, alpha=2.0 * rank),
                replace(centre, rank=rank, rslora=True),
            ],
            3,
        )
    same_town = [
        tuned(replace(CENTRE, task="same-town", method=m))
        for m in ("lora", "full", "head", "scratch")
    ]
    runs += _seeds(same_town, 3) + _seeds([replace(m, pairs=500) for m in same_town], 3)
    return list(dict.fromkeys(runs))


def _seeds(runs: list[Run], n: int) -> list[Run]:
    return [replace(run, seed=seed) for run in runs for seed in range(n)]


# --- the sweep -----------------------------------------------------------------------------------


def load_results(path: Path = RESULTS) -> list[dict]:
    """All recorded runs, one dict each (see Run and `execute`)."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def select(rows: list[dict], **factors) -> list[dict]:
    """The runs that equal the centre except in `factors`, one row a seed.

    Unless given, alpha is 2 · rank and the learning rate the one chosen on validation.
    """
    run = replace(CENTRE, **factors)
    if "alpha" not in factors:
        run = replace(run, alpha=2.0 * run.rank)
    if "lr" not in factors:
        run = replace(run, lr=chosen_rate(rows, run))
    wanted = {name: value for name, value in asdict(run).items() if name != "seed"}
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _work(run: Run) -> dict:
    torch.set_num_threads(1)
    return execute(run)


def sweep(runs: list[Run], path: Path, workers: int) -> None:
    """Do the runs that are not in `path` yet; each result is appended as it comes."""
    done = {Run(**{n: row[n] for n in asdict(CENTRE)}) for row in load_results(path)}
    todo = [run for run in runs if run not in done]
    # A fork of a process that has touched a GPU cannot use it: start workers afresh.
    with multiprocessing.get_context("spawn").Pool(workers) as pool, path.open("a") as file:
        for record in tqdm(pool.imap_unordered(_work, todo), total=len(todo), mininterval=10):
            file.write(json.dumps(record) + "\n")
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.touch()
    facts = provenance("python -m lora_lib.experiments.sweep", default_device())
    facts |= {"centre": asdict(CENTRE), "batch_size": BATCH_SIZE}
    arguments.out.with_suffix(".provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
    sweep(tuning_runs(), arguments.out, arguments.workers)
    sweep(final_runs(load_results(arguments.out)), arguments.out, arguments.workers)


if __name__ == "__main__":
    main()
