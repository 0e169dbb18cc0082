"""What a model costs: seconds, and in training bytes."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import nn


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that one training step leaves behind: weights, gradients, optimizer state, and the
    size of a checkpoint of what was trained. Call it after a step."""

    def size(tensors) -> int:
        return sum(t.nbytes for t in tensors)

    parameters = list(model.parameters())
    state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return {
        "weights": size(parameters),
        "gradients": size(p.grad for p in parameters if p.grad is not None),
        "optimizer state": size(state),
        "checkpoint": size(p for p in parameters if p.requires_grad),
    }


def fastest_seconds(models: Mapping[str, Callable], *inputs, turns: int = 40) -> dict[str, float]:
    """{name: seconds of the fastest call}: other work on the machine only ever adds to a time. The
    models take turns, so that a busy moment hits all of them."""
    taken = _seconds_in_turns(models, inputs, turns)
    return {name: min(seconds) for name, seconds in taken.items()}


def ratios_in_turns(calls: Mapping[str, Callable[[], object]], turns: int = 9) -> dict[str, float]:
    """{name: the median of its seconds over those that the first call took in the same turn}. On a
    busy machine a ratio says more than seconds."""
    taken = _seconds_in_turns(calls, (), turns)
    first = next(iter(taken.values()))
    return {
        name: median(s / f for s, f in zip(seconds, first, strict=True))
        for name, seconds in taken.items()
    }


def _seconds_in_turns(calls: Mapping[str, Callable], inputs: tuple, turns: int) -> dict:
    taken = {name: [] for name in calls}
    for name in list(calls) * turns:
        start = time.perf_counter()
        calls[name](*inputs)
        taken[name].append(time.perf_counter() - start)
    return taken
