"""Checks of notebook 01: measuring rank."""

import numbers

import torch

from lora_course.exercises.checker import Choice, Exercise, Wrong
from lora_lib.rank import k90 as reference


def _test_k90(learner) -> None:
    for size in (300, 40, 6):  # the largest first: there no two mistakes give the same count
        values = torch.rand(size, dtype=torch.float64).sort(descending=True).values
        answer, right = learner(values.clone()), reference(values)
        if answer is None:
            raise NotImplementedError
        if not isinstance(answer, numbers.Real | torch.Tensor) or answer != answer // 1:
            raise Wrong(f"k90 is a count, a whole number; you returned {answer!r}")
        if answer == right:
            continue
        share = values.cumsum(0) / values.sum()
        if answer == int((share < 0.9).sum()) + 1:
            raise Wrong("you add up σ; energy is σ², so square the singular values first")
        if answer == right - 1:
            raise Wrong(
                "one too few: the first k − 1 values still hold less than 90 %, and the one that "
                "crosses the line counts"
            )
        if answer == right + 1:
            raise Wrong("one too many: k90 is the first k whose share reaches 90 %")
        if answer == int((values > 0.1 * values[0]).sum()):
            raise Wrong("you compare each value with the largest; k90 is about their running sum")
        raise Wrong(f"for {size} values the answer is {right}, and you returned {int(answer)}")


k90 = Exercise(
    "01 k90",
    _test_k90,
    contract="k90 of singular values, largest first, is a whole number.",
    why="You can now measure any weight change, and you know what 0.9 of the energy means.",
    hints=[
        "The energy of component i is σᵢ²; start from values.square().",
        "cumsum(0) gives the running sum; divide by the total.",
        "Count how many entries lie below 0.9, and add the one that crosses the line.",
    ],
)

half_of_the_directions = Choice(
    "01 half_of_the_directions",
    question="A paper reports: half of the directions of a square ΔW hold 90 % of its energy. "
    "What follows?",
    options={
        "a": "ΔW is low-rank, since half of the directions suffice.",
        "b": "Nothing yet; noise of its shape does so too.",
        "c": "ΔW has full rank, so LoRA cannot work here.",
        "d": "Its rank is half of its width.",
    },
    right="b",
    why="A measure of structure says something only beside what no structure would give.",
    misconceptions={
        "a": "half is what pure noise shows; you measured it above. Compare before you conclude.",
        "c": "a full-rank ΔW may still be replaced by a low-rank one that solves the task as "
        "well; that is a question about training, and notebook 04 answers it.",
        "d": "k90 counts how many directions hold most of the energy; the rank counts all "
        "directions that are not exactly zero, and noise has full rank.",
    },
)
