"""Answers: the recorded differences between the levels of every question.

Scores are paired by seed, since two runs of one seed see their batches in the same order; what a
seed adds to both then cancels. The interval is over seeds. The test towns are the same in all
runs, so it says nothing about other towns.
"""

from collections.abc import Sequence
from statistics import mean

from lora_course.experiments.questions import (
    QUESTIONS,
    SEEDS,
    Difference,
    Question,
    paired_difference,
)
from lora_lib.names import SCRIPTS

Level = tuple[str, str]  # the name of a question, and the label of one of its levels


class NoVerdict(Exception):
    """There is nothing to judge; the arguments are what stands in place of the verdict, and why."""


def not_recorded(seeds: int) -> NoVerdict:
    return NoVerdict(
        f"not recorded yet ({seeds} of {len(SEEDS)} seeds)", "the runs are still to be made"
    )


def by_seed(levels: Sequence[Level], rows: list[dict], score: str = "") -> dict[int, float]:
    """Seed → test score, averaged over the levels, for the seeds that all of them have."""
    scores = [QUESTIONS[name].by_seed(label, rows, score) for name, label in levels]
    seeds = set.intersection(*(set(found) for found in scores))
    return {seed: mean(found[seed] for found in scores) for seed in sorted(seeds)}


def difference(
    ours: Sequence[Level], theirs: Sequence[Level], rows: list[dict], score: str = ""
) -> Difference:
    """Ours minus theirs. Raises NoVerdict unless both have every seed of SEEDS."""
    a, b = by_seed(ours, rows, score), by_seed(theirs, rows, score)
    both = a.keys() & b.keys()
    if len(both) < len(SEEDS):
        raise not_recorded(len(both))
    return paired_difference([a[seed] for seed in SEEDS], [b[seed] for seed in SEEDS])


# --- which levels answer a question --------------------------------------------------------------


def _rivals(question: str, values: Sequence) -> list[tuple[Level, Level]]:
    return [
        ((question, f"LoRA r=8, {value}"), (question, f"{rival}, {value}"))
        for rival in ("full fine-tuning", "from scratch")
        for value in values
    ]


def _others(question: str, label: str, start: str = "") -> list[tuple[Level, Level]]:
    """One level against all others of its question whose label begins with `start`."""
    return [
        ((question, label), (question, other))
        for other in QUESTIONS[question].levels
        if other != label and other.startswith(start)
    ]


COMPARED: dict[str, list[tuple[Level, Level]]] = {
    "methods": _rivals("methods", SCRIPTS),
    "pairs": _rivals("pairs", (100, 300, 1000, "all")),
    "pairs-by-match": _rivals("pairs-by-match", (100, 300, 1000, "all")),
    "rank": [(("rank", f"r = {2 * r}"), ("rank", f"r = {r}")) for r in (1, 2, 4, 8, 16, 32)],
    "targets": _others("targets", "all-linear"),
    "budget": _others("budget", "all-linear, r = 8"),
    "rate": _others("rate", "LoRA, 0.01", "LoRA") + _others("rate", "full, 0.001", "full"),
    "one-rate": [  # against the same rank at a rate of its own
        (("one-rate", label), ("rank", label.partition(",")[0]))
        for label in QUESTIONS["one-rate"].levels
    ],
    "same-town": _rivals("same-town", (500, "all")),
    **{
        name: [
            (("methods", f"LoRA r=8, {s}"), (name, f"from scratch, 10 × the steps, {s}"))
            for s in SCRIPTS
        ]
        for name in ("ten-times", "ten-times-by-bits")
    },
    "alpha": [(("alpha", f"α = {a}"), ("alpha", "α = 16")) for a in (4, 64)],
    "rslora": _others("rslora", "α / √r"),
    "frozen-a": _others("frozen-a", "B alone, r = 16"),
    "optimizer": _others("optimizer", "SGD with momentum"),
    **{
        name: [
            ((name, f"{method}, dropout 0"), (name, f"{method}, dropout 0.1"))
            for method in ("LoRA r=8", "full fine-tuning", "from scratch")
        ]
        for name in ("dropout", "dropout-short")
    },
    "matrices": _others("matrices", "attention, r = 4"),
    "rank-and-targets": [
        (("rank-and-targets", f"{name}, r = {r}"), ("rank-and-targets", f"{name}, r = 64"))
        for name in ("W_q", "W_q, W_v", "attention", "all-linear")
        for r in (1, 8)
    ],
}


def answers(question: Question, rows: list[dict]) -> list[list[str]]:
    """The answers to a question, a row each: what was compared, the difference with its interval,
    and the verdict at the question's threshold."""
    table = []
    for ours, theirs in COMPARED[question.name]:
        elsewhere = f" of “{theirs[0]}”" if theirs[0] != ours[0] else ""
        words = f"{ours[1]}, minus {theirs[1]}{elsewhere}"
        try:
            found = difference([ours], [theirs], rows)
            table.append([words, str(found), found.verdict(question.threshold)])
        except NoVerdict as reason:
            table.append([words, "", reason.args[0]])
    return table
