"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

A frozen weight W (d_out × d_in) gets a trainable change of rank at most r,

    h = W x + s · B A x,    A (r × d_in) random,  B (d_out × r) zero,  s = alpha / r,

so that training starts exactly at the base model (§4.1). One principle makes this right on any
layer: `layer.weight` is the weight that the layer computes with, W + ΔW, and one sum serves it,
merging, and whoever reads it. How it is put into a model and taken out again is in injection.py,
what is refused, and why, in checks.py.
"""

import math
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib import checks
from lora_lib.targets import conv1d, shape_of


class LoRALinear(nn.Module):
    """A linear layer, frozen, with a low-rank path beside it.

    `rank` r, `alpha` and `dropout` (on the path's input) as in the paper; `scaling` is alpha / r,
    or alpha / √r with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732). The factors are made in
    float32, or float64 for such a base.

    Raises TypeError if `original_linear` is not an nn.Linear (or GPT-2's Conv1D), ValueError for a
    rank that is not a positive integer, an alpha that is not a positive number, a dropout outside
    [0, 1), a layer without memory.
    """

    def __init__(
        self,
        original_linear: nn.Linear,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ):
        super().__init__()
        checks.check_linear(original_linear, "original_linear")
        checks.check_settings(rank, alpha, dropout, use_rslora)
        self.transposed = isinstance(original_linear, conv1d())  # it keeps Wᵀ
        self.out_features, self.in_features = shape_of(original_linear)
        self.original = original_linear.requires_grad_(False)
        self.rank, self.alpha, self.use_rslora = int(rank), float(alpha), use_rslora
        self.dropout = nn.Dropout(float(dropout)) if dropout else nn.Identity()
        self.enabled = True  # see adapter_disabled
        W = original_linear.weight
        double = W.dtype == torch.float64
        like = dict(device=W.device, dtype=torch.float64 if double else torch.float32)
        self.lora_A = nn.Parameter(torch.empty(self.rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, self.rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√d_in), as loralib and PEFT
        # While merged: the weight before. A buffer follows the model to a device, and in a state
        # dict it keeps a merged weight from being loaded as W, to which ΔW would be added again.
        self.register_buffer("_weight_before_merge", None)
        if dropout and self._needs_a_twin():
            warnings.warn(
                f"{type(original_linear).__name__} computes in its own way, with W + ΔW as its "
                "weight, where LoRA's dropout has no place: it will have no effect",
                stacklevel=2,
            )

    @property
    def scaling(self) -> float:
        """s = alpha / r (√r with rsLoRA). Set it, or alpha, to turn the adapter up or down."""
        return self.alpha / self._divisor()

    @scaling.setter
    def scaling(self, scaling: float) -> None:
        self.alpha = scaling * self._divisor()

    def _divisor(self) -> float:
        return math.sqrt(self.rank) if self.use_rslora else self.rank

    def forward(self, *args, **kwargs) -> Tensor:
        """What `original` takes and gives: for an nn.Linear x (…, d_in) → (…, d_out).

        Scaling the rank-sized middle is the cheapest place. PEFT scales the output: the same bits
        if s is a power of two, equal to rounding otherwise.
        """
        if self._is_base():
            return self.original(*args, **kwargs)
        if self._needs_a_twin():
            return self._by_a_twin(*args, **kwargs)
        [x] = *args, *kwargs.values()
        z = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * self.scaling  # (…, r)
        return self.original(*args, **kwargs) + F.linear(z, self.lora_B.to(x.dtype))

    def _is_base(self) -> bool:
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "this LoRA layer is merged, so its factors would get no gradient: call "
                "unmerge_lora_weights(model) before training, or model.eval() for inference"
            )
        return self.merged or not self.enabled

    def _needs_a_twin(self) -> bool:
        """A layer that masks its weight, say, or whose hooks change its input: W x + ΔW x would
        not be what it makes of W + ΔW. Of a weight that takes no sum there is no other way."""
        return checks.takes_a_sum(self.original) and not checks.is_plain(self.original)

    def _by_a_twin(self, *args, **kwargs):
        """The original's own forward on a copy of it that holds W + ΔW.

        Nothing is swapped on the original, so threads and recomputation see W whole. What its
        forward notes on itself is kept.
        """
        checks.check_own_forward(self.original, "a layer with LoRA")
        twin = object.__new__(type(self.original))
        own = {"_parameters": self.original._parameters | {"weight": self.weight}}
        own["_compiled_call_impl"] = None  # it is bound to the original
        vars(twin).update(vars(self.original) | own)
        output = twin(*args, **kwargs)
        vars(self.original).update({k: v for k, v in vars(twin).items() if k not in own})
        return output

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with: W + ΔW, with gradients to A and B.

        A value, not a place: what is written into it is lost. Write to `original.weight`. Every
        read makes the sum; merge before you generate text with a model that reads it often. In
        half precision the sum is rounded as a merge is.

        Raises TypeError if W is quantised, sharded or computed; RuntimeError as forward.
        """
        if self._is_base():
            return self.original.weight
        checks.check_takes_a_sum(self.original)
        return self._sum(self.original.weight)

    def _sum(self, weight: Tensor) -> Tensor:
        """`weight` + s · B A, added in float32 or better and rounded once to weight's dtype."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        left, right = (A.T, B.T) if self.transposed else (B, A)
        with torch.autocast(weight.device.type, enabled=False):
            total = torch.addmm(weight.to(dtype), left, right, alpha=self.scaling)
        return total.to(weight.dtype)

    def delta_weight(self) -> Tensor:
        """ΔW = s · B A, shape (d_out, d_in), in float32 or better."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * self.lora_B.to(dtype) @ self.lora_A.to(dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.original.bias

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Where an assignment to `weight` or `bias` ends, tie_weights() for one."""
        if name in ("weight", "bias"):
            raise TypeError(
                f"the {name} of a layer with LoRA is made of W and ΔW: assign to "
                f"layer.original.{name}, or tie weights before you add LoRA"
            )
        super().register_parameter(name, param)

    # --- merging ---

    @property
    def merged(self) -> bool:
        return self._weight_before_merge is not None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW. Raises FloatingPointError if it is not finite, TypeError as `weight`."""
        checks.check_takes_a_sum(self.original)
        total = self._sum(self._weight_before_merge if self.merged else self.original.weight)
        if not torch.isfinite(total).all():
            raise FloatingPointError(
                "W + ΔW is not finite, so nothing was merged; look at lora_A and lora_B "
                f"(largest entries {self.lora_A.abs().max():.3g} and {self.lora_B.abs().max():.3g})"
            )
        return total

    def merge(self) -> None:
        """Fold ΔW into the weight. Merging twice adds it once."""
        if not self.merged:
            self._use_merged(self.merged_weight())

    def _use_merged(self, weight: Tensor) -> None:
        self._weight_before_merge = self.original.weight.data
        self._merged_with = self._precision()
        self.original.weight.data = weight

    def unmerge(self) -> None:
        """Put the weight of before the merge back, bit for bit: not W + ΔW − ΔW.

        Raises RuntimeError if the weight is not the merged one any more: what was done to it since
        would be lost.
        """
        if self.merged:
            self.check_still_merged()
            self.original.weight.data = self._weight_before_merge
            self._weight_before_merge = None

    def check_still_merged(self) -> None:
        if self.merged and not self._still_merged():
            raise RuntimeError(
                "a weight or its factors changed since the merge, which unmerging would undo; "
                "unload_lora(model) keeps the weight as it is now"
            )

    @torch.no_grad()
    def _still_merged(self) -> bool:
        """Whether the weight is W + ΔW up to rounding, then or in a later .half() or .double()."""
        weight = self.original._parameters.get("weight")
        if weight is None or weight.shape != self._weight_before_merge.shape:
            return False
        eps_of_factors, eps = map(max, self._merged_with, self._precision())
        W = self._weight_before_merge.to(torch.promote_types(self.lora_A.dtype, torch.float32))
        A, B = self.lora_A.to(W.dtype).abs(), self.lora_B.to(W.dtype).abs()
        size = W.abs() + abs(self.scaling) * ((B @ A).T if self.transposed else B @ A)
        tiny = torch.finfo(weight.dtype).tiny
        error = 2 * eps_of_factors * size + 0.51 * eps * weight.abs().clamp(min=tiny)
        return bool(((weight - self._sum(W)).abs() <= error).all())

    def _precision(self) -> tuple[float, float]:
        return tuple(torch.finfo(t.dtype).eps for t in (self.lora_A, self.original.weight))

    # --- facts ---

    @property
    def num_trainable_params(self) -> int:
        """r · (d_in + d_out) while the factors are trainable."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def num_total_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


def lora_layers(model: nn.Module) -> Iterator[LoRALinear]:
    """In the order of `named_modules`. Raises TypeError if `model` is not an nn.Module."""
    checks.check_module(model)
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def count_parameters(model: nn.Module, only_trainable: bool = False) -> int:
    """Number of scalars, a shared tensor counted once. Raises TypeError as lora_layers."""
    checks.check_module(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trainable)
