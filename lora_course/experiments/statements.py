"""What people say about LoRA, measured on the recorded results and judged.

`statements.toml` holds who says what. A statement is put as one or more measures, each a number
with its interval and the region where the true value lies if the statement holds; `judge` compares
the two. Nothing is typed in: other results give other verdicts.
"""

import math
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lora_course.directions import nearest_cosines_by_chance
from lora_course.experiments.forgetting import minus_full
from lora_course.experiments.questions import (
    CANT_TELL,
    CAPACITY,
    COUNTS,
    EQUAL_BUDGET,
    LARGE,
    NOT_REPRODUCED,
    QUESTIONS,
    REPRODUCED,
    TEN_TIMES,
    THRESHOLD,
    VARIANTS,
    Interval,
    Question,
    Region,
    judge,
    lora,
    mean_interval,
    method,
    paired_difference,
)
from lora_course.experiments.runs import Run, chosen_rate, runs_at, tried_runs
from lora_course.recorded_bits import minus as minus_of_precisions
from lora_course.recorded_rewards import NAMES, runs_at_chosen_rates
from lora_course.recorded_rewards import minus as minus_of_rewards
from lora_course.results import load_table
from lora_lib.names import SCRIPTS, Pair, load_pairs
from lora_lib.pretrained import read_metadata

EXACT, BITS = THRESHOLD["exact_match"], THRESHOLD["bits"]
BETTER = Region(f"more than {EXACT:g} higher", EXACT, math.inf)
NOT_WORSE = Region(f"at most {EXACT:g} lower", -EXACT, math.inf)
NOT_BETTER = Region(f"at most {EXACT:g} higher", -math.inf, EXACT)
LEVEL = Region(f"within {EXACT:g}", -EXACT, EXACT)
FEWER_BITS = Region(f"more than {BITS:g} bits lower", -math.inf, -BITS)
NOT_MORE_BITS = Region(f"at most {BITS:g} bits higher", -math.inf, BITS)
EPSILON = 0.3  # of the intruder test


def about(value: float, words: str) -> Region:
    """A number that a statement gives roughly: within a factor of two."""
    return Region(f"within a factor of two of {words}", value / 2, 2 * value)


class Measure(NamedTuple):
    """One thing that a statement implies: in words, what was found, and where it should lie."""

    statement: str  # its key in statements.toml
    words: str
    found: Interval
    region: Region
    doubt: str = ""  # why it cannot be judged here


# --- differences between recorded runs -----------------------------------------------------------


def minus(
    runs: pd.DataFrame,
    ours: Run | Sequence[Run],
    theirs: Run | Sequence[Run],
    score: str = "exact_match",
    rate_by: str = "bits",
) -> Interval:
    """Ours minus theirs, each one setting or the mean of several; where they have no learning rate,
    each at the one chosen on validation."""

    def by_seed(settings: Run | Sequence[Run]) -> pd.Series:
        settings = [settings] if isinstance(settings, Run) else settings
        levels = {str(run): run for run in settings}
        scores = Question("", levels, score=score, rate_by=rate_by).scores(runs)
        return scores.groupby("seed").mean()

    return paired_difference(by_seed(ours), by_seed(theirs))


def six(run: Run) -> list[Run]:
    """The run in every script."""
    return [replace(run, script=script) for script in SCRIPTS]


EQUAL = {name: lora(rank, targets=name) for name, rank in EQUAL_BUDGET.items()}

# Statement, in words, ours, theirs, where the difference should lie; score, what chose the rates.
# fmt: off
COMPARISONS = (
    ("as-good", "r = 8 minus full, mean of six scripts",
     six(lora()), six(method("full")), NOT_WORSE),
    *(("few-pairs", f"{n} pairs, LoRA minus full, {words}",
       lora(pairs=n), method("full", pairs=n), *judged)
      for n in (100, 300)
      for words, *judged in (
          ("exact match", BETTER),
          ("bits", FEWER_BITS, "bits"),
          ("exact match, rates chosen by it", BETTER, "exact_match", "exact_match"))),
    ("pretraining", "r = 8 minus from scratch, same steps, mean of six scripts",
     six(lora()), six(method("scratch")), BETTER),
    ("longer", "r = 8 minus from scratch with ten times the steps, mean of six scripts",
     six(lora()), six(TEN_TIMES), BETTER, "exact_match", "exact_match"),
    ("q-and-v", "W_q, W_v at r = 38 minus all linear layers at r = 8",
     EQUAL["W_q, W_v"], lora(), NOT_WORSE),
    *(("all-linear", f"all layers of the blocks at r = 9 minus {name} at r = {EQUAL[name].rank}",
       EQUAL["blocks"], EQUAL[name], BETTER)
      for name in ("W_q, W_v", "attention", "feed-forward")),
    ("feed-forward", "feed-forward at r = 15 minus attention at r = 19",
     EQUAL["feed-forward"], EQUAL["attention"], BETTER),
    *(("more-matrices", f"attention at r = 4 minus {name} at r = 16",
       lora(4, targets="attention"), lora(16, targets=name), BETTER)
      for name in ("W_q", "W_k", "W_v", "W_o")),
    ("small-rank", "r = 1 minus r = 64", lora(1), lora(64), NOT_WORSE),
    ("more-rank", "r = 16 minus r = 4", lora(16), lora(4), BETTER),
    *(("alpha", f"α = {a:g} minus α = 16, r = 8", lora(alpha=a), lora(), LEVEL)
      for a in (4.0, 64.0)),
    ("rslora", "r = 64, α = 16, α / √r minus α / r, each at its own rate",
     lora(64, alpha=16.0, rslora=True), lora(64, alpha=16.0), BETTER),
    ("frozen-a", "B alone at r = 16 minus A and B at r = 8",
     lora(16, method="lora-b"), lora(), NOT_WORSE),
    *((statement, f"{name}, r = {run.rank}, minus LoRA, each at its own rate",
       run, replace(run, method="lora", rslora=False), region, "exact_match", "exact_match")
      for statement, region, names in (
          ("dora", BETTER, ["DoRA"]),
          ("pissa", BETTER, ["PiSSA"]),
          ("lora-plus", BETTER, ["LoRA+, ratio 16"]),
          ("variants-level", LEVEL, list(VARIANTS)[1:]))
      for name in names
      for run in (VARIANTS[name], LARGE[f"{name}, r = 64"])),
    ("attention-adds", "all layers of the blocks minus feed-forward alone, both at r = 8",
     lora(targets="blocks"), lora(targets="feed-forward"), NOT_BETTER),
    ("attention-adds", "the same with as many parameters, r = 9 and r = 15",
     EQUAL["blocks"], EQUAL["feed-forward"], NOT_BETTER),
)
# fmt: on


def compare(runs: pd.DataFrame) -> Iterator[Measure]:
    for statement, words, ours, theirs, region, *score in COMPARISONS:
        yield Measure(statement, words, minus(runs, ours, theirs, *score), region)
    for r in (2, 64):
        found = minus(runs, lora(r, lr=chosen_rate(runs, lora())), lora(r))
        words = f"r = {r} at the rate of r = 8, minus r = {r} at its own"
        yield Measure("alpha-2r", words, found, NOT_WORSE)


def highest_rank(runs: pd.DataFrame) -> Iterator[Measure]:
    """r = 64 with every α that is recorded. Like a learning rate, α is chosen on validation."""
    settings = {
        "α = 2r": lora(64),
        "α = 16": lora(64, alpha=16.0),
        "α = 16, rsLoRA": lora(64, alpha=16.0, rslora=True),
    }
    best = min(settings, key=lambda name: tried_runs(runs, settings[name]).validation_bits.iloc[0])
    for statement, other, words, score, region in (
        ("enough-rank", method("full"), "full", "exact_match", NOT_WORSE),
        ("enough-rank", method("full"), "full", "bits", NOT_MORE_BITS),
        ("more-rank", lora(16), "r = 16", "exact_match", BETTER),
    ):
        found = minus(runs, settings[best], other, score)
        what = f"r = 64, {best}, minus {words}, {score.replace('_', ' ')}"
        yield Measure(statement, what, found, region)


# --- learning rates, weight changes --------------------------------------------------------------


def learning_rates(runs: pd.DataFrame) -> Iterator[Measure]:
    statement, ten = "ten-times-the-rate", about(10, "10")
    found = rate_over_full(runs, "rate")
    yield Measure(statement, "r = 8 over full, each seed's best", found, ten)
    settings = [dict(task="write", pairs=n) for n in COUNTS]
    settings += [dict(task="same-town", pairs=n) for n in (500, None)]
    found = geometric_mean(
        [chosen_rate(runs, lora(**s)) / chosen_rate(runs, method("full", **s)) for s in settings]
    )
    yield Measure(statement, "r = 8 over full, geometric mean of six settings", found, ten)

    # The bounds come from the ladder, not from seeds: a best rate lies somewhere between its
    # neighbours, which were tried and are worse.
    below, at, above = neighbours(runs, lora(64, alpha=16.0))
    lower, there, higher = neighbours(runs, lora(8, alpha=16.0))
    words = "α = 16, best rate at r = 64 over that at r = 8 (bounds: the neighbours tried)"
    found = Interval(at / there, below / higher, above / lower)
    yield Measure("rate-and-rank", words, found, about(1, "1"))


def rate_over_full(runs: pd.DataFrame, question: str) -> Interval:
    """LoRA's best rate over that of full fine-tuning, each seed's best of those tried."""
    tried = QUESTIONS[question].runs(runs)
    best = tried.loc[tried.groupby(["method", "seed"]).validation_bits.idxmin()]
    best = best.set_index(["method", "seed"]).lr
    return geometric_mean(best["lora"] / best["full"])


def geometric_mean(ratios: Sequence[float]) -> Interval:
    """With the interval of the mean of their logarithms."""
    return Interval(*map(math.exp, mean_interval([math.log(ratio) for ratio in ratios])))


def neighbours(runs: pd.DataFrame, run: Run) -> list[float]:
    """The best learning rate of a setting, between the next lower and the next higher one tried."""
    rates = sorted(tried_runs(runs, run).lr)
    at = rates.index(chosen_rate(runs, run))
    return rates[at - 1 : at + 2]


def forgotten(looks: pd.DataFrame) -> Iterator[Measure]:
    for skill in ("Arabic", "names alone"):
        for rate, words in (("chosen", "each at its rate"), ("half", "at half of it")):
            found = minus_full(looks, "LoRA r=8", rate, skill)
            words = f"{skill}: bits under r = 8 minus under full, {words}"
            yield Measure("forgetting", words, found, FEWER_BITS)


def in_few_bits(table: pd.DataFrame) -> Iterator[Measure]:
    for statement, other, *regions in (
        ("four-bits", "float32", NOT_WORSE, NOT_MORE_BITS),
        ("normal-levels", "4 bits, even", BETTER, FEWER_BITS),
    ):
        for score, region in zip(("exact_match", "bits"), regions, strict=True):
            found = minus_of_precisions(table, "NF4", other, score)
            words = f"LoRA on NF4, minus on {other}, {score.replace('_', ' ')}"
            yield Measure(statement, words, found, region)


def with_rewards(table: pd.DataFrame) -> Iterator[Measure]:
    runs = runs_at_chosen_rates(table)
    found = minus_of_rewards(runs, ("rewards", "LoRA r=1"), ("rewards", "full"))
    yield Measure("rank-1-rewards", "r = 1 minus full, names right", found, NOT_WORSE)
    for name in NAMES.values():
        pair = ("rewards", name), ("answers", name)
        found = minus_of_rewards(runs, *pair, score="names alone")
        words = f"names alone: bits after rewards minus after answers, {name}"
        yield Measure("rewards-forget-less", words, found, FEWER_BITS)


def what_changes(table: Callable[[str], pd.DataFrame]) -> Iterator[Measure]:
    cuts = table("cuts").pivot(index="seed", columns="rank", values="exact_match")
    words = "exact match with every ΔW cut to rank 8, minus uncut"
    yield Measure("low-rank", words, paired_difference(cuts[8], cuts[128]), NOT_WORSE)

    first = table("similarity").query("i == 1 and j == 1 and side == 'A'")
    first = first[first.pair.eq("r = 8 and r = 64, other seed")]
    for matrix in ("W_q", "W_v"):
        found = mean_interval(first[first.matrix.eq(matrix)].groupby("seed").phi.mean())
        yield Measure(
            "same-direction", f"φ(1, 1) of A, {matrix}", found, Region("above 0.5", 0.5, 1)
        )

    counts = table("intruders").groupby(["method", "seed"]).intruders.sum()
    found = paired_difference(counts["LoRA r = 8"], counts["full fine-tuning"])
    words, more = "flagged of 160, r = 8 minus full", Region("more than 1", 1, math.inf)
    doubt = doubt_of_intruders(read_metadata()["config"]["d_model"])
    yield Measure("intruders", words, found, more, doubt)


def doubt_of_intruders(width: int) -> str:
    """Why the intruder test cannot judge a model of this width: ε is less than twice the cosine
    that random directions reach. Empty where it can."""
    chance = nearest_cosines_by_chance(width)
    if chance.mean() * 2 <= EPSILON:
        return ""
    flagged = (chance < EPSILON).double().mean()
    return (
        f"in width {width} a random direction has a cosine of {chance.mean():.2f} with some "
        f"singular vector by chance, and ε = {EPSILON} calls {flagged:.0%} of random directions "
        "intruders: the limit lies where chance does"
    )


# --- LoRA Without Regret -------------------------------------------------------------------------

MORE_BITS = Region(f"more than {BITS:g} bits higher", BITS, math.inf)
BITS_A_PARAMETER = 2  # that a network can store (Allen-Zhu and Li 2024)


def without_regret(runs: pd.DataFrame) -> Iterator[Measure]:
    """The findings of Schulman et al. 2025 on batch size, run length and capacity."""
    by_batch = QUESTIONS["batch-size"].scores(runs)

    def gaps(rank: int, size: int) -> pd.Series:
        return by_batch[f"LoRA r={rank}, {size}"] - by_batch[f"full, {size}"]

    grown = {r: gaps(r, 512) - gaps(r, 32) for r in (8, 64)}
    for r, growth in grown.items():
        words = f"r = {r} minus full, bits, at batches of 512 minus at 32"
        yield Measure("large-batches", words, mean_interval(growth), MORE_BITS)
    within = Region(f"within {BITS:g} bits", -BITS, BITS)
    words = "the same growth, r = 64 minus r = 8"
    yield Measure("batch-any-rank", words, paired_difference(grown[64], grown[8]), within)

    found = rate_over_full(runs, "rate-in-62-steps")
    words = "r = 8 over full, 62 steps, each seed's best"
    yield Measure("short-runs", words, found, about(15, "15"))

    scores = QUESTIONS["capacity"].scores(runs)
    for n in COUNTS[1:]:
        to_learn = letter_bits(load_pairs("georgian", "train")[:n])
        for name, run in CAPACITY.items():
            if run.method == "full":
                continue
            held = BITS_A_PARAMETER * runs_at({name: run}, runs).trainable.iloc[0]
            gap = paired_difference(scores[f"{name}, {n or 'all'}"], scores[f"full, {n or 'all'}"])
            words = f"{name} minus full, bits, {n or 'all'} pairs"
            yield Measure("capacity", words, gap, NOT_MORE_BITS if held >= to_learn else MORE_BITS)


def letter_bits(pairs: Sequence[Pair]) -> float:
    """The bits that it takes to write down the names to be written, each letter and end of name
    coded by how often it comes: more than there is to learn, since the letters follow rules."""
    counts = Counter(letter for _, name in pairs for letter in f"{name}\n")
    total = counts.total()
    return -sum(n * math.log2(n / total) for n in counts.values())


# --- verdicts ------------------------------------------------------------------------------------


def decide(measures: Sequence[Measure]) -> tuple[str, str]:
    """The worst verdict on the measures of a statement, since one that promises more can fail in
    more ways; and why: the measures that gave it."""
    doubts = [measure.doubt for measure in measures if measure.doubt]
    if doubts:
        return CANT_TELL, doubts[0]
    found = [(judge(measure.found, measure.region), measure) for measure in measures]
    worst = next(v for v in (NOT_REPRODUCED, CANT_TELL, REPRODUCED) if v in dict(found))
    deciding = [measure for verdict, measure in found if verdict == worst]
    regions = " and ".join(dict.fromkeys(measure.region.words for measure in deciding))
    if worst == REPRODUCED:
        return worst, f"as said: {regions}"
    names = "; ".join(measure.words for measure in deciding)
    how = "wholly outside" if worst == NOT_REPRODUCED else "across the limit of"
    return worst, f"{how} “{regions}”: {names}"


def verdicts(table: Callable[[str], pd.DataFrame] = load_table) -> pd.DataFrame:
    """A row a statement: theme, says, source, reported, measured, verdict, why. `table` gives the
    tables that the measures rest on, by name."""
    runs = table("runs")
    measures = [*compare(runs), *highest_rank(runs), *learning_rates(runs)]
    measures += [*forgotten(table("forgetting")), *what_changes(table), *without_regret(runs)]
    measures += in_few_bits(table("bits"))
    measures += with_rewards(table("rewards"))
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    for key, row in rows.items():
        mine = [measure for measure in measures if measure.statement == key]
        row["measured"] = "; ".join(f"{measure.words}: {measure.found}" for measure in mine)
        row["verdict"], why = decide(mine)
        row["why"] = ". ".join([why, row.pop("note")] if "note" in row else [why])
    return pd.DataFrame.from_dict(rows, orient="index")
