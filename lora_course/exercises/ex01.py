"""Exercises of notebook 01: measuring rank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_course.exercises.checker import Choice, Exercise
from lora_lib.rank import k90 as reference


def draw() -> Iterator[tuple[Tensor]]:
    """Singular values, largest first: many at first, where no two mistakes give the same count."""
    for size in (300, 40, 6):
        yield (torch.rand(size, dtype=torch.float64).sort(descending=True).values,)


k90 = Exercise(
    "01 k90",
    reference,
    draw,
    mistakes={
        "you add up σ; energy is σ², so square the singular values first": lambda values: reference(
            values.sqrt()
        ),
        "one too few: the value that crosses the line counts": lambda values: reference(values) - 1,
        "one too many: k90 is the first k whose share reaches 90 %": lambda values: (
            reference(values) + 1
        ),
        "you compare each value with the largest; it is their running sum that counts": (
            lambda values: int((values > 0.1 * values[0]).sum())
        ),
        "this is a share; k90 is a count, a whole number": lambda values: (
            reference(values) / len(values)
        ),
        "you count the values beyond 90 %; those up to there are needed": lambda values: (
            len(values) - reference(values) + 1
        ),
        "this is 90 % of the values, whatever they are; add up their energy": lambda values: round(
            0.9 * len(values)
        ),
        "you add up from the smallest value; the largest come first": lambda values: reference(
            values.flip(0)
        ),
        "you compare the root of the energy with 0.9; compare the energy itself": (
            lambda values: reference(values, 0.81)
        ),
        "you square twice: σ² is the energy already": lambda values: reference(values.square()),
        "you count the values above their mean; k90 adds up energy until 90 % are reached": (
            lambda values: int((values > values.mean()).sum())
        ),
    },
    why="You can now measure any weight change, and you know what 0.9 of the energy means.",
    hints=[
        "The energy of component i is σᵢ²; start from values.square().",
        "cumsum(0) gives the running sum; divide by the total.",
        "Count how many entries lie below 0.9, and add the one that crosses the line.",
    ],
)

half_of_the_directions = Choice(
    "01 half_of_the_directions",
    "A paper reports: half of the directions of a square ΔW hold 90 % of its energy. What follows?",
    {
        "ΔW is low-rank, since half of the directions suffice.": "half is what pure noise shows; "
        "you measured it above. Compare before you conclude.",
        "ΔW has full rank, so LoRA cannot work here.": "a full-rank ΔW may still be replaced by a "
        "low-rank one that solves the task as well; that is a question about training, and "
        "notebook 04 answers it.",
        "Its rank is half of its width.": "k90 counts how many directions hold most of the energy; "
        "the rank counts all directions that are not exactly zero, and noise has full rank.",
        "Nothing yet; noise of its shape does so too.": "A measure of structure says something "
        "only beside what no structure would give.",
    },
    right="d",
    hint="What did k90 say of a matrix of pure noise, further up?",
)

mostly_zero = Choice(
    "01 mostly_zero",
    "A matrix of 1,000 × 1,000 has ones on its diagonal and zeros everywhere else. How many column "
    "× row tables do you have to add to get it?",
    {
        "1: a single line of ones": "one table of a column and a row is a whole block of numbers, "
        "never a slanting line",
        "few, since 99.9 % of its entries are zero": "zeros are cheap to store and say nothing of "
        "the rank; look at the diagonal among the pictures above",
        "1,000": "Each 1 stands in a row and column of its own, so each needs a table of its own: "
        "this matrix has the largest rank that there is.",
        "500, as for noise": "that is where k90 of noise lies; k90 counts strong directions, the "
        "rank counts all",
    },
    right="c",
    hint="Try it with three: which tables add up to a diagonal of three ones?",
)
