"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

A frozen weight W (d_out × d_in) gets a trainable change of rank at most r,

    h = W x + s · B A x,    A (r × d_in) random,  B (d_out × r) zero,  s = alpha / r,

so that training starts exactly at the base model (§4.1). A plain linear layer adds the two paths.
Any other layer (one that masks its weight, say) runs its own forward with W + ΔW as its weight, and
a model that reads `layer.weight` reads the same sum.

How it is put into a model and taken out again is in injection.py; what is refused, in checks.py.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType

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
    [0, 1), a weight that is not in memory (meta device, offloaded).
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
        self.out_features, self.in_features = shape_of(original_linear)
        self.transposed = isinstance(original_linear, conv1d())  # it keeps Wᵀ
        self.original = original_linear.requires_grad_(False)
        self.rank, self.alpha, self.use_rslora = int(rank), float(alpha), use_rslora
        self.dropout = nn.Dropout(float(dropout)) if dropout else nn.Identity()
        self.enabled = True  # False inside injection.adapter_disabled
        W = original_linear.weight
        dtype = torch.float64 if W.dtype == torch.float64 else torch.float32  # W may be int8
        self.lora_A = nn.Parameter(W.new_empty(self.rank, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(W.new_zeros(self.out_features, self.rank, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√d_in), as loralib and PEFT
        # While merged: the weight before. A buffer follows the model to a device, and in a state
        # dict its key keeps a merged weight from being loaded as W.
        self.register_buffer("_weight_before_merge", None)
        self._eps_at_merge = None  # see check_still_merged
        if dropout and checks.has_its_own_way(original_linear):
            warnings.warn(
                f"{type(original_linear).__name__} computes in its own way, with W + ΔW as its "
                "weight, where LoRA's dropout has no place: it will have no effect",
                stacklevel=2,
            )

    @property
    def scaling(self) -> float:
        """s = alpha / r (√r with rsLoRA). Assign to it, or to alpha, to turn the adapter up."""
        return self.alpha / self._divisor()

    @scaling.setter
    def scaling(self, scaling: float) -> None:
        self.alpha = scaling * self._divisor()

    def _divisor(self) -> float:
        return math.sqrt(self.rank) if self.use_rslora else self.rank

    # --- the weight, and what is computed with it ---

    def forward(self, *args, **kwargs) -> Tensor:
        """Takes and returns what `original` does; for an nn.Linear x (…, d_in) → (…, d_out).

        s is applied to the r-sized middle, where it costs least. PEFT scales the output: the same
        bits if s is a power of two, otherwise equal up to rounding. Raises RuntimeError if the
        layer is merged and training.
        """
        original = self.original
        if self._is_base():
            return original(*args, **kwargs)
        if checks.has_its_own_way(original):
            return self._forward_with_sum(*args, **kwargs)
        (x,) = args or kwargs.values()  # one input: nn.Linear calls it `input`, Conv1D `x`
        z = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * self.scaling  # (…, r)
        return original(*args, **kwargs) + F.linear(z, self.lora_B.to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with: W + ΔW, with gradients to A and B.

        A value, not a place: writes into it are lost (RWKV rescales its weights so, in eval mode);
        write to `original.weight`. Each read computes the sum, so merge before you generate text
        with a model that reads it often. In half precision the sum is rounded as a merge is.

        Raises TypeError if W is quantised, sharded or computed; RuntimeError as forward does.
        """
        if self._is_base():
            return self.original.weight
        checks.check_takes_a_sum(self.original)
        return self._sum(self.original.weight)

    def _is_base(self) -> bool:
        """Whether `original` computes alone: the adapter is merged into it, or switched off."""
        merged = self.merged
        if merged and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "this LoRA layer is merged, so its factors would get no gradient: call "
                "unmerge_lora_weights(model) before training, or model.eval() for inference"
            )
        return merged or not self.enabled

    def _forward_with_sum(self, *args, **kwargs):
        """The original's own forward, run on a shallow copy of it whose weight is W + ΔW.

        Nothing is swapped on the original, so threads and recomputation see W whole. Attributes
        that its forward sets are copied back.
        """
        checks.check_own_forward(self.original, "a layer with LoRA")  # it may be patched by now
        original, copy = self.original, object.__new__(type(self.original))
        given = {name: _bound_to(copy, original, value) for name, value in vars(original).items()}
        given["_parameters"] = original._parameters | {"weight": self.weight}
        given["_compiled_call_impl"] = None  # it is bound to the original
        given.pop("weight", None)  # a replica of DataParallel has it here
        vars(copy).update(given)
        output = copy(*args, **kwargs)
        set_by_forward = {k: v for k, v in vars(copy).items() if v is not given.get(k, copy)}
        vars(original).update(set_by_forward)
        return output

    def _sum(self, weight: Tensor) -> Tensor:
        """`weight` + s · B A, added in float32 or better and rounded once to weight's dtype."""
        A, B = self._factors_to_add()
        left, right = (A.T, B.T) if self.transposed else (B, A)
        with torch.autocast(weight.device.type, enabled=False):
            total = torch.addmm(weight.to(A.dtype), left, right, alpha=self.scaling)
        return total.to(weight.dtype)

    def delta_weight(self) -> Tensor:
        """ΔW = s · B A, shape (d_out, d_in), in float32 or better."""
        A, B = self._factors_to_add()
        return self.scaling * B @ A

    def _factors_to_add(self) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.lora_A.to(dtype), self.lora_B.to(dtype)

    def __getattr__(self, name: str):
        """Other attributes that a model reads of its layer, such as `bias`, are the original's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in ("original", "weight"):
                raise
            return getattr(self.original, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """`layer.weight = Parameter(…)` arrives here, from tie_weights() for example."""
        if name in ("weight", "bias"):
            raise TypeError(
                f"the {name} of a layer with LoRA is made of W and ΔW: assign to "
                f"layer.original.{name}, or tie weights before you add LoRA"
            )
        super().register_parameter(name, param)

    # --- merging ---

    @property
    def merged(self) -> bool:
        return self._buffers["_weight_before_merge"] is not None  # asked at every call

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW. Raises FloatingPointError if it is not finite, TypeError as `weight`."""
        checks.check_takes_a_sum(self.original)
        with of_the_kind_of(self.original.weight):
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
            self.use_merged(self.merged_weight())

    def use_merged(self, weight: Tensor) -> None:
        """Compute with `weight`, from merged_weight(). It stands apart from merge, so that a model
        can compute every sum before it changes any layer."""
        with of_the_kind_of(self.original.weight):
            self._weight_before_merge = self.original.weight.data
            self._eps_at_merge = self._eps()
            self.original.weight.data = weight

    def unmerge(self) -> None:
        """Restore the weight of before the merge, bit for bit, rather than subtract ΔW.

        Raises RuntimeError if the weight was changed since the merge: that would be lost.
        """
        if self.merged:
            self.check_still_merged()
            with of_the_kind_of(self.original.weight):
                self.original.weight.data = self._weight_before_merge
            self._weight_before_merge = None

    @torch.no_grad()
    def check_still_merged(self) -> None:
        """Raises RuntimeError unless the weight is W + ΔW up to rounding, that of a .half() since
        the merge included."""
        weight, W = self.original._parameters.get("weight"), self._weight_before_merge
        if W is None:
            return
        same = weight is not None and weight.shape == W.shape
        if same:
            (eps_A, eps_W), (eps_A_now, eps_W_now) = self._eps_at_merge, self._eps()
            eps_of_factors, eps = max(eps_A, eps_A_now), max(eps_W, eps_W_now)
            A, B = (factor.abs() for factor in self._factors_to_add())
            W = W.to(A.dtype)
            products = abs(self.scaling) * ((B @ A).T if self.transposed else B @ A)
            tf32 = 2**-10 if weight.is_cuda else 0.0  # its products are rounded so, if it is on
            # Products and sum are rounded once each; what is stored, by half a unit and a hair.
            adding = 2 * eps_of_factors * (W.abs() + products) + tf32 * products
            storing = 0.51 * eps * weight.abs().clamp(min=torch.finfo(weight.dtype).tiny)
            same = ((weight - self._sum(W)).abs() <= adding + storing).all()
        if not same:
            raise RuntimeError(
                "a weight or its factors changed since the merge, which unmerging would undo; "
                "unload_lora(model) keeps the weight as it is now"
            )

    def _eps(self) -> tuple[float, float]:
        """The precision of the factors, and of the weight."""
        return tuple(torch.finfo(t.dtype).eps for t in (self.lora_A, self.original.weight))

    # --- facts ---

    @property
    def num_trainable_params(self) -> int:
        """r · (d_in + d_out) while the factors are trainable."""
        return count_parameters(self, only_trainable=True)

    @property
    def num_total_params(self) -> int:
        return count_parameters(self)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


def _bound_to(copy: nn.Module, original: nn.Module, value: object) -> object:
    """A method of `original`, or accelerate's partial function of it, as one of `copy`."""
    if isinstance(value, MethodType) and value.__self__ is original:
        return MethodType(value.__func__, copy)
    if isinstance(value, partial) and any(argument is original for argument in value.args):
        arguments = (copy if argument is original else argument for argument in value.args)
        return partial(value.func, *arguments, **value.keywords)
    return value


@contextmanager
def of_the_kind_of(tensor: Tensor) -> Iterator[None]:
    """What is made inside is an inference tensor only if `tensor` is one, so that it can be trained
    later also if this is called under torch.inference_mode()."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        yield


def lora_layers(model: nn.Module) -> Iterator[LoRALinear]:
    """The LoRA layers, in the order of `named_modules`. Raises TypeError if `model` is not an
    nn.Module."""
    checks.check_module(model)
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def count_parameters(model: nn.Module, only_trainable: bool = False) -> int:
    """Number of scalars, a shared tensor counted once. Raises TypeError as lora_layers."""
    checks.check_module(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trainable)
