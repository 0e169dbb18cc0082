"""What came after LoRA: DoRA, PiSSA and LoRA+, in the symbols of their papers.

Each stands on `LoRALinear`: DoRA around it, PiSSA is another start of its factors, LoRA+ another
optimizer. rsLoRA, a fourth, is built in: `add_lora_to_model(model, use_rslora=True)`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lora_course.directions import lora_by_path
from lora_lib.lora import LoRALinear, lora_layers


def check_on_linear(layer: nn.Module) -> None:
    """Conv1D keeps Wᵀ, and a layer with a forward of its own does something else with W."""
    if type(getattr(layer, "original", None)) is not nn.Linear:
        raise TypeError(f"this variant needs a LoRALinear on a plain nn.Linear; got {layer}")


class DoRALinear(nn.Module):
    """A LoRA layer whose rows have lengths of their own (DoRA, Liu et al. 2024, arXiv 2402.09353).

    W' = m · V / ‖V‖ with V = W + s B A (Eq. 5): LoRA turns the rows, and m, trained as well, is
    how long they are. There is one length for every output, as in the authors' code and in PEFT;
    m starts at ‖W‖, so that W' = W. `weight` is W' (d_out, d_in), `magnitude` is m (d_out,).

    W' is computed at every call, and LoRA's dropout has no place in it. Raises TypeError unless
    `lora` is a LoRALinear on a plain nn.Linear.
    """

    def __init__(self, lora: LoRALinear):
        super().__init__()
        check_on_linear(lora)
        self.lora = lora
        self.magnitude = nn.Parameter(self._norm(lora.weight).detach())

    @property
    def weight(self) -> Tensor:
        V = self.lora.weight
        norm = self._norm(V).detach()  # a constant for the gradient, which saves memory (§4.3)
        return (self.magnitude / norm)[:, None].to(V.dtype) * V

    def _norm(self, V: Tensor) -> Tensor:
        return torch.linalg.vector_norm(V, dim=1, dtype=self.lora.lora_A.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.lora.bias)


def add_magnitudes(model: nn.Module) -> nn.Module:
    """Make DoRA of every LoRA layer, in place: call it last, after the freezing. Merging, saving
    and unloading are LoRA's and know nothing of m. Raises as DoRALinear."""
    doras = {path: DoRALinear(layer) for path, layer in lora_by_path(model).items()}
    for path, layer in doras.items():
        model.set_submodule(path, layer)
    return model


@torch.no_grad()
def start_at_strongest(layer: LoRALinear) -> None:
    """Let s B A be the part of W that its r largest singular values make, and freeze the rest
    (PiSSA, Meng et al. 2024, arXiv 2404.02948, §3; their A is our B).

    W + s B A is what it was, up to rounding, but `original.weight` is now the residual: the factors
    fit no other base. Raises TypeError unless `layer` is a LoRALinear on a plain nn.Linear,
    RuntimeError if r is more than the smaller side of W.
    """
    check_on_linear(layer)
    W, r = layer.weight, layer.rank
    U, S, Vt = torch.linalg.svd(W.to(layer.lora_A.dtype), full_matrices=False)
    root = (S[:r] / layer.scaling).sqrt()
    layer.lora_B.copy_(U[:, :r] * root)
    layer.lora_A.copy_(root[:, None] * Vt[:r])
    layer.original.weight.copy_(W - layer.delta_weight())


def lora_plus(model: nn.Module, ratio: float) -> Callable[[list[nn.Parameter], float], Optimizer]:
    """An `optimizer` for `fit` and `adapt`, the course's AdamW at two rates: `lr` for A and what
    else is trained, `ratio` · `lr` for every B (LoRA+, Hayou et al. 2024, arXiv 2402.12354, where
    the ratio is λ; PEFT's example takes 16).

    Raises ValueError for a model without LoRA layers, or a ratio that is not positive.
    """
    Bs = [layer.lora_B for layer in lora_layers(model)]
    if not Bs or not ratio > 0:
        raise ValueError(f"give LoRA layers and a positive ratio; got {len(Bs)} and {ratio}")

    def optimizer(parameters: list[nn.Parameter], lr: float) -> Optimizer:
        others = [p for p in parameters if not any(p is B for B in Bs)]
        groups = [{"params": others}, {"params": Bs, "lr": ratio * lr}]
        return AdamW(groups, lr, weight_decay=0.01, fused=True)

    return optimizer
