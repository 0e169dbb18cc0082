"""A faster LoRA layer, tried: one autograd function for all layers that read the same x.

`LoRALinear` writes the low-rank path as plain PyTorch. Autograd then reads x once for every layer
and writes every sum of two results on its own. Here x meets the stacked A's of its layers once, and
every sum happens inside a matrix product (`addmm`). What that earns is measured by
`lora_course.experiments.timing`; what it costs is a layer that is harder to read.
"""

from functools import partial

import torch
from torch import Tensor, nn

from lora_lib.lora import LoRALinear

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # Llama's names


class AdaptedProducts(torch.autograd.Function):
    """x (N, d_in), stacked A (n·r, d_in), n weights (d_out, d_in), n B's (d_out, r)
    → n outputs x Wᵢᵀ + s (x Aᵢᵀ) Bᵢᵀ, each (N, d_out)."""

    @staticmethod
    def forward(ctx, x: Tensor, stacked_A: Tensor, scaling: float, *weights_and_Bs: Tensor):
        n = len(weights_and_Bs) // 2
        weights, Bs = weights_and_Bs[:n], weights_and_Bs[n:]
        z = (x @ stacked_A.T).mul_(scaling)  # (N, n·r)
        ctx.save_for_backward(x, z, stacked_A, *weights_and_Bs)
        ctx.scaling = scaling
        outputs = [x @ weight.T for weight in weights]
        for y, z_i, B in zip(outputs, z.chunk(n, dim=1), Bs, strict=True):
            torch.addmm(y, z_i, B.T, out=y)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *dys: Tensor):
        x, z, stacked_A, *weights_and_Bs = ctx.saved_tensors
        n = len(dys)
        weights, Bs = weights_and_Bs[:n], weights_and_Bs[n:]
        dz = torch.cat([dy @ B for dy, B in zip(dys, Bs, strict=True)], dim=1).mul_(ctx.scaling)
        dx = dz @ stacked_A
        for dy, weight in zip(dys, weights, strict=True):
            torch.addmm(dx, dy, weight, out=dx)
        dBs = [dy.T @ z_i for dy, z_i in zip(dys, z.chunk(n, dim=1), strict=True)]
        return dx, dz.T @ x, None, *[None] * n, *dBs


class SharedInput:
    """LoRA layers that are called one after the other with the same x: the first call computes the
    outputs of all, the others fetch theirs."""

    def __init__(self, layers: list[LoRALinear]):
        self.layers = layers
        self.x: Tensor | None = None
        self.outputs: dict[LoRALinear, Tensor] = {}

    def output_of(self, layer: LoRALinear, x: Tensor) -> Tensor:
        if x is not self.x or layer not in self.outputs:
            self.x, self.outputs = x, dict(zip(self.layers, self._compute(x), strict=True))
        output = self.outputs.pop(layer)
        if not self.outputs:
            self.x = None
        return output

    def _compute(self, x: Tensor) -> list[Tensor]:
        outputs = AdaptedProducts.apply(
            x.flatten(0, -2),
            torch.cat([layer.lora_A for layer in self.layers]).to(x.dtype),
            self.layers[0].scaling,
            *(layer.original.weight for layer in self.layers),
            *(layer.lora_B.to(x.dtype) for layer in self.layers),
        )
        return [y.unflatten(0, x.shape[:-1]) for y in outputs]


def share_inputs(model: nn.Module) -> nn.Module:
    """Let every LoRA layer of `model` compute as above: q, k and v together, gate and up together,
    the others alone. In place.

    It takes what the timing gives it, layers of one scaling without bias and dropout, and checks
    nothing: that outputs and gradients agree with those of `LoRALinear` is checked there.
    """
    for parent in model.modules():
        layers = {n: m for n, m in parent.named_children() if isinstance(m, LoRALinear)}
        for group in {next((g for g in SHARED_INPUTS if n in g), (n,)) for n in layers}:
            shared = SharedInput([layers[name] for name in group])
            for layer in shared.layers:
                layer.forward = partial(shared.output_of, layer)
    return model
