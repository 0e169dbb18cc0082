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
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_course.directions import nearest_cosines_by_chance
from lora_course.experiments.forgetting import minus_full
from lora_course.experiments.questions import (
    CANT_TELL,
    CAPACITY,
    COUNTS,
    EQUAL_BUDGET,
    LARGE,
    LENGTHS,
    NOT_REPRODUCED,
    QUESTIONS,
    REPRODUCED,
    TEN_TIMES,
    THRESHOLD,
    VARIANTS,
    WITH_HIGH_RANK,
    Interval,
    Question,
    Region,
    judge,
    lora,
    mean_interval,
    method,
    number,
    paired_difference,
)
from lora_course.experiments.runs import Run, chosen_rate, runs_at, tried_runs
from lora_course.recorded_bits import minus as minus_of_precisions
from lora_course.recorded_rewards import NAMES, runs_at_chosen_rates
from lora_course.recorded_rewards import minus as minus_of_rewards
from lora_course.results import load_table
from lora_lib.adapters import load_adapter
from lora_lib.injection import unload_lora
from lora_lib.names import SCRIPTS, Pair, load_pairs
from lora_lib.pretrained import adapter_directory, load_pretrained, read_metadata

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
    """One thing that a statement implies: in words, what was found, and where it should lie. What
    has no region is shown, but not judged."""

    statement: str  # its key in statements.toml
    words: str
    found: Interval | str
    region: Region | None = None
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
    ("all-linear", "with it, all-linear at r = 8 minus the blocks at r = 9",
     lora(), EQUAL["blocks"], None),
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

    def validation_bits(name: str) -> float:
        return tried_runs(runs, settings[name]).validation_bits.iloc[0]

    best = min(settings, key=validation_bits)
    for statement, other, words, judged in (
        ("enough-rank", method("full"), "full", {"exact_match": NOT_WORSE, "bits": NOT_MORE_BITS}),
        ("more-rank", lora(16), "r = 16", {"exact_match": BETTER}),
    ):
        for name in sorted(settings, key=validation_bits):
            for score, region in judged.items():
                found = minus(runs, settings[name], other, score)
                what = f"r = 64, {name}, minus {words}, {score.replace('_', ' ')}"
                if name == best:
                    yield Measure(statement, what, found, region)
                else:
                    yield Measure(statement, f"not chosen on validation: {what}", found)


# --- learning rates, weight changes, costs -------------------------------------------------------


def learning_rates(runs: pd.DataFrame) -> Iterator[Measure]:
    statement, ten = "ten-times-the-rate", about(10, "10")
    found = rate_over_full(runs, "rate")
    yield Measure(statement, "r = 8 over full, each seed's best", found, ten)
    ratios = {
        f"{task}, {n or 'all'} pairs": chosen_rate(runs, lora(task=task, pairs=n))
        / chosen_rate(runs, method("full", task=task, pairs=n))
        for task, counts in (("write", (100, 300, 1000, None)), ("same-town", (500, None)))
        for n in counts
    }
    found = geometric_mean(list(ratios.values()))
    yield Measure(statement, "r = 8 over full, geometric mean of six settings", found, ten)
    for setting, ratio in ratios.items():
        yield Measure(statement, setting, f"{number(ratio)} times")

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
    each, half = ("chosen", "each at its rate"), ("half", "at half of it")
    for skill in ("Arabic", "names alone"):
        for rate, words in (each, half):
            found = minus_full(looks, "LoRA r=8", rate, skill)
            words = f"{skill}: bits under r = 8 minus under full, {words}"
            yield Measure("forgetting", words, found, FEWER_BITS)
    for r, rate, words, skills in (  # the skill that has to go, a high rank, one rate for both
        (8, *each, ("Cyrillic",)),
        (64, *each, ("Arabic", "names alone")),
        (8, "full's", "both at the rate of full", ("Arabic", "names alone")),
    ):
        for skill in skills:
            found = minus_full(looks, f"LoRA r={r}", rate, skill)
            yield Measure("forgetting", f"not judged: {skill}, r = {r}, {words}", found)


def in_few_bits(table: pd.DataFrame) -> Iterator[Measure]:
    judged = {"exact_match": NOT_WORSE, "bits": NOT_MORE_BITS}
    for name, regions in (("NF4", judged), ("3 bits, even", {}), ("2 bits, even", {})):
        for score in ("exact_match", "bits"):
            found = minus_of_precisions(table, name, "float32", score)
            words = f"LoRA on {name}, minus on float32, {score.replace('_', ' ')}"
            yield Measure("four-bits", words, found, regions.get(score))
    for bits in (4, 3):
        for score, region in (("exact_match", BETTER), ("bits", FEWER_BITS)):
            found = minus_of_precisions(table, f"NF{bits}", f"{bits} bits, even", score)
            words = f"LoRA on NF{bits}, minus on {bits} bits, even, {score.replace('_', ' ')}"
            yield Measure("normal-levels", words, found, region if bits == 4 else None)


def with_rewards(table: pd.DataFrame) -> Iterator[Measure]:
    runs = runs_at_chosen_rates(table)
    for task, region in (("rewards", NOT_WORSE), ("answers", None)):
        found = minus_of_rewards(runs, (task, "LoRA r=1"), (task, "full"))
        yield Measure("rank-1-rewards", f"{task}: r = 1 minus full, names right", found, region)
    for name in NAMES.values():
        pair = ("rewards", name), ("answers", name)
        found = minus_of_rewards(runs, *pair, score="names alone")
        words = f"names alone: bits after rewards minus after answers, {name}"
        yield Measure("rewards-forget-less", words, found, FEWER_BITS)
        found = minus_of_rewards(runs, *pair, score="kl")
        yield Measure("rewards-forget-less", f"KL from the start, the same, {name}", found)


def what_changes(table: Callable[[str], pd.DataFrame]) -> Iterator[Measure]:
    cuts = table("cuts").pivot(index="seed", columns="rank", values="exact_match")
    words = "exact match with every ΔW cut to rank 8, minus uncut"
    yield Measure("low-rank", words, paired_difference(cuts[8], cuts[128]), NOT_WORSE)
    k90 = table("k90").query("method == 'full' and script == 'georgian'")
    k90 = k90[k90.matrix.str.startswith("W_")]
    width = read_metadata()["config"]["d_model"]
    words = f"mean k90 of the attention matrices, of {width}"
    yield Measure("low-rank", words, f"{k90.k90.mean():.1f}")
    yield Measure("low-rank", "Gaussian noise of equal norm", f"{k90.k90_of_noise.mean():.1f}")

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
    yield Measure("intruders", words, found, more, doubt_of_intruders(width))
    for name in ("LoRA r = 8", "LoRA r = 64", "full fine-tuning"):
        span = f"{counts[name].min()} to {counts[name].max()}"
        yield Measure("intruders", f"{name}, lowest to highest seed", span)


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


def costs(runs: pd.DataFrame) -> Iterator[Measure]:
    def exactly(value: float) -> Interval:
        return Interval(value, value, value)

    levels = {"full": method("full"), "lora": lora()}
    trainable = runs_at(levels, runs).groupby("level").trainable.first()
    found = exactly(1 - trainable["lora"] / trainable["full"])
    yield Measure("parameters", "fewer, r = 8", found, Region("0.99 or more", 0.99, 1))
    # In float32 a weight takes 4 bytes; its gradient and Adam's two means, where trained, 12 more.
    found = exactly((4 * trainable["full"] + 16 * trainable["lora"]) / (16 * trainable["full"]))
    words = "weights, gradients and Adam's state, r = 8 over full"
    yield Measure("memory", words, found, about(1 / 3, "a third"))

    adapted = load_adapter(load_pretrained()[0], adapter_directory("georgian"))
    base, unmerged = flops(load_pretrained()[0]), flops(adapted)
    found = exactly(flops(unload_lora(adapted, merge=True)) / base)
    yield Measure("use", "arithmetic, merged over base", found, Region("exactly 1", 1, 1))
    yield Measure("use", "unmerged", number(unmerged / base))


def flops(model: torch.nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, 24, dtype=torch.long))
    return counter.get_total_flops()


# --- LoRA Without Regret -------------------------------------------------------------------------

MORE_BITS = Region(f"more than {BITS:g} bits higher", BITS, math.inf)
BITS_A_PARAMETER = 2  # that a network can store (Allen-Zhu and Li 2024)


def without_regret(runs: pd.DataFrame) -> Iterator[Measure]:
    """The findings of Schulman et al. 2025 on batch size, run length and capacity."""

    def gaps(question: str, rank: int, value: int) -> pd.Series:
        scores = QUESTIONS[question].scores(runs)
        return scores[f"LoRA r={rank}, {value}"] - scores[f"full, {value}"]

    grown = {r: gaps("batch-size", r, 512) - gaps("batch-size", r, 32) for r in (8, 64)}
    for r, growth in grown.items():
        words = f"r = {r} minus full, bits, at batches of 512 minus at 32"
        yield Measure("large-batches", words, mean_interval(growth), MORE_BITS)
        growth = gaps("batch-in-125-steps", r, 256) - gaps("batch-in-125-steps", r, 16)
        words = f"not judged: all in 125 steps, r = {r}, at 256 minus at 16"
        yield Measure("large-batches", words, mean_interval(growth))
    within = Region(f"within {BITS:g} bits", -BITS, BITS)
    words = "the same growth, r = 64 minus r = 8"
    yield Measure("batch-any-rank", words, paired_difference(grown[64], grown[8]), within)

    found = rate_over_full(runs, "rate-in-62-steps")
    words = "r = 8 over full, 62 steps, each seed's best"
    yield Measure("short-runs", words, found, about(15, "15"))
    for steps in LENGTHS:
        rates = [chosen_rate(runs, replace(run, steps=steps)) for run in WITH_HIGH_RANK.values()]
        high, low, full = rates
        words = f"{number(low / full)} times at r = 8, {number(high / full)} times at r = 64"
        yield Measure("short-runs", f"{steps} steps", words)

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
    judged = [measure for measure in measures if measure.region]
    doubts = [measure.doubt for measure in judged if measure.doubt]
    if doubts:
        return CANT_TELL, doubts[0]
    found = [(judge(measure.found, measure.region), measure) for measure in judged]
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
    measures = [*compare(runs), *highest_rank(runs), *learning_rates(runs), *costs(runs)]
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
