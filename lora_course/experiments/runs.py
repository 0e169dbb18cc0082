"""One training run and its record; the recorded runs, and the learning rates chosen on validation.

`sweep` makes the recorded runs; `questions` says why there is each of them.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import count_parameters
from lora_lib.model import SmallTransformer, classifier_from, default_device
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained, read_metadata
from lora_lib.scores import accuracy, classification_loss, evaluate
from lora_lib.tasks import same_town_dataset, same_town_pairs
from lora_lib.training import adamw, adapt, fit

RESULTS = Path(__file__).parent / "results" / "sweep.jsonl"

TARGETS = {
    "all-linear": "all-linear",
    "W_q, W_v": ("W_q", "W_v"),
    "attention": ("W_q", "W_k", "W_v", "W_o"),
    "feed-forward": ("linear1", "linear2"),
    "blocks": ("W_q", "W_k", "W_v", "W_o", "linear1", "linear2"),  # all but the output layer
    **{name: (name,) for name in ("W_q", "W_k", "W_v", "W_o")},
    "W_q, W_k": ("W_q", "W_k"),
}


@dataclass(frozen=True)
class Run:
    """One training run. Rank, alpha, rslora and targets are LoRA's, `dropout` is the base's while
    it trains; `pairs` None means all, `lr` None that it is to be chosen on validation.

    Methods: "lora"; "lora-b" trains B alone and leaves A as drawn; "full"; "full-sgd", with
    momentum instead of Adam; "head", the output layer alone; "scratch", all weights, from random.
    """

    method: str = "lora"
    script: str = "georgian"
    task: str = "write"  # or same-town
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: str = "all-linear"
    dropout: float = 0.1
    lr: float | None = None
    pairs: int | None = None
    steps: int = 500
    batch_size: int = 64
    seed: int = 0


CENTRE = Run()


# --- one run -------------------------------------------------------------------------------------


def prepare_model(run: Run) -> tuple[SmallTransformer, object]:
    """The model of a run, with exactly what its method trains set to requires_grad."""
    torch.manual_seed(run.seed)
    model, tokenizer = load_pretrained(dropout=run.dropout)
    if run.method == "scratch":
        model = SmallTransformer(**read_metadata()["config"] | {"dropout": run.dropout})
    heads = ()
    if run.task == "same-town":
        classifier_from(model, num_classes=2)
        heads = ("classifier",)
    if run.method.startswith("lora"):
        _, layers = add_lora_to_model(
            model,
            run.rank,
            run.alpha,
            TARGETS[run.targets],
            use_rslora=run.rslora,
            modules_to_save=heads,
        )
        freeze_non_lora_params(model)
        if run.method == "lora-b":
            for layer in layers:
                layer.lora_A.requires_grad_(False)
    elif run.method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_()
    return model, tokenizer


def execute(run: Run, device: torch.device | None = None) -> dict:
    """Train and score one run; returns its settings and results as one flat record.

    Of a run whose loss stops being finite, the scores are None.
    """
    model, tokenizer = prepare_model(run)
    model.to(device or default_device())
    record = asdict(run) | {"trainable": count_parameters(model, only_trainable=True)}
    try:
        results = (_classify if run.task == "same-town" else _write)(run, model, tokenizer)
    except FloatingPointError:
        results = {"losses": [], "validation": None, "test": None}
    return record | results


def train(run: Run, model: nn.Module, tokenizer) -> list[float]:
    """Train `model` on the pairs of `run`, as it says; returns the loss of every step."""
    return adapt(
        model,
        tokenizer,
        load_pairs(run.script, "train")[: run.pairs],
        steps=run.steps,
        lr=run.lr,
        batch_size=run.batch_size,
        seed=run.seed,
        optimizer=sgd if run.method == "full-sgd" else adamw,
    )


def sgd(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def _write(run: Run, model: nn.Module, tokenizer) -> dict:
    losses = train(run, model, tokenizer)
    return {
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
            dataset,
            run.batch_size,
            split == "train",
            collate_fn=dataset.collate,
            generator=generator,
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


# --- the recorded runs ---------------------------------------------------------------------------


def load_results(path: Path = RESULTS) -> list[dict]:
    """All recorded runs, one dict each (see Run and `execute`)."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run_of(row: dict) -> Run:
    """The run whose record `row` is."""
    return Run(**{name: row[name] for name in asdict(CENTRE)})


def tuning_key(run: Run) -> Run:
    """The setting at which the learning rate of `run` is chosen: seed 0 and the centre's script.
    Every other factor has a rate of its own."""
    return replace(run, script=CENTRE.script, seed=0, lr=None)


def tried_rates(rows: list[dict], run: Run, by: str = "bits") -> dict[float, float]:
    """Learning rate → validation score (see there) of the recorded runs at `tuning_key`."""
    wanted = asdict(tuning_key(run))
    del wanted["lr"]
    rows = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return {row["lr"]: validation_score(row, by) for row in sorted(rows, key=lambda r: r["lr"])}


def validation_score(row: dict, by: str = "bits") -> float:
    """More is better: the accuracy in classification; otherwise minus the bits per character, or
    with by="exact_match" that, bits breaking ties. Minus infinity for a run that diverged."""
    scores = row["validation"]
    if scores is None:
        return -math.inf
    if "accuracy" in scores:
        return scores["accuracy"]
    return -scores["bits"] if by == "bits" else scores[by] - 1e-6 * scores["bits"]


def chosen_rate(rows: list[dict], run: Run, by: str = "bits") -> float:
    """The learning rate with the best validation score at `run`'s setting (see tuning_key)."""
    tried = tried_rates(rows, run, by)
    return max(tried, key=tried.get)


def select(rows: list[dict], **factors) -> list[dict]:
    """The runs that equal the centre except in `factors`, one row a seed.

    Unless given, alpha is 2 · rank and the learning rate the one chosen on validation.
    """
    run = replace(CENTRE, **factors)
    if "alpha" not in factors:
        run = replace(run, alpha=2.0 * run.rank)
    if "lr" not in factors:
        run = replace(run, lr=chosen_rate(rows, run))
    return rows_of(rows, run)


def rows_of(rows: list[dict], run: Run) -> list[dict]:
    """The recorded seeds of `run`, in the order of the seeds."""
    wanted = asdict(run)
    del wanted["seed"]
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda row: row["seed"])
