"""LoRA, low-rank adaptation (Hu et al. 2021, arXiv 2106.09685).

A frozen weight W (d_out × d_in) gets a trainable change of rank at most r,

    h = W x + s · B A x,    A (r × d_in) random,  B (d_out × r) zero,  s = alpha / r,

so that training starts exactly at the base model (§4.1). Reading order: the layer; putting it into
a model and taking it out again; merging.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """An nn.Linear, frozen, with a low-rank path beside it.

    `rank` r, `alpha` and `dropout` (on the path's input) as in the paper; `scaling` is alpha / r,
    or alpha / √r with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732). The factors are kept in
    float32 or better, whatever the base's dtype.

    Raises TypeError if `original_linear` is not an nn.Linear, ValueError for a rank that is not a
    positive integer, an alpha that is not positive, a dropout outside [0, 1).
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
        _check_settings(rank, alpha, dropout)
        d_out, d_in = original_linear.weight.shape
        self.original = original_linear.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        like = dict(
            device=original_linear.weight.device,
            dtype=torch.promote_types(original_linear.weight.dtype, torch.float32),
        )
        self.lora_A = nn.Parameter(torch.empty(rank, d_in, **like))
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√d_in), as loralib and PEFT
        # While merged: the weight before. A buffer, so that it follows the model to a device.
        self.register_buffer("_weight_before_merge", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d_in) → (…, d_out). Scaling the rank-sized middle is the cheapest place."""
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
        """ΔW = s · B A, shape (d_out, d_in), in the factors' dtype."""
        return self.scaling * self.lora_B @ self.lora_A

    @property
    def merged(self) -> bool:
        return self._weight_before_merge is not None

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW, added in float32 or better and rounded once to W's dtype.

        Raises FloatingPointError if it is not finite.
        """
        change = self.delta_weight()
        weight = self.original.weight
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


def _check_linear(module: nn.Module, where: str) -> None:
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{where} is a {type(module).__name__}; LoRA here adapts nn.Linear only")


def _check_settings(rank: int, alpha: float, dropout: float) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank is {rank!r}; it must be a positive integer, such as 8")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha is {alpha!r}; it must be a positive number, such as 16")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; it must be at least 0 and less than 1")


# --- into a model and out again ------------------------------------------------------------------


@dataclass(frozen=True)
class LoRAConfig:
    """What add_lora_to_model was asked for; the model keeps it as `model.lora_config`."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    dropout: float
    use_rslora: bool
    modules_to_save: tuple[str, ...]


def add_lora_to_model(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: tuple[str, ...] | str = ("W_q", "W_v"),
    dropout: float = 0.0,
    use_rslora: bool = False,
    modules_to_save: tuple[str, ...] = (),
) -> tuple[nn.Module, list[LoRALinear]]:
    """Replace every targeted nn.Linear by a LoRALinear, in place; returns (model, LoRA layers).

    A target names a module by its exact path or the end of it after a dot, as in PEFT: "W_q"
    matches "blocks.0.attention.W_q". "all-linear" stands for every nn.Linear outside
    `modules_to_save`, the modules (a new head, say) that are trained and saved whole.

    Raises ValueError if a target or a module to save matches nothing, the model has LoRA already,
    or a setting is wrong; TypeError if a target is not an nn.Linear. The model is then as before.
    """
    if isinstance(target_modules, str) and target_modules != "all-linear":
        raise ValueError(
            f"target_modules is the string {target_modules!r}; give a list, [{target_modules!r}], "
            'or the word "all-linear"'
        )
    if isinstance(modules_to_save, str):
        raise ValueError(f"modules_to_save is {modules_to_save!r}; give a list of names")
    if any(lora_layers(model)):
        raise ValueError(
            "this model has LoRA layers already; take a fresh model, or call unload_lora(model)"
        )
    _check_settings(rank, alpha, dropout)
    if target_modules != "all-linear":
        target_modules = tuple(target_modules)
    config = LoRAConfig(
        rank, float(alpha), target_modules, dropout, use_rslora, tuple(modules_to_save)
    )
    paths = _target_paths(model, config)
    model.lora_config = config
    model._requires_grad_before_lora = {n: p.requires_grad for n, p in model.named_parameters()}
    layers = []
    for path in paths:
        layer = LoRALinear(model.get_submodule(path), rank, alpha, dropout, use_rslora)
        layer.train(model.training)
        model.set_submodule(path, layer)
        layers.append(layer)
    return model, layers


def _matches(path: str, name: str) -> bool:
    """PEFT's rule for a list of names: the whole path, or its end after a dot."""
    return path == name or path.endswith("." + name)


def _target_paths(model: nn.Module, config: LoRAConfig) -> list[str]:
    modules = dict(model.named_modules())
    linear = [path for path, m in modules.items() if path and isinstance(m, nn.Linear)]
    saved = _saved_paths(model, config.modules_to_save)
    outside = [p for p in linear if not any(p == s or p.startswith(s + ".") for s in saved)]
    if config.target_modules == "all-linear":
        paths = outside
    else:
        paths = [p for p in modules if any(_matches(p, t) for t in config.target_modules)]
        missing = [t for t in config.target_modules if not any(_matches(p, t) for p in modules)]
        if missing:
            raise ValueError(
                f"target_modules {missing} match no module; the linear layers here are "
                f"{_listing(linear)}"
            )
    if not paths:
        raise ValueError(
            "no nn.Linear below this model to adapt; if the model is itself an nn.Linear, pass "
            "the module that holds it"
        )
    for path in paths:
        _check_linear(modules[path], f"target {path!r}")
        if path not in outside:
            raise ValueError(f"{path!r} is a target and in modules_to_save; it can only be one")
        _check_not_read_behind_its_back(modules, path)
    return paths


def _saved_paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    paths = {name: [p for p, _ in model.named_modules() if _matches(p, name)] for name in names}
    missing = [name for name in names if not paths[name]]
    if missing:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"modules_to_save {missing} match no module; at the top are: {children}")
    return [path for found in paths.values() for path in found]


def _check_not_read_behind_its_back(modules: dict[str, nn.Module], path: str) -> None:
    """These modules hand their children's weights to fused code, which would ignore LoRA."""
    parts = path.split(".")
    for end in range(len(parts)):
        parent = modules[".".join(parts[:end])]
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise ValueError(
                f"target {path!r} lies inside a {type(parent).__name__} module, which reads its "
                "children's weights itself and would silently ignore LoRA; leave it out"
            )


def _listing(paths: list[str]) -> str:
    """The last names with their counts: "W_q (4 times), W_v (4 times), classifier"."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return ", ".join(name if n == 1 else f"{name} ({n} times)" for name, n in counts.items())


def lora_layers(model: nn.Module) -> Iterator[LoRALinear]:
    return (module for module in model.modules() if isinstance(module, LoRALinear))


def _require_lora(model: nn.Module) -> list[LoRALinear]:
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("this model has no LoRA layers; call add_lora_to_model(model) first")
    return layers


def freeze_non_lora_params(model: nn.Module) -> None:
    """Leave only the LoRA factors, and the modules named in modules_to_save, trainable.

    Raises ValueError if the model has no LoRA layers.
    """
    layers = _require_lora(model)
    model.requires_grad_(False)
    for layer in layers:
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()
    for path in _saved_paths(model, model.lora_config.modules_to_save):
        model.get_submodule(path).requires_grad_()


def count_parameters(model: nn.Module, only_trainable: bool = False) -> int:
    """Number of scalars, a shared tensor counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not only_trainable)


# --- merging -------------------------------------------------------------------------------------


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Fold every ΔW into its weight; what is merged already stays as it is.

    Raises ValueError if the model has no LoRA layers or a weight is tied to another module,
    FloatingPointError if a merged weight is not finite. The model is then as before.
    """
    layers = [layer for layer in _require_lora(model) if not layer.merged]
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if any(uses[id(layer.original.weight)] > 1 for layer in layers):
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

    Parameters get the requires_grad they had before the injection. Modules named in
    modules_to_save stay as trained. Raises as merge_lora_weights does.
    """
    (merge_lora_weights if merge else unmerge_lora_weights)(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(path, module.original)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(model._requires_grad_before_lora[name])
    del model.lora_config, model._requires_grad_before_lora
    return model
