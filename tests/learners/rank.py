"""Notebook 01."""

import torch


def below(values):
    return int(((values**2).cumsum(0) / (values**2).sum() < 0.9).sum())


def by_counting(values):
    return below(values) + 1


def by_loop(values):
    total, held = sum(v * v for v in values.tolist()), 0.0
    for k, value in enumerate(values.tolist(), start=1):
        held += value**2
        if held >= 0.9 * total:
            return k


def as_a_tensor(values):
    energy = values.square().cumsum(0) / values.square().sum()
    return torch.searchsorted(energy, torch.tensor(0.9, dtype=torch.float64)) + 1


def in_place(values):
    values *= values
    return by_counting(values.sqrt())


RIGHT = {"k90": [by_counting, by_loop, as_a_tensor, in_place]}

WRONG = {
    "k90": {
        "square the singular values": lambda values: (
            int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
        ),
        "one too few": below,
        "one too many": lambda values: by_counting(values) + 1,
        "you compare each value with the largest": lambda values: (values > 0.1 * values[0]).sum(),
        "a whole number": lambda values: by_counting(values) / len(values),
        "you returned '90 %'": lambda values: "90 %",
        "and you returned 1": lambda values: 1,
        "your code raised AttributeError": lambda values: values.k90(),
    }
}
