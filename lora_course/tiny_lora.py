"""LoRA in a dozen lines, as you write it in notebook 02. `lora_lib.lora` has the complete one."""

import torch
from torch import Tensor, nn


class TinyLoRA(nn.Module):
    """h = W x + s · B A x, with W frozen, A random, B zero and s = alpha / rank."""

    def __init__(self, original: nn.Linear, rank: int = 8, alpha: float = 16.0):
        super().__init__()
        self.original = original.requires_grad_(False)
        self.lora_A = nn.Parameter(0.01 * torch.randn(rank, original.in_features))
        self.lora_B = nn.Parameter(torch.zeros(original.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x) + self.scaling * (x @ self.lora_A.T) @ self.lora_B.T
