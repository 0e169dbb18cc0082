"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

A frozen weight W (d_out × d_in) gets a trainable change of rank at most r,

    h = W x + s · B A x,    A (r × d_in) random,  B (d_out × r) zero,  s = alpha / r,

so that training starts exactly at the base model (§4.1). Reading order: the layer; putting it into
a model and taking it out again; merging. Which modules a name means stands in targets.py, what is
refused, and why, in checks.py.
"""

import math
import re
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_lib.checks import (
    check_linear,
    check_module,
    check_not_wrapped,
    check_saved,
    check_settings,
    check_takes_a_sum,
    check_targets,
)
from lora_lib.targets import LoRAConfig, count_places, name_list, saved_paths, target_paths


class LoRALinear(nn.Module):
    """An nn.Linear, frozen, with a low-rank path beside it.

    `rank` r, `alpha` and `dropout` (on the path's input) as in the paper; `scaling` is alpha / r,
    or alpha / √r with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732). The factors are made in
    float32 or better, whatever the base's dtype.

    Raises TypeError if `original_linear` is not an nn.Linear, ValueError for a rank that is not a
    positive integer, an alpha that is not a positive number, a dropout outside [0, 1).
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
        check_linear(original_linear, "original_linear")
        check_settings(rank, alpha, dropout, use_rslora)
        self.in_features = d_in = original_linear.in_features
        self.out_features = d_out = original_linear.out_features
        self.original = original_linear.requires_grad_(False)
        self.rank, self.alpha = int(rank), float(alpha)  # plain ones, also of a np.int64
        self.scaling = self.alpha / (math.sqrt(rank) if use_rslora else self.rank)
        self.dropout = nn.Dropout(float(dropout)) if dropout else nn.Identity()
        like = dict(
            device=original_linear.weight.device,
            dtype=torch.promote_types(original_linear.weight.dtype, torch.float32),
        )
        self.lora_A = nn.Parameter(torch.empty(rank, d_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√d_in), as loralib and PEFT
        # While merged: the weight before. A buffer follows the model to a device, and in a state
        # dict it keeps a merged weight from being loaded as W, to which ΔW would be added again.
        self.register_buffer("_weight_before_merge", None)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d_in) → (…, d_out).

        Scaling the rank-sized middle is the cheapest place. PEFT scales the output: the same bits
        if s is a power of two, equal to rounding otherwise.
        """
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "this LoRA layer is merged, so its factors would get no gradient: call "
                    "unmerge_lora_weights(model) before training, or model.eval() for inference"
                )
            return self.original(x)
        z = F.linear(self.dropout(x), self.lora_A.to(x.dtype)) * self.scaling  # (…, r)
        return self.original(x) + F.linear(z, self.lora_B.to(x.dtype))

    def delta_weight(self) -> Tensor:
        """ΔW = s · B A, shape (d_out, d_in), in float32 or better."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * self.lora_B.to(dtype) @ self.lora_A.to(dtype)

    @property
    def merged(self) -> bool:
        return self._weight_before_merge is not None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW, added in float32 or better and rounded once to W's dtype.

        Raises FloatingPointError if it is not finite, TypeError if W is quantised or computed.
        """
        check_takes_a_sum(self.original)
        weight = self.original.weight
        with torch.autocast(weight.device.type, enabled=False):
            change = self.delta_weight()
        total = (weight.to(change.dtype) + change).to(weight.dtype)
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
        self.original.weight.data = weight

    def unmerge(self) -> None:
        """Put the weight of before the merge back: the very bits, not W + ΔW − ΔW."""
        if self.merged:
            self.original.weight.data = self._weight_before_merge
            self._weight_before_merge = None

    @property
    def weight(self) -> Tensor:
        """The base weight (d_out, d_in), as on nn.Linear; it holds ΔW only while merged."""
        return self.original.weight

    @property
    def bias(self) -> Tensor | None:
        return self.original.bias

    @property
    def num_trainable_params(self) -> int:
        """r · (d_in + d_out) while the factors are trainable."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def num_total_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scaling={self.scaling:g}"


# --- into a model and out again ------------------------------------------------------------------


def add_lora_to_model(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: Iterable[str] | str | re.Pattern = ("W_q", "W_v"),
    dropout: float = 0.0,
    use_rslora: bool = False,
    modules_to_save: Iterable[str] = (),
) -> tuple[nn.Module, list[LoRALinear]]:
    """Replace every targeted nn.Linear by a LoRALinear, in place; returns (model, LoRA layers).

    A target names a module by its exact path or the end of it after a dot, as in PEFT: "W_q"
    matches "blocks.0.attention.W_q". "all-linear" stands for every nn.Linear, the output layer
    too; a compiled regular expression has to match a whole path. Nothing is targeted that lies in
    `modules_to_save`, the modules (a new head, say) that are trained and saved whole.

    Raises ValueError if a name matches nothing, a setting is wrong, the model has LoRA already or
    could not use it where it is wanted; TypeError if a target is not an nn.Linear. The model is
    then as before.
    """
    if any(lora_layers(model)):
        raise ValueError(
            "this model has LoRA layers already; take a fresh model, or call unload_lora(model)"
        )
    check_settings(rank, alpha, dropout, use_rslora)
    if target_modules != "all-linear" and not isinstance(target_modules, re.Pattern):
        target_modules = name_list(target_modules, "target_modules", ' or the word "all-linear"')
    saved = name_list(modules_to_save, "modules_to_save")
    config = LoRAConfig(int(rank), float(alpha), target_modules, float(dropout), use_rslora, saved)
    inner = inner_model(model)
    check_not_wrapped(inner)
    paths = target_paths(inner, config)
    check_saved(inner, saved)
    check_targets(inner, config, paths)
    before = {name: p.requires_grad for name, p in inner.named_parameters()}
    linears = [inner.get_submodule(path) for path in paths]
    try:
        layers = [LoRALinear(linear, rank, alpha, dropout, use_rslora) for linear in linears]
    except Exception:  # out of memory, or a dtype that PyTorch cannot promote
        _restore_requires_grad(inner, before)
        raise
    for path, layer in zip(paths, layers, strict=True):
        inner.set_submodule(path, layer.train(layer.original.training))
    inner.lora_config, inner._requires_grad_before_lora = config, before
    return model, layers


def inner_model(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, which puts a prefix before every path."""
    return getattr(model, "_orig_mod", model)


def _restore_requires_grad(model: nn.Module, before: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))


def lora_layers(model: nn.Module) -> Iterator[LoRALinear]:
    """In the order of `named_modules`. Raises TypeError if `model` is not an nn.Module."""
    check_module(model)
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def freeze_non_lora_params(model: nn.Module) -> None:
    """Leave only the LoRA factors, and the modules named in modules_to_save, trainable.

    Raises ValueError if the model has no LoRA layers.
    """
    saved = saved_paths(model, require_config(model).modules_to_save)
    model.requires_grad_(False)
    for layer in lora_layers(model):
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()
    for path in saved:
        model.get_submodule(path).requires_grad_()


def count_parameters(model: nn.Module, only_trainable: bool = False) -> int:
    """Number of scalars, a shared tensor counted once. Raises TypeError as lora_layers."""
    check_module(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trainable)


# --- merging -------------------------------------------------------------------------------------


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Fold every ΔW into its weight; what is merged already stays as it is.

    Raises ValueError if the model has no LoRA layers or a weight is tied to another module,
    TypeError and FloatingPointError as merged_weight. The model is then as before.
    """
    require_config(model)  # in a part of a model a tied weight would not be seen
    layers = [layer for layer in lora_layers(model) if not layer.merged]
    places = count_places(model, "_parameters")
    if any(places[id(layer.original.weight)] > 1 for layer in layers):
        raise ValueError(
            "a targeted weight is tied to another module, which a merge would change too; "
            "keep the adapter unmerged, or untie the weight first"
        )
    weights = [layer.merged_weight() for layer in layers]  # all of them, before any is used
    for layer, weight in zip(layers, weights, strict=True):
        layer._use_merged(weight)
    return model


def unmerge_lora_weights(model: nn.Module) -> nn.Module:
    """Restore every weight bit for bit. Raises ValueError if the model has no LoRA layers."""
    for layer in require_lora(model):
        layer.unmerge()
    return model


def unload_lora(model: nn.Module, merge: bool = True) -> nn.Module:
    """Put the original nn.Linear objects back, merged (or, with merge=False, as they were).

    With merge=False the weights are those before the injection, bit for bit, also if the adapter
    was merged. Parameters get the requires_grad they had before the injection. Modules named in
    modules_to_save stay as trained.

    Raises ValueError if the model has no LoRA layers; with merge=True also as merge_lora_weights.
    """
    require_config(model)
    (merge_lora_weights if merge else unmerge_lora_weights)(model)
    inner = inner_model(model)
    for path, module in list(inner.named_modules()):
        if isinstance(module, LoRALinear):
            inner.set_submodule(path, module.original)
    _restore_requires_grad(inner, inner._requires_grad_before_lora)
    del inner.lora_config, inner._requires_grad_before_lora
    return model


def require_lora(model: nn.Module) -> list[LoRALinear]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("this model has no LoRA layers; call add_lora_to_model(model) first")
    return layers


def require_config(model: nn.Module) -> LoRAConfig:
    require_lora(model)
    if not hasattr(inner_model(model), "lora_config"):
        raise ValueError(
            "this model holds LoRA layers, but add_lora_to_model was called on a module inside or "
            "around it: pass that one (for DistributedDataParallel, model.module)"
        )
    return inner_model(model).lora_config
