"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

A frozen weight W (d_out × d_in) gets a trainable change of rank at most r,

    h = W x + s · B A x,    A (r × d_in) random,  B (d_out × r) zero,  s = alpha / r,

so that training starts exactly at the base model (§4.1). Reading order: the layer; putting it into
a model and taking it out again; merging; what is refused, and why.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        _check_linear(original_linear, "original_linear")
        _check_settings(rank, alpha, dropout, use_rslora)
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
        _check_takes_a_sum(self.original)
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


@dataclass(frozen=True)
class LoRAConfig:
    """What add_lora_to_model was asked for; the model keeps it as `model.lora_config`."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str | re.Pattern
    dropout: float
    use_rslora: bool
    modules_to_save: tuple[str, ...]


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
    _check_settings(rank, alpha, dropout, use_rslora)
    if target_modules != "all-linear" and not isinstance(target_modules, re.Pattern):
        target_modules = _names(target_modules, "target_modules", ' or the word "all-linear"')
    saved = _names(modules_to_save, "modules_to_save")
    config = LoRAConfig(int(rank), float(alpha), target_modules, float(dropout), use_rslora, saved)
    inner = _inner(model)
    _check_not_wrapped(inner)
    paths = _target_paths(inner, config)
    _check_saved(inner, saved)
    _check_targets(inner, config, paths)
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


def _inner(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, which puts a prefix before every path."""
    return getattr(model, "_orig_mod", model)


def _restore_requires_grad(model: nn.Module, before: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(before.get(name, parameter.requires_grad))


def _matches(path: str, name: str) -> bool:
    """PEFT's rule for a list of names: the whole path, or its end after a dot."""
    return path == name or path.endswith("." + name)


def _inside(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def _target_paths(model: nn.Module, config: LoRAConfig) -> list[str]:
    targets, saved = config.target_modules, _saved_paths(model, config.modules_to_save)
    modules = {path: m for path, m in model.named_modules() if path and not _inside(path, saved)}
    if targets == "all-linear":
        return [path for path, module in modules.items() if _is_linear(module)]
    if isinstance(targets, re.Pattern):
        return [path for path in modules if targets.fullmatch(path)]
    return [path for path in modules if any(_matches(path, name) for name in targets)]


def _is_linear(module: nn.Module) -> bool:
    """Conv1D, the linear layer of GPT-2, counts, so that it is refused rather than left out."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _saved_paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [path for path, _ in model.named_modules() if any(_matches(path, n) for n in names)]


def _saved_in_peft(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """PEFT asks for no dot before the name of a module to save: "head" is "subhead" as well."""
    return [path for path, _ in model.named_modules() if path.endswith(names)]


def lora_layers(model: nn.Module) -> Iterator[LoRALinear]:
    """In the order of `named_modules`. Raises TypeError if `model` is not an nn.Module."""
    _check_module(model)
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def freeze_non_lora_params(model: nn.Module) -> None:
    """Leave only the LoRA factors, and the modules named in modules_to_save, trainable.

    Raises ValueError if the model has no LoRA layers.
    """
    saved = _saved_paths(model, _require_config(model).modules_to_save)
    model.requires_grad_(False)
    for layer in lora_layers(model):
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()
    for path in saved:
        model.get_submodule(path).requires_grad_()


def count_parameters(model: nn.Module, only_trainable: bool = False) -> int:
    """Number of scalars, a shared tensor counted once. Raises TypeError as lora_layers."""
    _check_module(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trainable)


# --- merging -------------------------------------------------------------------------------------


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Fold every ΔW into its weight; what is merged already stays as it is.

    Raises ValueError if the model has no LoRA layers or a weight is tied to another module,
    TypeError and FloatingPointError as merged_weight. The model is then as before.
    """
    _require_config(model)  # in a part of a model a tied weight would not be seen
    layers = [layer for layer in lora_layers(model) if not layer.merged]
    places = _places(model, "_parameters")
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
    for layer in _require_lora(model):
        layer.unmerge()
    return model


def unload_lora(model: nn.Module, merge: bool = True) -> nn.Module:
    """Put the original nn.Linear objects back, merged (or, with merge=False, as they were).

    With merge=False the weights are those before the injection, bit for bit, also if the adapter
    was merged. Parameters get the requires_grad they had before the injection. Modules named in
    modules_to_save stay as trained.

    Raises ValueError if the model has no LoRA layers; with merge=True also as merge_lora_weights.
    """
    _require_config(model)
    (merge_lora_weights if merge else unmerge_lora_weights)(model)
    inner = _inner(model)
    for path, module in list(inner.named_modules()):
        if isinstance(module, LoRALinear):
            inner.set_submodule(path, module.original)
    _restore_requires_grad(inner, inner._requires_grad_before_lora)
    del inner.lora_config, inner._requires_grad_before_lora
    return model


# --- what is refused, and why --------------------------------------------------------------------


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not an nn.Module; note that add_lora_to_model "
            "returns two things: model, layers = add_lora_to_model(model)"
        )


def _check_not_wrapped(model: nn.Module) -> None:
    """A wrapper knows the parameters of its beginning, and puts its own names into the paths."""
    wrappers = nn.DataParallel | nn.parallel.DistributedDataParallel
    for path, module in model.named_modules():
        if isinstance(module, wrappers) or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{path or 'model'} is wrapped in {type(module).__name__}; add LoRA to the plain "
                "model first, then wrap it"
            )


def _check_linear(module: nn.Module, where: str) -> None:
    if not isinstance(module, nn.Linear):
        kind = type(module).__name__
        why = ", and GPT-2's Conv1D is a transposed one; use PEFT for it" * (kind == "Conv1D")
        raise TypeError(f"{where} is a {kind}; LoRA here adapts nn.Linear only{why}")
    if isinstance(module, nn.LazyLinear):
        raise TypeError(f"{where} has no shape yet; run the model once before you add LoRA")


def _check_takes_a_sum(linear: nn.Linear) -> None:
    weight = linear._parameters.get("weight")
    if weight is None:  # weight normalisation and pruning compute it anew in every forward pass
        raise TypeError("a weight that is computed from other tensors cannot be merged with ΔW")
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"a quantised weight ({weight.dtype}) cannot be merged with ΔW")


def _check_settings(rank: int, alpha: float, dropout: float, use_rslora: bool) -> None:
    def number(value: object, kind: type = Real) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool)

    wrong = []
    if not (number(rank, Integral) and rank >= 1):
        wrong.append(f"rank is {rank!r}; it must be a positive integer, such as 8")
    if not (number(alpha) and 0 < alpha < math.inf):
        wrong.append(f"alpha is {alpha!r}; it must be a positive number, such as 16")
    if not (number(dropout) and 0 <= dropout < 1):
        wrong.append(f"dropout is {dropout!r}; it must be at least 0 and less than 1")
    if not isinstance(use_rslora, bool):
        wrong.append(f"use_rslora is {use_rslora!r}; it must be True or False")
    if wrong:
        raise ValueError("; ".join(wrong))


def _names(names: Iterable[str], argument: str, otherwise: str = "") -> tuple[str, ...]:
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = tuple(names)
        if all(isinstance(name, str) for name in names):
            return names
    example = [names] if isinstance(names, str) else ["W_q", "W_v"]
    raise ValueError(f"{argument} is {names!r}; give a list of names, such as {example}{otherwise}")


def _check_targets(model: nn.Module, config: LoRAConfig, paths: list[str]) -> None:
    modules, places = dict(model.named_modules()), _places(model, "_modules")
    targets, saved = config.target_modules, _saved_in_peft(model, config.modules_to_save)
    names = targets if isinstance(targets, tuple) else ()
    missing = [name for name in names if not any(_matches(path, name) for path in modules)]
    linear = _listing([path for path, module in modules.items() if path and _is_linear(module)])
    if not linear:
        raise ValueError(
            "there is no nn.Linear below this model; if it is one itself, pass what holds it"
        )
    if missing:
        raise ValueError(f"target_modules {missing} match no module; linear layers are {linear}")
    if not paths:
        raise ValueError(
            f"target_modules {targets!r} match nothing outside modules_to_save; linear layers are "
            f"{linear}"
        )
    for path in paths:
        _check_linear(modules[path], f"target {path!r}")
        if places[id(modules[path])] > 1:
            raise ValueError(
                f"target {path!r} is one module in several places, and LoRA would reach only this "
                "one; give every place a module of its own"
            )
        if _inside(path, saved):
            raise ValueError(
                f"PEFT would take modules_to_save {config.modules_to_save} for the target {path!r} "
                "too; put its whole name there as well, or do not target it"
            )
        _check_not_read_behind_its_back(modules, path)


def _check_not_read_behind_its_back(modules: dict[str, nn.Module], path: str) -> None:
    """These modules hand their children's weights to fused code, which would ignore LoRA."""
    parts = path.split(".")
    for end in range(len(parts)):
        parent = modules[".".join(parts[:end])]
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise ValueError(
                f"target {path!r} lies inside a {type(parent).__name__} module, which reads its "
                "children's weights itself and would silently ignore LoRA; name other targets"
            )


def _check_saved(model: nn.Module, names: tuple[str, ...]) -> None:
    paths, places = _saved_in_peft(model, names), _places(model, "_parameters")
    missing = [name for name in names if not any(_matches(path, name) for path in paths)]
    if missing:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"modules_to_save {missing} match no module; at the top are: {children}")
    for path in paths:
        if outer := [other for other in paths if other != path and _inside(path, [other])]:
            raise ValueError(
                f"{path!r} in modules_to_save lies inside {outer[0]!r}, which is saved whole; name "
                "one of them"
            )
        if any(places[id(p)] > 1 for p in model.get_submodule(path).parameters()):
            raise ValueError(
                f"{path!r} in modules_to_save is tied to another module, which would be trained "
                "and not saved; untie it first"
            )


def _places(model: nn.Module, kind: str) -> Counter:
    """In how many places each module ("_modules") or parameter ("_parameters") is, by its id."""
    return Counter(id(x) for module in model.modules() for x in getattr(module, kind).values())


def _listing(paths: list[str]) -> str:
    """The last names with their counts: "W_q (4 times), W_v (4 times), classifier"."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return ", ".join(name if n == 1 else f"{name} ({n} times)" for name, n in counts.items())


def _require_lora(model: nn.Module) -> list[LoRALinear]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("this model has no LoRA layers; call add_lora_to_model(model) first")
    return layers


def _require_config(model: nn.Module) -> LoRAConfig:
    _require_lora(model)
    if not hasattr(_inner(model), "lora_config"):
        raise ValueError(
            "this model holds LoRA layers, but add_lora_to_model was called on a module inside or "
            "around it: pass that one (for DistributedDataParallel, model.module)"
        )
    return _inner(model).lora_config
