"""LoRA into a model and out of it again: add, freeze, merge, unmerge, unload, switch off.

Every change is all or nothing: what is refused leaves the model as it was.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lib import checks
from lora_lib.lora import LoRALinear, lora_layers
from lora_lib.targets import count_places, saved_in_peft, saved_paths, target_paths


@dataclass
class Injection:
    """What add_lora_to_model did, kept by the model: enough to undo it, and to name it in a file.

    It knows modules, not only their names, so that a part of the model may be wrapped later.
    """

    modules: dict[str, nn.Module]  # by path, as the plain model had them, LoRA layers in place
    targets: tuple[str, ...] | str | re.Pattern
    saved: tuple[str, ...]  # modules_to_save
    saved_before: dict[str, dict[str, Tensor]]  # path → its state before training
    required_grad: list[tuple[nn.Module, str, bool]]
    statistics: list[tuple[str, nn.Module, Tensor]]  # running means before training

    def layers(self) -> dict[str, LoRALinear]:
        return {path: m for path, m in self.modules.items() if isinstance(m, LoRALinear)}

    def saved_state(self) -> dict[str, dict[str, Tensor]]:
        """Path → a copy of the state of every module in modules_to_save."""
        self.check_saved_names()
        return {path: _copy(self.modules[path].state_dict()) for path in self.saved_before}

    def check_saved_names(self) -> None:
        for path, before in self.saved_before.items():
            if self.modules[path].state_dict().keys() != before.keys():
                raise ValueError(
                    f"{path!r} in modules_to_save was wrapped or changed after LoRA was added, so "
                    "its tensors have other names; unwrap it first"
                )

    @torch.inference_mode(False)
    def load_saved(self, states: dict[str, dict[str, Tensor]]) -> None:
        for path, state in states.items():
            self.modules[path].load_state_dict(state)

    def restore_requires_grad(self) -> None:
        for module, name, required in self.required_grad:
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(required)


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def add_lora_to_model(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: Iterable[str] | str | re.Pattern = ("W_q", "W_v"),
    dropout: float = 0.0,
    use_rslora: bool = False,
    modules_to_save: Iterable[str] = (),
) -> tuple[nn.Module, list[LoRALinear]]:
    """Replace every targeted linear layer by a LoRALinear, in place; returns (model, LoRA layers).

    A target names a module by its exact path or the end of it after a dot, as in PEFT: "W_q"
    matches "blocks.0.attention.W_q". "all-linear" stands for every linear layer, the output layer
    too; a compiled regular expression has to match a whole path. Nothing is targeted that lies in
    `modules_to_save`, the modules (a new head, say) that are trained and saved whole. A layer that
    a second model holds as well is adapted there too.

    Raises ValueError if a name matches nothing, a setting is wrong, the model has LoRA already or
    could not use it where it is wanted, or has no memory (meta device, offloaded); TypeError if a
    target is not a linear layer. The model is then as before.
    """
    checks.check_settings(rank, alpha, dropout, use_rslora)
    if target_modules != "all-linear" and not isinstance(target_modules, re.Pattern):
        word = ' or the word "all-linear"'
        target_modules = checks.name_list(target_modules, "target_modules", word)
    saved = checks.name_list(modules_to_save, "modules_to_save")
    plain = _plain(model)
    modules = dict(plain.named_modules())
    checks.check_names(modules, target_modules)
    paths = target_paths(modules, target_modules, saved_paths(modules, saved))
    settings = dict.fromkeys(paths, (rank, alpha))
    return model, inject(plain, settings, target_modules, dropout, use_rslora, saved)


def _plain(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, without LoRA."""
    checks.check_module(model)
    if any(lora_layers(model)):
        raise ValueError(
            "this model has LoRA layers already; take a fresh model, or call unload_lora(model)"
        )
    return getattr(model, "_orig_mod", model)


@torch.inference_mode(False)
def inject(
    model: nn.Module,
    settings: dict[str, tuple[int, float]],
    targets: tuple[str, ...] | str | re.Pattern,
    dropout: float,
    use_rslora: bool,
    saved: tuple[str, ...],
) -> list[LoRALinear]:
    """LoRA into a plain model: `settings` gives rank and alpha for each path."""
    checks.check_not_wrapped(model)
    checks.check_saved(model, saved)
    checks.check_targets(model, settings, saved)
    modules = dict(model.named_modules())
    injection = Injection(
        modules,
        targets,
        saved,
        {path: _copy(modules[path].state_dict()) for path in saved_in_peft(modules, saved)},
        [
            (module, name, parameter.requires_grad)
            for module in modules.values()
            for name, parameter in module.named_parameters(recurse=False)
        ],
        [
            (path, module, module.running_mean.clone())
            for path, module in modules.items()
            if module._buffers.get("running_mean") is not None
        ],
    )
    try:
        layers = {
            path: LoRALinear(modules[path], rank, alpha, dropout, use_rslora)
            for path, (rank, alpha) in settings.items()
        }
    except Exception:  # out of memory
        injection.restore_requires_grad()
        raise
    for path, layer in layers.items():
        model.set_submodule(path, layer.train(layer.original.training))
    injection.modules = modules | layers
    model._lora = injection
    return list(layers.values())


def injection_of(model: nn.Module) -> Injection:
    """What add_lora_to_model noted, also if `model` is a wrapper around that model (DDP, say)."""
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("this model has no LoRA layers; call add_lora_to_model(model) first")
    notes = [vars(m)["_lora"] for m in model.modules() if "_lora" in vars(m)]
    if len(notes) != 1 or set(notes[0].layers().values()) != set(layers):
        raise ValueError(
            "this model holds LoRA layers that add_lora_to_model did not put into it: pass the "
            "model that it was called on (for a part, the whole); LoRALinear layers put in by hand "
            "are merged and saved by hand"
        )
    return notes[0]


def freeze_non_lora_params(model: nn.Module) -> None:
    """Leave only the LoRA factors, and the modules named in modules_to_save, trainable.

    Raises ValueError if the model has no LoRA layers.
    """
    injection = injection_of(model)
    model.requires_grad_(False)
    for layer in injection.layers().values():
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()
    for path in saved_paths(injection.modules, injection.saved):
        injection.modules[path].requires_grad_()


# --- merging, and out of a model -----------------------------------------------------------------


@torch.inference_mode(False)
def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Fold every ΔW into its weight; what is merged already stays as it is.

    Raises ValueError if the model has no LoRA layers or a weight is tied to another module,
    TypeError and FloatingPointError as merged_weight. The model is then as before. A weight that a
    second model shares is merged there too.
    """
    layers = [layer for layer in injection_of(model).layers().values() if not layer.merged]
    places = count_places(model, "_parameters")
    if any(places[id(layer.original._parameters.get("weight"))] > 1 for layer in layers):
        raise ValueError(
            "a targeted weight is tied to another module, which a merge would change too; "
            "keep the adapter unmerged, or untie the weight first"
        )
    weights = [layer.merged_weight() for layer in layers]  # all of them, before any is used
    for layer, weight in zip(layers, weights, strict=True):
        layer._use_merged(weight)
    return model


@torch.inference_mode(False)
def unmerge_lora_weights(model: nn.Module) -> nn.Module:
    """Restore every weight bit for bit. Raises ValueError if the model has no LoRA layers,
    RuntimeError if a weight was changed since the merge; the model is then as before."""
    layers = injection_of(model).layers().values()
    for layer in layers:
        layer.check_still_merged()
    for layer in layers:
        layer.unmerge()
    return model


@torch.inference_mode(False)
def unload_lora(model: nn.Module, merge: bool = True) -> nn.Module:
    """Put the original layers back, merged (or, with merge=False, as they were).

    With merge=False the model is as before the injection, bit for bit, modules_to_save included,
    also if the adapter was merged. Parameters get the requires_grad they had before the injection.

    Raises ValueError if the model has no LoRA layers; with merge=True also as merge_lora_weights,
    otherwise as unmerge_lora_weights.
    """
    injection = injection_of(model)
    if merge:
        merge_lora_weights(model)
    else:
        injection.check_saved_names()
        unmerge_lora_weights(model)
        injection.load_saved(injection.saved_before)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LoRALinear) and parent is not child:
                setattr(parent, name, child.original)
    injection.restore_requires_grad()
    for module in model.modules():
        vars(module).pop("_lora", None)
    return model


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """`with adapter_disabled(model):` it is the base again, modules_to_save included.

    Raises as unmerge_lora_weights. One model in several threads is switched for all of them.
    """
    injection = injection_of(model)
    layers = injection.layers().values()
    merged, enabled = [[getattr(layer, name) for layer in layers] for name in ("merged", "enabled")]
    trained = injection.saved_state()
    unmerge_lora_weights(model)
    injection.load_saved(injection.saved_before)
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        injection.load_saved(trained)
        for layer, was_merged, was_enabled in zip(layers, merged, enabled, strict=True):
            layer.enabled = was_enabled
            if was_merged:
                layer.merge()
