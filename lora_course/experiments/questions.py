"""What the recorded runs are for: every question with its design, and how it is answered.

A question names what is compared (its levels) and the score; with the number of seeds and the
threshold below which a difference is not worth a word, this was written down before the runs were
made. The levels of "one-rate" and "rslora" were changed once the first runs were in: at r = 64 and
α = 16, α / √r is what α = 2r gives, so that comparing these two could not have told anything.
"pairs-by-match" and the rate of "ten-times" came last: after many passes over the pairs, bits and
exact match want different rates, and a rival that is judged by exact match deserves the rate that
is best for it. The level "blocks" was added to tell the output layer from the rest, and
"dropout-short" was first asked of 60 steps of 64, in which LoRA wrote next to no name right. The
shared rates of "variants" were set before its runs: LoRA's best, 0.01, and those around it; for
r = 64 the two of "one-rate". The rates of "rate-in-62-steps" come from a trial, and
"alpha-in-62-steps" was asked once it was seen how far rank 8 falls behind in short runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from lora_course.experiments.runs import CENTRE, Run, runs_at
from lora_course.results import at_chosen_rate
from lora_lib.names import SCRIPTS

SEEDS = range(5)
THRESHOLD = {"exact_match": 0.02, "accuracy": 0.02, "bits": 0.05}
RANKS = (1, 2, 4, 8, 16, 32, 64)
# Ranks that give each choice of targets about the parameters of all-linear at r = 8, 79,128.
EQUAL_BUDGET = {"W_q, W_v": 38, "attention": 19, "feed-forward": 15, "blocks": 9}


# --- differences, and one rule to judge them -----------------------------------------------------


class Interval(NamedTuple):
    """A mean, and the 95 % interval: it would hold the true mean in 95 of 100 such experiments."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:  # without spread
            return number(self.mean)
        return f"{number(self.mean)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Three digits and a minus sign that cannot be taken for a dash."""
    return f"{value:.3g}".replace("-", "−")


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of one value a seed, with Student's 95 % interval.

    Raises ValueError for fewer than two values: one says nothing about the spread.
    """
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(
            f"an interval needs the spread of two or more seeds; {len(values)} given: {values}"
        )
    if np.ptp(values) == 0:
        return Interval(values[0], values[0], values[0])
    low, high = stats.ttest_1samp(values, 0).confidence_interval()
    return Interval(values.mean(), low, high)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Ours minus theirs, seed by seed (both in the order of the seeds), with the 95 % interval of
    the paired t-test. What a seed does to both cancels.

    Raises ValueError unless both have the same number of seeds, two or more.
    """
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


class Region(NamedTuple):
    """Where a true value lies if what is said holds, and that in words."""

    words: str
    low: float
    high: float


REPRODUCED, NOT_REPRODUCED, CANT_TELL = "reproduced", "not reproduced", "can't tell at this scale"


def judge(interval: Interval, region: Region) -> str:
    """Reproduced if the whole interval lies in the region, not reproduced if it lies wholly
    outside, otherwise these seeds can't tell."""
    if region.low <= interval.low and interval.high <= region.high:
        return REPRODUCED
    outside = interval.high < region.low or interval.low > region.high
    return NOT_REPRODUCED if outside else CANT_TELL


def in_a_word(difference: Interval, threshold: float) -> str:
    """ "higher", "lower" or "level", whichever `judge` finds reproduced, or "can't tell"."""
    regions = (
        Region("level", -threshold, threshold),
        Region("higher", threshold, math.inf),
        Region("lower", -math.inf, -threshold),
    )
    found = [region.words for region in regions if judge(difference, region) == REPRODUCED]
    return found[0] if found else "can't tell"


# --- questions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Levels are settings by label, five seeds each. Where they have no learning rate, each has
    the one chosen on validation for it: by bits per character, or by exact match."""

    asks: str
    levels: dict[str, Run]
    compared: Sequence[tuple[str, str]] = ()  # or the last level with each of the others
    beside: str = ""  # another question, for levels of it that are compared with
    score: str = "exact_match"  # or accuracy, or bits, of which fewer are better
    rate_by: str = "bits"  # or exact_match

    def runs(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Its rows of the recorded runs, with the label of each as `level`: in the order of the
        levels and the seeds."""
        tuned = any(run.lr is None for run in self.levels.values())
        rows = at_chosen_rate(runs, self.rate_by) if tuned else runs
        return runs_at(self.levels, rows.sort_values("seed"))

    def scores(self, runs: pd.DataFrame, score: str = "") -> pd.Series:
        """Level, seed → test score (the question's unless another is named)."""
        return self.runs(runs).set_index(["level", "seed"])[score or self.score]

    def differences(self, runs: pd.DataFrame) -> list[tuple[str, Interval, str]]:
        """What answers it, a row each: the levels compared, ours minus theirs, and that in a word.

        The interval is over seeds. The test towns are the same in all runs, so it says nothing
        about other towns.
        """
        asked = [self, QUESTIONS[self.beside]] if self.beside else [self]
        scores = pd.concat([question.scores(runs) for question in asked])
        *others, last = self.levels
        table = []
        for pair in self.compared or [(last, other) for other in others]:
            found = paired_difference(*(scores[label] for label in pair))
            ours, theirs = (
                label if label in self.levels else f"{label} of “{self.beside}”" for label in pair
            )
            word = in_a_word(found, THRESHOLD[self.score])
            table.append((f"{ours}, minus {theirs}", found, word))
        return table


def lora(rank: int = 8, **factors) -> Run:
    """The centre at another rank, with α = 2r unless given."""
    return replace(CENTRE, rank=rank, **{"alpha": 2.0 * rank, **factors})


def method(name: str, **factors) -> Run:
    return replace(CENTRE, method=name, **factors)


def across(levels: dict[str, Run], factor: str, values: Sequence) -> dict[str, Run]:
    return {
        f"{label}, {value or 'all'}": replace(run, **{factor: value})
        for value in values
        for label, run in levels.items()
    }


def rivals(values: Sequence) -> list[tuple[str, str]]:
    """LoRA with full fine-tuning, and with training from scratch."""
    return [(f"LoRA r=8, {v}", f"{rival}, {v}") for rival in list(SOME)[1:] for v in values]


SOME = {"LoRA r=8": lora(), "full fine-tuning": method("full"), "from scratch": method("scratch")}
WITH_HEAD = SOME | {"head alone": method("head")}
METHODS = WITH_HEAD | {"LoRA r=8, W_q and W_v": lora(targets="W_q, W_v")}
LONG = "from scratch, 10 × the steps"
TEN_TIMES = method("scratch", steps=10 * CENTRE.steps)
DROPOUT = {
    f"{name}, dropout {p:g}": replace(run, dropout=p)
    for name, run in SOME.items()
    for p in (0.1, 0.0)
}
WITH_MINUS_WITHOUT = [(f"{name}, dropout 0", f"{name}, dropout 0.1") for name in SOME]
COUNTS = (100, 300, 1000, None)
VARIANTS = {
    "LoRA": lora(),
    "rsLoRA": lora(rslora=True),
    "DoRA": method("dora"),
    "PiSSA": method("pissa"),
    "LoRA+, ratio 4": method("lora+4"),
    "LoRA+, ratio 16": method("lora+16"),
}
LARGE = {f"{name}, r = 64": replace(run, rank=64) for name, run in VARIANTS.items()}  # α stays 16
SHARED_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)  # LoRA's best is among them, with worse on each side


def minus(base: str, levels: Mapping[str, Run], values: Sequence) -> list[tuple[str, str]]:
    """Every other level with `base`, at each of the values that `across` was given."""
    others = [name for name in levels if name != base]
    return [(f"{name}, {v or 'all'}", f"{base}, {v or 'all'}") for v in values for name in others]


# Batch size, run length and capacity: 500 batches of 64 are 32,000 examples, twelve passes.
BATCHES = (32, 64, 128, 256, 512)
LENGTHS = (62, 125, 250, 500, 1000)
WITH_HIGH_RANK = {"LoRA r=64": lora(64), "LoRA r=8": lora(), "full": method("full")}
CAPACITY = {f"r = {r}": lora(r) for r in (1, 4, 16, 64)} | {"full": method("full")}


def in_batches(run: Run, size: int) -> Run:
    """The run, over as many examples as the centre sees, in batches of another size."""
    examples = CENTRE.steps * CENTRE.batch_size
    return replace(run, batch_size=size, steps=examples // size)


# fmt: off
QUESTIONS = {
    "methods": Question(
        "Does LoRA reach full fine-tuning, and beat rivals trained as long, in every script?",
        across(METHODS, "script", SCRIPTS), rivals(SCRIPTS)),
    "pairs": Question(
        "Which method makes the most of few pairs?",
        across(SOME, "pairs", COUNTS), rivals((100, 300, 1000, "all"))),
    "pairs-by-match": Question(
        "And if the rate is chosen by exact match itself?",
        across(SOME, "pairs", COUNTS), rivals((100, 300, 1000, "all")), rate_by="exact_match"),
    "rank": Question(
        "How much rank is enough?",
        {f"r = {r}": lora(r) for r in RANKS}, [(f"r = {2 * r}", f"r = {r}") for r in RANKS[:-1]]),
    "targets": Question(
        "At r = 8, which layers should have LoRA?",
        {name: lora(targets=name) for name in (*EQUAL_BUDGET, "all-linear")}),
    "budget": Question(
        "And at an equal number of parameters?",
        {f"{name}, r = {r}": lora(r, targets=name) for name, r in EQUAL_BUDGET.items()}
        | {"all-linear, r = 8": lora()}),
    "rate": Question(
        "How do LoRA and full fine-tuning depend on the learning rate?",
        {f"LoRA, {lr:g}": lora(lr=lr) for lr in (2e-3, 5e-3, 1e-2, 2e-2)}
        | {f"full, {lr:g}": method("full", lr=lr) for lr in (5e-4, 1e-3, 2e-3, 5e-3)},
        [("LoRA, 0.01", f"LoRA, {lr:g}") for lr in (2e-3, 5e-3, 2e-2)]
        + [("full, 0.001", f"full, {lr:g}") for lr in (5e-4, 2e-3, 5e-3)]),
    "one-rate": Question(  # against the same rank at a rate of its own
        "Which rank comes out best if all are trained at one learning rate?",
        {f"r = {r}, {lr:g}": lora(r, lr=lr) for lr in (2e-3, 1e-2) for r in RANKS},
        [(f"r = {r}, {lr:g}", f"r = {r}") for lr in (2e-3, 1e-2) for r in RANKS], beside="rank"),
    "same-town": Question(
        "Is the order of the methods the same in classification?",
        across({name: replace(run, task="same-town") for name, run in WITH_HEAD.items()},
               "pairs", (500, None)), rivals((500, "all")), score="accuracy"),
    "ten-times": Question(
        "Does training from scratch catch up in ten times the steps?",
        across({LONG: TEN_TIMES}, "script", SCRIPTS),
        [(f"LoRA r=8, {s}", f"{LONG}, {s}") for s in SCRIPTS], "methods", rate_by="exact_match"),
    "ten-times-by-bits": Question(
        "And if its rate is chosen by bits, as everywhere else?",
        across({LONG: TEN_TIMES}, "script", SCRIPTS),
        [(f"LoRA r=8, {s}", f"{LONG}, {s}") for s in SCRIPTS], "methods"),
    "alpha": Question(
        "Does α matter once the learning rate is tuned for it?",
        {f"α = {a:g}": lora(alpha=a) for a in (4.0, 16.0, 64.0)},
        [("α = 4", "α = 16"), ("α = 64", "α = 16")]),
    "fixed-alpha": Question(
        "Which learning rate does each rank want if α stays 16, so that α / r falls?",
        {f"r = {r}, α = 16": lora(r, alpha=16.0) for r in RANKS},
        [(f"r = {r}, α = 16", f"r = {r}") for r in RANKS], beside="rank"),
    "rslora": Question(
        "At r = 64 and α = 16, is α / √r better than α / r, each with its own learning rate?",
        {"α / r": lora(64, alpha=16.0), "α / √r": lora(64, alpha=16.0, rslora=True)}),
    "frozen-a": Question(
        "What is lost when A stays as it was drawn and B alone is trained?",
        {"A and B, r = 8": lora(), "B alone, r = 16": lora(16, method="lora-b")}),
    "optimizer": Question(
        "Does full fine-tuning need Adam?",
        {"Adam": method("full"), "SGD with momentum": method("full-sgd")}),
    "dropout": Question(
        "Is the base's dropout, 0.1 as in its pretraining, of use while it is adapted?",
        DROPOUT, WITH_MINUS_WITHOUT),
    "dropout-short": Question(
        "And in 240 steps of 16 pairs, one and a half passes over them?",
        {label: replace(run, steps=240, batch_size=16) for label, run in DROPOUT.items()},
        WITH_MINUS_WITHOUT),
    "matrices": Question(
        "At one small budget, which matrices (Hu et al. 2021, Table 5)?",
        {f"{name}, r = 16": lora(16, targets=name) for name in ("W_q", "W_k", "W_v", "W_o")}
        | {f"{name}, r = 8": lora(targets=name) for name in ("W_q, W_k", "W_q, W_v")}
        | {"feed-forward, r = 3": lora(3, targets="feed-forward"), "all-linear, r = 2": lora(2),
           "attention, r = 4": lora(4, targets="attention")}),
    "rank-and-targets": Question(
        "Which rank on which matrices (Hu et al. 2021, Table 6)?",
        {f"{name}, r = {r}": lora(r, targets=name)
         for name in ("W_q", "W_q, W_v", "attention", "all-linear") for r in (1, 2, 4, 8, 64)},
        [(f"{name}, r = {r}", f"{name}, r = 64")
         for name in ("W_q", "W_q, W_v", "attention", "all-linear") for r in (1, 8)]),
    "variants": Question(
        "Which variant of LoRA is best, each at a learning rate of its own?",
        VARIANTS | {"full fine-tuning": method("full")},
        [(name, "LoRA") for name in [*VARIANTS, "full fine-tuning"][1:]],
        rate_by="exact_match"),
    "variants-one-rate": Question(
        "And if all are trained at one learning rate?",
        across(VARIANTS, "lr", SHARED_RATES), minus("LoRA", VARIANTS, SHARED_RATES)),
    "variants-64": Question(
        "At r = 64 and α = 16, which variant is best, each at a learning rate of its own?",
        LARGE, [(name, "LoRA, r = 64") for name in list(LARGE)[1:]], rate_by="exact_match"),
    "variants-64-one-rate": Question(
        "And if all are trained at one learning rate?",
        across(LARGE, "lr", (2e-3, 1e-2)), minus("LoRA, r = 64", LARGE, (2e-3, 1e-2))),

    # Findings of Schulman et al. 2025, LoRA Without Regret.
    "batch-size": Question(
        "Does LoRA fall behind as batches grow, if all see the same 32,000 examples?",
        {f"{name}, {n}": in_batches(run, n)
         for n in BATCHES for name, run in WITH_HIGH_RANK.items()},
        minus("full", WITH_HIGH_RANK, BATCHES), score="bits"),
    "run-length": Question(
        "Do short runs want a higher rate, and does LoRA need more steps?",
        across(WITH_HIGH_RANK, "steps", LENGTHS), minus("full", WITH_HIGH_RANK, LENGTHS),
        score="bits"),
    "batch-in-125-steps": Question(
        "And does LoRA fall behind as batches grow, if all take 125 steps?",
        across({name: replace(run, steps=125) for name, run in WITH_HIGH_RANK.items()},
               "batch_size", (16, 64, 256)), minus("full", WITH_HIGH_RANK, (16, 64, 256)),
        score="bits"),
    "rate-in-62-steps": Question(
        "How do LoRA and full fine-tuning depend on the learning rate in 62 steps?",
        {f"LoRA, {lr:g}": lora(lr=lr, steps=62) for lr in (5e-3, 1e-2, 2e-2)}
        | {f"full, {lr:g}": method("full", lr=lr, steps=62) for lr in (2e-3, 5e-3, 1e-2)},
        [("LoRA, 0.01", f"LoRA, {lr:g}") for lr in (5e-3, 2e-2)]
        + [("full, 0.005", f"full, {lr:g}") for lr in (2e-3, 1e-2)], score="bits"),
    "alpha-in-62-steps": Question(
        "Is it the low rank that is slow in 62 steps, or its small α?",
        {f"r = 8, α = {a:g}": lora(alpha=a, steps=62) for a in (128.0, 16.0)}
        | {"r = 64, α = 128": lora(64, steps=62)},
        [("r = 8, α = 128", "r = 8, α = 16"), ("r = 64, α = 128", "r = 8, α = 128")],
        score="bits"),
    "capacity": Question(
        "From how many pairs on is a rank too small to hold what there is to learn?",
        across(CAPACITY, "pairs", COUNTS[1:]), minus("full", CAPACITY, COUNTS[1:]), score="bits"),
    "capacity-by-match": Question(
        "And if the rate is chosen by exact match, so that the pairs are better learned by heart?",
        across(CAPACITY, "pairs", COUNTS[1:]), minus("full", CAPACITY, COUNTS[1:]),
        rate_by="exact_match"),
}
# fmt: on
