"""What the recorded runs are for: every question with its design, and the answer they give.

A question names what is compared (its levels), the score, how many seeds, and the threshold below
which a difference is not worth a word, both written down before the runs were made. The levels of
"one-rate" and "rslora" were changed once the first runs were in: at r = 64 and α = 16, α / √r is
what α = 2r gives, so that comparing these two could not have told anything. "pairs-by-match" and
the rate of "ten-times" came last: after many passes over the pairs, bits and exact match want
different rates, and a rival that is judged by exact match deserves the rate that is best for it.
The level "blocks" was added to tell the output layer from the rest, and "dropout-short" was first
asked of 60 steps of 64, in which LoRA wrote next to no name right.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

from scipy import stats

from lora_course.experiments.runs import CENTRE, Run, chosen_rate, rows_of, tried_rates
from lora_lib.names import SCRIPTS

SEEDS = range(5)
RANKS = (1, 2, 4, 8, 16, 32, 64)
# Ranks that give each choice of targets about the parameters of all-linear at r = 8, 79,128.
EQUAL_BUDGET = {"W_q, W_v": 38, "attention": 19, "feed-forward": 15, "blocks": 9}


@dataclass(frozen=True)
class Question:
    """Levels are runs by label; where a level has no learning rate, the one chosen on validation
    for it is used: by bits per character, or by exact match."""

    name: str
    asks: str
    levels: dict[str, Run]
    score: str = "exact_match"  # or accuracy, bits
    threshold: float = 0.02
    rate_by: str = "bits"  # or exact_match

    def runs(self, label: str, rows: list[dict]) -> list[Run]:
        """The runs of one level, one a seed; their learning rate must have been chosen already."""
        run = self.levels[label]
        lr = run.lr or chosen_rate(rows, run, self.rate_by)
        return [replace(run, lr=lr, seed=seed) for seed in SEEDS]

    def by_seed(self, label: str, rows: list[dict], score: str = "") -> dict[int, float]:
        """Seed → test score (the question's unless another is named), for the seeds of one level
        that are recorded; may be empty."""
        run, score = self.levels[label], score or self.score
        if not (run.lr or tried_rates(rows, run)):
            return {}
        found = rows_of(rows, self.runs(label, rows)[0])
        diverged = math.inf if score == "bits" else 0.0  # it gets nothing right
        return {row["seed"]: row["test"][score] if row["test"] else diverged for row in found}

    def scores(self, label: str, rows: list[dict]) -> list[float]:
        """The test score of every recorded seed of one level."""
        return list(self.by_seed(label, rows).values())


def lora(rank: int = 8, **factors) -> Run:
    """The centre at another rank, with α = 2r unless given."""
    return replace(CENTRE, rank=rank, **{"alpha": 2.0 * rank, **factors})


def method(name: str, **factors) -> Run:
    return replace(CENTRE, method=name, **factors)


METHODS = {
    "LoRA r=8": lora(),
    "full fine-tuning": method("full"),
    "from scratch": method("scratch"),
    "head alone": method("head"),
    "LoRA r=8, W_q and W_v": lora(targets="W_q, W_v"),
}
TEN_TIMES = method("scratch", steps=10 * CENTRE.steps)
SOME = {name: METHODS[name] for name in ("LoRA r=8", "full fine-tuning", "from scratch")}
WITH_HEAD = {name: METHODS[name] for name in (*SOME, "head alone")}
WITH_AND_WITHOUT_DROPOUT = {
    f"{name}, dropout {p:g}": replace(run, dropout=p)
    for name, run in SOME.items()
    for p in (0.1, 0.0)
}
LORA_RATES, FULL_RATES = (2e-3, 5e-3, 1e-2, 2e-2), (5e-4, 1e-3, 2e-3, 5e-3)
ONE_RATE = (2e-3, 1e-2)


def _across(levels: dict[str, Run], factor: str, values: Sequence) -> dict[str, Run]:
    return {
        f"{label}, {value or 'all'}": replace(run, **{factor: value})
        for value in values
        for label, run in levels.items()
    }


QUESTIONS = {
    question.name: question
    for question in (
        Question(
            "methods",
            "Does LoRA reach full fine-tuning, and beat rivals trained as long, in every script?",
            _across(METHODS, "script", SCRIPTS),
        ),
        Question(
            "pairs",
            "Which method makes the most of few pairs?",
            _across(SOME, "pairs", (100, 300, 1000, None)),
        ),
        Question(
            "pairs-by-match",
            "And if the rate is chosen by exact match itself?",
            _across(SOME, "pairs", (100, 300, 1000, None)),
            rate_by="exact_match",
        ),
        Question("rank", "How much rank is enough?", {f"r = {r}": lora(r) for r in RANKS}),
        Question(
            "targets",
            "At r = 8, which layers should have LoRA?",
            {name: lora(targets=name) for name in (*EQUAL_BUDGET, "all-linear")},
        ),
        Question(
            "budget",
            "And at an equal number of parameters?",
            {f"{name}, r = {r}": lora(r, targets=name) for name, r in EQUAL_BUDGET.items()}
            | {"all-linear, r = 8": lora()},
        ),
        Question(
            "rate",
            "How do LoRA and full fine-tuning depend on the learning rate?",
            {f"LoRA, {lr:g}": lora(lr=lr) for lr in LORA_RATES}
            | {f"full, {lr:g}": method("full", lr=lr) for lr in FULL_RATES},
        ),
        Question(
            "one-rate",
            "Which rank comes out best if all are trained at one learning rate?",
            {f"r = {r}, {lr:g}": lora(r, lr=lr) for lr in ONE_RATE for r in RANKS},
        ),
        Question(
            "same-town",
            "Is the order of the methods the same in classification?",
            _across({k: replace(v, task="same-town") for k, v in WITH_HEAD.items()},
                    "pairs", (500, None)),
            score="accuracy",
        ),
        Question(
            "ten-times",
            "Does training from scratch catch up in ten times the steps?",
            _across({"from scratch, 10 × the steps": TEN_TIMES}, "script", SCRIPTS),
            rate_by="exact_match",
        ),
        Question(
            "ten-times-by-bits",
            "And if its rate is chosen by bits, as everywhere else?",
            _across({"from scratch, 10 × the steps": TEN_TIMES}, "script", SCRIPTS),
        ),
        Question(
            "alpha",
            "Does α matter once the learning rate is tuned for it?",
            {f"α = {a:g}": lora(alpha=a) for a in (4.0, 16.0, 64.0)},
        ),
        Question(
            "rslora",
            "At r = 64 and α = 16, is α / √r better than α / r, each with its own learning rate?",
            {"α / r": lora(64, alpha=16.0), "α / √r": lora(64, alpha=16.0, rslora=True)},
        ),
        Question(
            "frozen-a",
            "What is lost when A stays as it was drawn and B alone is trained?",
            {"A and B, r = 8": lora(), "B alone, r = 16": replace(lora(16), method="lora-b")},
        ),
        Question(
            "optimizer",
            "Does full fine-tuning need Adam?",
            {"Adam": method("full"), "SGD with momentum": method("full-sgd")},
        ),
        Question(
            "dropout",
            "Is the base's dropout, 0.1 as in its pretraining, of use while it is adapted?",
            WITH_AND_WITHOUT_DROPOUT,
        ),
        Question(
            "dropout-short",
            "And in 240 steps of 16 pairs, one and a half passes over them?",
            {k: replace(run, steps=240, batch_size=16)
             for k, run in WITH_AND_WITHOUT_DROPOUT.items()},
        ),
        Question(
            "matrices",
            "At one small budget, which matrices (Hu et al. 2021, Table 5)?",
            {f"{name}, r = 16": lora(16, targets=name) for name in ("W_q", "W_k", "W_v", "W_o")}
            | {f"{name}, r = 8": lora(targets=name) for name in ("W_q, W_k", "W_q, W_v")}
            | {
                "attention, r = 4": lora(4, targets="attention"),
                "feed-forward, r = 3": lora(3, targets="feed-forward"),
                "all-linear, r = 2": lora(2),
            },
        ),
        Question(
            "rank-and-targets",
            "Which rank on which matrices (Hu et al. 2021, Table 6)?",
            {f"{name}, r = {r}": lora(r, targets=name)
             for name in ("W_q", "W_q, W_v", "attention", "all-linear") for r in (1, 2, 4, 8, 64)},
        ),
    )
}  # fmt: skip


# --- answers -------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A mean (of differences, where two settings are compared), and the interval that would hold
    the true one in 95 of 100 such experiments."""

    mean: float
    low: float
    high: float

    def verdict(self, threshold: float) -> str:
        """ "higher" or "lower" if the whole interval lies beyond the threshold, "level" if it lies
        within it on both sides, "can't tell" otherwise."""
        if self.low > threshold:
            return "higher"
        if self.high < -threshold:
            return "lower"
        return "level" if max(-self.low, self.high) <= threshold else "can't tell"

    def __str__(self) -> str:
        if self.low == self.high:  # without spread
            return number(self.mean)
        return f"{number(self.mean)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Three digits and a minus sign that cannot be taken for a dash."""
    return f"{value:.3g}".replace("-", "−")


def mean_interval(values: Sequence[float]) -> Difference:
    """The mean of one value a seed, with Student's 95 % interval.

    Raises ValueError for fewer than two values: one says nothing about the spread.
    """
    if len(values) < 2:
        raise ValueError(
            f"an interval needs the spread of two or more seeds; {len(values)} given: {values}"
        )
    middle, error = mean(values), stats.sem(values)
    if error == 0:
        return Difference(middle, middle, middle)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=middle, scale=error)
    return Difference(middle, float(low), float(high))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Ours minus theirs, seed by seed, with Student's 95 % interval for the mean.

    Raises ValueError unless both have the same number of seeds, two or more.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(
            f"{len(ours)} and {len(theirs)} scores were given; pairs of seeds are compared, so "
            "give two or more of each, in the same order"
        )
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])
