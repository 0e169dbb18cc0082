"""What a training costs: bytes, and positions spent on padding."""

from collections.abc import Sequence

import torch
from torch import nn

from lora_lib.tokens import Batch, Tokenizer


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


def padding_fraction(batches: Sequence[Batch]) -> float:
    """The part of all input positions that is padding."""
    positions = sum(b.input_ids.numel() for b in batches)
    return sum((b.input_ids == Tokenizer.PAD).sum().item() for b in batches) / positions
