"""What a model costs: seconds, and in training bytes."""

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn


def training_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes that one training step leaves behind: weights, gradients, optimizer state, and the
    size of a checkpoint of what was trained. Call it after a step."""

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

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
    taken = {name: [] for name in models}
    for name in list(models) * turns:
        start = time.perf_counter()
        models[name](*inputs)
        taken[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in taken.items()}
