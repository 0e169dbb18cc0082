"""Exercises of notebook 06: counting, choosing a rate, and four questions."""

import math
import random
from collections.abc import Callable, Iterator

from lora_course.exercises.checker import Exercise, variants
from lora_course.exercises.choices import Choice

# --- how many numbers LoRA trains ----------------------------------------------------------------


@variants
def counting(shapes, rank, one=lambda d_out, d_in, rank: rank * (d_out + d_in)) -> int:
    return sum(one(d_out, d_in, rank) for d_out, d_in in shapes)


def draw_count() -> Iterator[tuple]:
    """No matrix is square, and one shape comes twice."""
    shapes = [(random.randint(20, 60), random.randint(70, 99)) for _ in range(3)]
    yield [*shapes, shapes[1]], random.randint(3, 9)


lora_parameters = Exercise(
    "06 lora_parameters",
    counting(),
    draw_count,
    mistakes={
        "this counts the whole matrices; LoRA trains A and B": counting(one=lambda o, i, r: o * i),
        "A has r · d_in entries and B has d_out · r; r · d_out · d_in is neither": (
            counting(one=lambda o, i, r: r * o * i)
        ),
        "this counts A alone; B (d_out × r) is trained too": counting(one=lambda o, i, r: r * i),
        "this counts B alone; A (r × d_in) is trained too": counting(one=lambda o, i, r: r * o),
        "this takes both sides for d_in; B has d_out": counting(one=lambda o, i, r: 2 * r * i),
        "r is left out; each factor has r rows or columns": counting(one=lambda o, i, r: o + i),
        "r is squared; A and B have it once each": counting(one=lambda o, i, r: r * r * (o + i)),
        "this adds W itself; it is frozen": counting(one=lambda o, i, r: r * (o + i) + o * i),
        "the mean of the sides was taken; A has d_in and B has d_out": (
            counting(one=lambda o, i, r: r * (o + i) // 2)
        ),
        "only the first matrix is counted; add over all of them": (
            lambda shapes, rank: counting()(shapes[:1], rank)
        ),
        "two matrices of one shape are counted once; each has its own factors": (
            lambda shapes, rank: counting()(set(shapes), rank)
        ),
    },
)

# --- choosing a learning rate --------------------------------------------------------------------

RATES = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)


def draw_rates() -> Iterator[tuple[list[dict]]]:
    """Rates in no order; then also runs that diverged, the first of the list among them."""
    for diverged in ((), (), (0,), (0, 3), (0, 6), (1, 2)):
        bits = [math.nan if n in diverged else random.uniform(0.4, 4) for n in range(len(RATES))]
        yield (
            [
                {"lr": lr, "validation": {"bits": b}, "test": {"bits": b * random.uniform(0.5, 2)}}
                for lr, b in zip(random.sample(RATES, len(RATES)), bits, strict=True)
            ],
        )


def bits(row: dict) -> float:
    return row["validation"]["bits"]


def finite(rows: list[dict]) -> list[dict]:
    return [row for row in rows if math.isfinite(bits(row))]


@variants
def choosing(results: list[dict], score: Callable = bits) -> float:
    """The rate with the lowest score among the runs that did not diverge."""
    return min(finite(results), key=score)["lr"]


choose_rate = Exercise(
    "06 choose_rate",
    choosing(),
    draw_rates,
    mistakes={
        "it chooses by the test score, so what you report on the test towns is too good": (
            choosing(score=lambda row: row["test"]["bits"])
        ),
        "it adds the test bits; the test towns are to report on, not to choose by": (
            choosing(score=lambda row: bits(row) + row["test"]["bits"])
        ),
        "it picks a run that diverged. Every comparison with nan is false, so min and sorted go "
        "wrong quietly: leave such runs out first": lambda results: min(results, key=bits)["lr"],
        "it picks the most bits; fewer are better": choosing(score=lambda row: -bits(row)),
        "it picks the middle of the rates that were tried; their scores decide": (
            lambda rows: sorted(row["lr"] for row in rows)[len(rows) // 2]
        ),
        "it picks the last run that did not diverge": lambda rows: finite(rows)[-1]["lr"],
        "it picks the run whose two scores agree best; the fewest validation bits decide": (
            choosing(score=lambda row: abs(bits(row) - row["test"]["bits"]))
        ),
        "it picks the smallest rate, whatever its score": choosing(score=lambda row: row["lr"]),
        "it picks the largest rate that was tried": lambda rows: max(row["lr"] for row in rows),
        'it returns the whole row; return row["lr"]': lambda rows: min(finite(rows), key=bits),
        "it returns the bits of the best run; return its rate": lambda rows: min(
            map(bits, finite(rows))
        ),
    },
)

# --- four questions ------------------------------------------------------------------------------

alpha = Choice("06 alpha")
memory = Choice("06 memory")
clear_gap = Choice("06 clear_gap")
one_rate = Choice("06 one_rate")
