"""Checks of the exercises in notebook 06."""

import copy
import math
import random
from collections.abc import Callable, Sequence

from lora_course.exercises.checker import Choice, Exercise, Wrong


def _made_up_results(diverged: Sequence[int]) -> list[dict]:
    """Seven runs, rates shuffled; best on validation, best on test, largest rate, most bits, best
    exact match: each another run. `diverged`: where in the list a run has no finite score."""
    rates = random.sample([3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2], 6)
    rates.insert(random.randint(1, 6), 5e-2)
    low, second, high = random.uniform(0.4, 0.6), random.uniform(0.7, 0.8), random.uniform(3, 4)
    validation = [random.uniform(0.9, 2.0) for _ in rates]
    test = [random.uniform(0.9, 2.0) for _ in rates]
    free = [i for i, rate in enumerate(rates) if rate < 5e-2 and i not in diverged]
    best, best_test, worst = random.sample(free, 3)
    validation[best], test[best] = low, second
    validation[best_test], test[best_test] = second, low
    validation[worst], test[worst] = high, high
    for i in diverged:
        validation[i] = test[i] = math.nan
    return [
        {"lr": rate, "validation": {"bits": v}, "test": {"bits": t}}
        for rate, v, t in zip(rates, validation, test, strict=True)
    ]


def _test_choose_rate(choose: Callable[[list[dict]], float]) -> None:
    for diverged in ((), (0,), (0, 3), (6,)):
        results = _made_up_results(diverged)
        _compare_rate(choose(copy.deepcopy(results)), results)


def _compare_rate(answer, results: list[dict]) -> None:
    finite = [row for row in results if math.isfinite(row["validation"]["bits"])]
    right = min(finite, key=lambda row: row["validation"]["bits"])
    if isinstance(answer, dict):
        raise Wrong('it returns the whole row; return its learning rate, row["lr"]')
    if not isinstance(answer, float):
        raise Wrong(f"it returns {answer!r}, not a learning rate; is the `return` there?")
    if answer == right["lr"]:
        return
    if answer == right["validation"]["bits"]:
        raise Wrong('it returns the bits of the best run; return the rate they belong to, ["lr"]')
    chosen = [row for row in results if row["lr"] == answer]
    if not chosen:
        raise Wrong(f"{answer:g} is not the learning rate of any of the runs")
    if math.isnan(chosen[0]["validation"]["bits"]):
        raise Wrong(
            "it picks a run that diverged (its bits are nan). Every comparison with nan is false, "
            "so min and sorted go wrong quietly: leave such runs out first"
        )
    if answer == max(row["lr"] for row in results):
        raise Wrong("it picks the largest rate that was tried, whatever its score")
    if answer == min(finite, key=lambda row: row["test"]["bits"])["lr"]:
        raise Wrong(
            "it picks by the test score. Then the test towns have been used to choose, and what "
            "you report on them is too good: choose by validation"
        )
    if answer == max(finite, key=lambda row: row["validation"]["bits"])["lr"]:
        raise Wrong("it picks the most bits per character; fewer bits are better")
    raise Wrong(
        f"it picks {answer:g}; the fewest validation bits are at {right['lr']:g} "
        f"({right['validation']['bits']:.3f})"
    )


choose_rate = Exercise(
    "06 choose_rate",
    _test_choose_rate,
    contract="choose_rate(results) returns the learning rate of one of the rows.",
    why="Validation chooses and test reports, so the reported number was not picked for being "
    "good.",
    hints=[
        'Each row is a dictionary; its score for choosing is row["validation"]["bits"].',
        "Leave out the rows whose score is not finite (math.isfinite), then take the smallest.",
        'min(rows, key=lambda row: row["validation"]["bits"]) gives a row; return its "lr".',
    ],
)


def _test_lora_parameters(count: Callable[[Sequence[tuple[int, int]], int], int]) -> None:
    for _ in range(3):
        shapes, rank = _telling_shapes()
        _compare_count(count(list(shapes), rank), shapes, rank)


def _telling_shapes() -> tuple[list[tuple[int, int]], int]:
    """Random shapes and a rank for which every mistake gives another number."""
    while True:
        shapes = [(random.randint(20, 60), random.randint(70, 99)) for _ in range(4)]
        rank = random.randint(2, 9)
        numbers = [number for number, _ in _count_mistakes(shapes, rank)]
        numbers.append(rank * sum(o + i for o, i in shapes))
        if len(set(numbers)) == len(numbers):
            return shapes, rank


def _count_mistakes(shapes: list[tuple[int, int]], rank: int) -> list[tuple[int, str]]:
    rows, columns = sum(o for o, _ in shapes), sum(i for _, i in shapes)
    full = sum(o * i for o, i in shapes)
    return [
        (full, "this counts the whole matrices, d_out · d_in; LoRA trains only A and B"),
        (rank * full, "this multiplies the whole matrix by r; A has r · d_in entries and B has "
         "d_out · r, which are added"),
        (rank * columns, "this counts A alone; B (d_out × r) is trained as well"),
        (rank * rows, "this counts B alone; A (r × d_in) is trained as well"),
        (2 * rank * columns, "this takes every matrix for square, with d_in on both sides; use "
         "d_out for B"),
        (2 * rank * rows, "this takes every matrix for square, with d_out on both sides; use d_in "
         "for A"),
        (rows + columns, "the rank is left out: each factor has r rows or r columns"),
        (rank * sum(shapes[0]), "only the first matrix is counted; add over all of them"),
        (rank * sum(shapes[-1]), "only the last matrix is counted; add over all of them"),
    ]  # fmt: skip


def _compare_count(answer, shapes: list[tuple[int, int]], rank: int) -> None:
    if not isinstance(answer, (int, float)):
        raise Wrong(f"it returns {answer!r}, not a number; is the `return` there?")
    right = rank * sum(o + i for o, i in shapes)
    if answer == right:
        return
    for number, message in _count_mistakes(shapes, rank):
        if answer == number:
            raise Wrong(message)
    raise Wrong(f"for {shapes} and r = {rank} it gives {answer}, not {right}")


lora_parameters = Exercise(
    "06 lora_parameters",
    _test_lora_parameters,
    contract="lora_parameters(shapes, rank) returns a whole number.",
    why="The count grows with the two sides of a matrix, not with their product, so wide and "
    "narrow targets cost differently at the same rank.",
    hints=[
        "One matrix first: how many entries has A (r × d_in), how many has B (d_out × r)?",
        "Add the two for each (d_out, d_in) in shapes, then add over the shapes.",
        "sum(rank * (… + …) for d_out, d_in in shapes)",
    ],
)

alpha = Choice(
    "06 alpha",
    "“α is just the learning rate.” You double α and leave the rest. Under Adam (ε = 0, no "
    "weight decay, no clipping), what would have done exactly the same to the training?",
    {
        "a": "Doubling the learning rate of A and of B.",
        "b": "Doubling the learning rate of B alone.",
        "c": "Doubling the rank.",
        "d": "Nothing else does: α acts on the outputs, a learning rate on the steps.",
    },
    "b",
    why="Doubling B's steps doubles B, and with it ΔW, as doubling α does, while A turns as fast "
    "as before; one shared rate would also make A turn twice as fast.",
    misconceptions={
        "a": "that moves B A by more than a factor of two, since A's steps double as well: α and "
        "the one shared rate are related, not the same knob",
        "c": "the rank changes how many directions there are, and with α fixed it lowers α / r",
        "d": "Adam's steps do not depend on the size of the gradient, so a factor on the output "
        "can be moved into the steps of B",
    },
)

memory = Choice(
    "06 memory",
    "Training a 7B model with LoRA on all linear layers at r = 16 runs out of memory by 3 GB. A "
    "colleague proposes r = 8. What do you expect?",
    {
        "a": "Memory halves: half the rank, half the trainable parameters.",
        "b": "It saves roughly a third of a gigabyte, so it still does not fit.",
        "c": "It saves nothing, as the optimizer state does not depend on the rank.",
        "d": "It fits, because activations shrink with the rank.",
    },
    "b",
    why="The frozen base and the activations dominate; a shorter batch, checkpointing or a "
    "quantised base is where gigabytes are.",
    misconceptions={
        "a": "the trainable part does halve, but it was a small part: work it out with 16 bytes "
        "for each trainable parameter and 2 for each frozen one",
        "c": "it does depend on it: Adam keeps two numbers for each trainable one. It is only "
        "small beside the base",
        "d": "A's gradient needs the layer's full input, so LoRA keeps the same activations at "
        "any rank, plus r numbers a token",
    },
)

single_seed = Choice(
    "06 single_seed",
    "You train r = 16 and r = 32 once each. r = 32 gets 0.551, r = 16 gets 0.541. What do you "
    "write?",
    {
        "a": "r = 32 is better by one point.",
        "b": "Rank does not matter.",
        "c": "These two runs cannot tell the ranks apart.",
        "d": "r = 32 is better, and r = 64 would be better still.",
    },
    "c",
    why="A difference counts when it is larger than what the seed alone does; several seeds, or "
    "an honest “cannot tell”, are what a reader can use.",
    misconceptions={
        "a": "look at the spread over seeds above: it is as wide as this difference",
        "b": "not being able to tell two ranks apart is not the same as being equal, and small "
        "ranks are far below, by much more than the spread",
        "d": "neither step follows: the first difference is within the spread, and the recorded "
        "r = 64 runs are not above r = 32",
    },
)

one_rate = Choice(
    "06 one_rate",
    "A blog post trains r = 1, 8 and 64 with one learning rate, chosen at r = 8, and α = 2r. "
    "r = 8 wins. What has it shown?",
    {
        "a": "That r = 8 is the right capacity for the task.",
        "b": "That r = 8 wins at the rate chosen for it.",
        "c": "That higher ranks overfit.",
        "d": "That α should be larger.",
    },
    "b",
    why="With α / r held, a higher rank takes larger steps at the same rate, so capacity and step "
    "size changed together; tune the rate for every rank, or say that you did not.",
    misconceptions={
        "a": "the figure above orders the ranks in other ways at other rates; capacity was not "
        "the only thing that changed",
        "c": "overfitting is a gap between training and validation; a too large step shows as a "
        "poor fit to both",
        "d": "nothing here varied α / r, which is 2 throughout",
    },
)
