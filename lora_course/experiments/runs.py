"""One training run, and where recorded runs stand in the table that `sweep` makes.

`questions` says why there is each of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, repeat

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_course.experiments.real_runs import thinned
from lora_course.results import tuning_runs
from lora_course.variants import add_magnitudes, lora_plus, start_at_strongest
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import count_parameters
from lora_lib.model import SmallTransformer, classifier_from, default_device
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained, read_metadata
from lora_lib.scores import Scores, accuracy, classification_loss, evaluate
from lora_lib.tasks import same_town_dataset, same_town_pairs
from lora_lib.training import adamw, adapt, fit

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

    Methods: "lora"; "lora-b" trains B alone and leaves A as drawn; "lora+16" trains B at 16 times
    the rate of A, which is `lr` (any other ratio likewise); "dora"; "pissa"; "full"; "full-sgd",
    with momentum instead of Adam; "head", the output layer alone; "scratch", all weights, from
    random.
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
LOW_RANK = ("lora", "dora", "pissa")  # what the names of such methods begin with
SETTINGS = [field.name for field in fields(Run)]
SCORES = ["exact_match", "error_rate", "bits", "accuracy"]
VALIDATION = [f"validation_{score}" for score in SCORES]
COLUMNS = [*SETTINGS, "trainable", "device", *VALIDATION, *SCORES, "losses"]


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
    if run.method.startswith(LOW_RANK):
        settings = dict(use_rslora=run.rslora, modules_to_save=heads)
        _, layers = add_lora_to_model(model, run.rank, run.alpha, TARGETS[run.targets], **settings)
        freeze_non_lora_params(model)
        if run.method == "lora-b":
            for layer in layers:
                layer.lora_A.requires_grad_(False)
        elif run.method == "dora":
            add_magnitudes(model)
        elif run.method == "pissa":
            for layer in layers:
                start_at_strongest(layer)
    elif run.method == "head":
        model.requires_grad_(False)
        model.classifier.requires_grad_()
    return model, tokenizer


def execute(run: Run) -> dict:
    """Train and score one run; returns its row of the recorded runs (see COLUMNS).

    A run whose loss stops being finite gets nothing right.
    """
    device = default_device()
    model, tokenizer = prepare_model(run)
    model.to(device)
    row = asdict(run) | {
        "trainable": count_parameters(model, only_trainable=True),
        "device": device.type,
    }
    if run.task == "same-town":
        train_and_score, worst = _classify, {"accuracy": 0.0}
    else:
        train_and_score, worst = _write, Scores(0.0, math.inf, math.inf)._asdict()
    try:
        losses, validation, test = train_and_score(run, model, tokenizer)
    except FloatingPointError:
        losses, validation, test = [], worst, worst
    validation = {f"validation_{name}": score for name, score in validation.items()}
    return row | validation | test | {"losses": thinned(losses, every=25)}


def train(run: Run, model: nn.Module, tokenizer) -> list[float]:
    """Train `model` on the pairs of `run`, as it says; returns the loss of every step."""
    pairs = load_pairs(run.script, "train")[: run.pairs]
    how = dict(steps=run.steps, lr=run.lr, batch_size=run.batch_size, seed=run.seed)
    return adapt(model, tokenizer, pairs, optimizer=optimizer_of(run, model), **how)


def optimizer_of(run: Run, model: nn.Module) -> Callable[..., torch.optim.Optimizer]:
    """(parameters, lr) → the optimizer of the run's method."""
    if run.method.startswith("lora+"):
        return lora_plus(model, float(run.method.removeprefix("lora+")))
    return sgd if run.method == "full-sgd" else adamw


def sgd(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def _write(run: Run, model: nn.Module, tokenizer) -> tuple[list[float], dict, dict]:
    losses = train(run, model, tokenizer)
    validation = evaluate(model, tokenizer, run.script, "validation", 300)
    return losses, validation._asdict(), evaluate(model, tokenizer, run.script, "test")._asdict()


def _classify(run: Run, model: nn.Module, tokenizer) -> tuple[list[float], dict, dict]:
    loaders = {}
    for split in ("train", "validation", "test"):
        limit = run.pairs if split == "train" else None
        dataset = same_town_dataset(same_town_pairs(run.script, split, limit), tokenizer)
        order = dict(shuffle=split == "train", generator=torch.Generator().manual_seed(run.seed))
        loaders[split] = DataLoader(dataset, run.batch_size, collate_fn=dataset.collate, **order)
    batches = chain.from_iterable(repeat(loaders["train"]))
    how = dict(loss_function=classification_loss, optimizer=optimizer_of(run, model))
    losses = fit(model, batches, run.steps, run.lr, **how)
    validation, test = (accuracy(model, loaders[split]) for split in ("validation", "test"))
    return losses, {"accuracy": validation}, {"accuracy": test}


# --- in the table of recorded runs ---------------------------------------------------------------


def runs_at(levels: Mapping[str, Run], runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of some settings, whatever the seed, with the label of each as `level`: in the
    order of the levels, then in that of `runs`. Settings without a learning rate may have any."""
    wanted = pd.DataFrame([{"level": label} | asdict(run) for label, run in levels.items()])
    wanted = wanted.astype({"pairs": "Int64"}).drop(columns="seed")
    if wanted.lr.isna().all():
        wanted = wanted.drop(columns="lr")
    return wanted.merge(runs)


def tried_runs(runs: pd.DataFrame, run: Run, by: str = "bits") -> pd.DataFrame:
    """The runs, one a learning rate, among which the rate of `run` is chosen, the best first.

    They differ from it in script and seed, for which there is one rate (see tuning_runs).
    """
    setting = replace(run, script=CENTRE.script, lr=None)
    return runs_at({"": setting}, tuning_runs(runs, by)).drop(columns="level")


def chosen_rate(runs: pd.DataFrame, run: Run, by: str = "bits") -> float:
    """The learning rate with the best validation score at the setting of `run`.

    Raises LookupError if none has been tried.
    """
    tried = tried_runs(runs, run, by)
    if tried.empty:
        raise LookupError(f"no learning rate has been tried for {run}; run the sweep for it")
    return tried.lr.iloc[0]
