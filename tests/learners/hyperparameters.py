"""Notebook 06."""

import math


def bits(row, split="validation"):
    return row[split]["bits"]


def finite(rows):
    return [row for row in rows if math.isfinite(bits(row))]


def by_min(rows):
    return min(finite(rows), key=bits)["lr"]


def by_loop(rows):
    best, rate = float("inf"), None
    for row in rows:
        if bits(row) < best:  # false for nan
            best, rate = bits(row), row["lr"]
    return rate


def count_by_loop(shapes, rank):
    total = 0
    for d_out, d_in in shapes:
        total += rank * d_in
        total += d_out * rank
    return total


def count_by_shape(shapes, rank):
    return sum(rank * sum(shape) for shape in shapes)


RIGHT = {"choose_rate": [by_min, by_loop], "lora_parameters": [count_by_loop, count_by_shape]}

WRONG = {
    "choose_rate": {
        "picks by the test score": lambda rows: min(finite(rows), key=lambda r: bits(r, "test"))[
            "lr"
        ],
        "most bits": lambda rows: max(finite(rows), key=bits)["lr"],
        "largest rate": lambda rows: max(row["lr"] for row in rows),
        "diverged": lambda rows: min(rows, key=bits)["lr"],
        "the whole row": lambda rows: min(finite(rows), key=bits),
        "it returns the bits": lambda rows: min(bits(row) for row in finite(rows)),
        "is the `return` there": lambda rows: None,
        "not the learning rate of any": lambda rows: 0.123,
    },
    "lora_parameters": {
        "whole matrices": lambda shapes, r: sum(o * i for o, i in shapes),
        "whole matrix by r": lambda shapes, r: r * sum(o * i for o, i in shapes),
        "counts A alone": lambda shapes, r: r * sum(i for _, i in shapes),
        "counts B alone": lambda shapes, r: r * sum(o for o, _ in shapes),
        "d_in on both sides": lambda shapes, r: 2 * r * sum(i for _, i in shapes),
        "d_out on both sides": lambda shapes, r: 2 * r * sum(o for o, _ in shapes),
        "rank is left out": lambda shapes, r: sum(o + i for o, i in shapes),
        "only the first": lambda shapes, r: r * sum(shapes[0]),
        "only the last": lambda shapes, r: r * sum(shapes[-1]),
        "not a number": lambda shapes, r: None,
    },
}
