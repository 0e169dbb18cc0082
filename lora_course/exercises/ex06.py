"""Exercises of notebook 06: counting, choosing a rate, and four questions."""

import math
import random
from collections.abc import Callable, Iterator, Sequence

from lora_course.exercises.checker import Choice, Exercise

# --- how many numbers LoRA trains ----------------------------------------------------------------


def reference_count(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    return sum(rank * (d_out + d_in) for d_out, d_in in shapes)


def draw_count() -> Iterator[tuple]:
    """No matrix is square, and one shape comes twice."""
    shapes = [(random.randint(20, 60), random.randint(70, 99)) for _ in range(3)]
    yield [*shapes, shapes[1]], random.randint(3, 9)


def counting(one: Callable[[int, int, int], int]) -> Callable:
    """A count that adds `one` of (d_out, d_in, rank) over the shapes."""
    return lambda shapes, rank: sum(one(d_out, d_in, rank) for d_out, d_in in shapes)


lora_parameters = Exercise(
    "06 lora_parameters",
    reference_count,
    draw_count,
    mistakes={
        "this counts the whole matrices; LoRA trains A and B": counting(lambda o, i, r: o * i),
        "A has r · d_in entries and B has d_out · r; r · d_out · d_in is neither": (
            counting(lambda o, i, r: r * o * i)
        ),
        "this counts A alone; B (d_out × r) is trained too": counting(lambda o, i, r: r * i),
        "this counts B alone; A (r × d_in) is trained too": counting(lambda o, i, r: r * o),
        "this takes both sides for d_in; B has d_out": counting(lambda o, i, r: 2 * r * i),
        "the rank is left out; each factor has r rows or columns": counting(lambda o, i, r: o + i),
        "the rank is squared; A and B have it once each": counting(lambda o, i, r: r * r * (o + i)),
        "this adds the weight itself; it is frozen": counting(lambda o, i, r: r * (o + i) + o * i),
        "the mean of the sides was taken; A has d_in and B has d_out": (
            counting(lambda o, i, r: r * (o + i) // 2)
        ),
        "only the first matrix is counted; add over all of them": lambda shapes, rank: (
            reference_count(shapes[:1], rank)
        ),
        "two matrices of one shape are counted once; each has its own factors": (
            lambda shapes, rank: reference_count(set(shapes), rank)
        ),
    },
    why="The count grows with the two sides of a matrix, not with their product, so wide and "
    "narrow targets cost differently at the same rank.",
    hints=[
        "One matrix first: how many entries has A (r × d_in), how many has B (d_out × r)?",
        "Add the two for each (d_out, d_in) in shapes, then add over the shapes.",
        "sum(rank * (… + …) for d_out, d_in in shapes)",
    ],
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


def choosing(score: Callable[[dict], float]) -> Callable:
    """A choice of the lowest score among the runs that did not diverge."""
    return lambda results: min(finite(results), key=score)["lr"]


choose_rate = Exercise(
    "06 choose_rate",
    lambda results: min(finite(results), key=bits)["lr"],
    draw_rates,
    mistakes={
        "it chooses by the test score, so what you report on the test towns is too good": (
            choosing(lambda row: row["test"]["bits"])
        ),
        "it adds the test bits; the test towns are to report on, not to choose by": (
            choosing(lambda row: bits(row) + row["test"]["bits"])
        ),
        "it picks a run that diverged. Every comparison with nan is false, so min and sorted go "
        "wrong quietly: leave such runs out first": lambda results: min(results, key=bits)["lr"],
        "it picks the most bits; fewer are better": choosing(lambda row: -bits(row)),
        "it picks the middle of the rates that were tried; their scores decide": lambda rows: (
            sorted(row["lr"] for row in rows)[len(rows) // 2]
        ),
        "it picks the last run that did not diverge; compare their bits": lambda rows: finite(rows)[
            -1
        ]["lr"],
        "it picks the run whose two scores agree best; the fewest validation bits decide": (
            choosing(lambda row: abs(bits(row) - row["test"]["bits"]))
        ),
        "it picks the smallest rate, whatever its score": choosing(lambda row: row["lr"]),
        "it picks the largest rate that was tried": lambda rows: max(row["lr"] for row in rows),
        'it returns the whole row; return its learning rate, row["lr"]': lambda results: min(
            finite(results), key=bits
        ),
        "it returns the bits of the best run; return its learning rate": lambda results: min(
            map(bits, finite(results))
        ),
    },
    why="Validation chooses and test reports, so the reported number was not picked for being "
    "good.",
    hints=[
        'Each row is a dictionary; its score for choosing is row["validation"]["bits"].',
        "Leave out the rows whose score is not finite (math.isfinite), then take the smallest.",
        'min(rows, key=lambda row: row["validation"]["bits"]) gives a row; return its "lr".',
    ],
)

# --- four questions ------------------------------------------------------------------------------

alpha = Choice(
    "06 alpha",
    "“α is just the learning rate.” You double α and leave the rest. Under Adam (ε = 0, no "
    "weight decay, no clipping), what would have done exactly the same to the training?",
    {
        "Doubling the learning rate of A and of B.": "that moves B A by more than a factor of two, "
        "since A's steps double as well: α and the one shared rate are related, not the same knob",
        "Doubling the learning rate of B alone.": "Doubling B's steps doubles B, and with it ΔW, "
        "as doubling α does, while A turns as fast as before; one shared rate would also make A "
        "turn twice as fast.",
        "Doubling the rank.": "the rank changes how many directions there are, and with α fixed it "
        "lowers α / r",
        "Nothing else does: α acts on the outputs, a learning rate on the steps.": "Adam's steps "
        "do not depend on the size of the gradient, so a factor on the output can be moved into "
        "the steps of B",
    },
    right="b",
    hint="B starts at zero, so B is the sum of its steps. What does a twice larger step make of "
    "B A, and what does a twice larger α?",
)

memory = Choice(
    "06 memory",
    "Training a 7B model with LoRA on all linear layers at r = 16 runs out of memory by 3 GB. A "
    "colleague proposes r = 8. What do you expect?",
    {
        "It saves roughly a third of a gigabyte, so it still does not fit.": "The frozen base and "
        "the activations dominate; a shorter batch, checkpointing or a quantised base is where "
        "gigabytes are.",
        "Memory halves: half the rank, half the trainable parameters.": "the trainable part does "
        "halve, but it was a small part: work it out with 16 bytes for each trainable parameter "
        "and 2 for each frozen one",
        "It saves nothing, as the optimizer state does not depend on the rank.": "it does depend "
        "on it: Adam keeps two numbers for each trainable one. It is only small beside the base",
        "It fits, because activations shrink with the rank.": "A's gradient needs the layer's full "
        "input, so LoRA keeps the same activations at any rank, plus r numbers a token",
    },
    right="a",
    hint="About 40 million parameters are trained at r = 16, at 16 bytes each. How many at r = 8?",
)

clear_gap = Choice(
    "06 clear_gap",
    "Five seeds each, at their tuned rates: r = 1 writes between .360 and .373 of the unseen towns "
    "exactly, r = 8 between .528 and .541. What do you write?",
    {
        "r = 8 beats r = 1 on this task.": "The worst seed of r = 8 lies far above the best of "
        "r = 1, each at its own rate: say so plainly, and say for which task.",
        "Nothing about ranks: five seeds are too few to compare anything.": "how many seeds it "
        "takes depends on the gap. This one is ten times as wide as either spread",
        "r = 8 beats r = 1, and r = 64 would be better still.": "the second half does not follow: "
        "two ranks say nothing of a third, which needs runs of its own",
        "r = 8 has the higher learning rate, and that explains it.": "each rank has the rate that "
        "suits it best on validation, and r = 1 took the higher one",
    },
    right="a",
    hint="Compare the gap between the two ranks with the spread inside each.",
)

one_rate = Choice(
    "06 one_rate",
    "A blog post trains r = 1, 8 and 64 with one learning rate, chosen at r = 8, and α = 2r. "
    "r = 8 wins. What has it shown?",
    {
        "That r = 8 is the right capacity for the task.": "the figure above orders the ranks in "
        "other ways at other rates; capacity was not the only thing that changed",
        "That higher ranks overfit.": "overfitting is a gap between training and validation; a too "
        "large step shows as a poor fit to both",
        "That α should be larger.": "nothing here varied α / r, which is 2 throughout",
        "That r = 8 wins at the rate chosen for it.": "With α / r held, a higher rank takes larger "
        "steps at the same rate, so capacity and step size changed together; tune the rate for "
        "every rank, or say that you did not.",
    },
    right="d",
    hint="Which of the three ranks was given the rate that suits it?",
)
