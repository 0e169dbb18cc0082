"""Exercises of notebook 01: measuring rank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_course.exercises.checker import Exercise
from lora_course.exercises.choices import Choice
from lora_lib.rank import k90 as right


def draw() -> Iterator[tuple[Tensor]]:
    """Singular values, largest first: many at first, where no two mistakes give the same count."""
    for size in (300, 40, 6):
        yield (torch.rand(size, dtype=torch.float64).sort(descending=True).values,)


k90 = Exercise(
    "01 k90",
    right,
    draw,
    mistakes={
        "you add up σ; energy is σ², so square them first": lambda v: right(v.sqrt()),
        "you square twice: σ² is the energy already": lambda v: right(v.square()),
        "you compare the root of the energy with 0.9; compare the energy": lambda v: right(v, 0.81),
        "you add up from the smallest value; the largest come first": lambda v: right(v.flip(0)),
        "one too few: the value that crosses the line counts": lambda v: right(v) - 1,
        "one too many: k90 is the first k whose share reaches 90 %": lambda v: right(v) + 1,
        "this is a share; k90 is a count, a whole number": lambda v: right(v) / len(v),
        "you count the values beyond 90 %; count those up to it": lambda v: len(v) - right(v) + 1,
        "this is 90 % of the values; add up their energy": lambda v: round(0.9 * len(v)),
        "you compare each value with the largest; it is their running sum that counts": lambda v: (
            int((v > 0.1 * v[0]).sum())
        ),
        "you count the values above their mean; k90 adds up energy until 90 % are reached": (
            lambda v: int((v > v.mean()).sum())
        ),
    },
)

half_of_the_directions = Choice("01 half_of_the_directions")
mostly_zero = Choice("01 mostly_zero")
