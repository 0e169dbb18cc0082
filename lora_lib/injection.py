"""LoRA into a model and out of it again: add, freeze, merge, unmerge, unload, switch off.

Everything is checked before anything changes: a call that is refused leaves the model as it was.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lib import checks
from lora_lib.lora import LoRALinear, lora_layers, of_the_kind_of
from lora_lib.targets import Names, saved_paths, target_paths

State = dict[str, Tensor]
_NOTE = "_lora_injection"  # where a model keeps its note


@dataclass
class Injection:
    """What add_lora_to_model did, kept by the model: enough to undo it, and to name it in a file.

    It holds the modules themselves, not only their paths, so that a part of the model may be
    wrapped later.
    """

    modules: dict[str, nn.Module]  # path → module; targeted paths hold their LoRA layers
    targets: Names | str
    saved_names: tuple[str, ...]
    saved_before: dict[str, State]  # path of each of modules_to_save → its state before training
    required_grad: list[tuple[nn.Module, str, bool]]  # by the parameter's module and name there
    running_means: list[tuple[str, nn.Module, Tensor]]  # of norms, before training

    def layers(self) -> dict[str, LoRALinear]:
        return {path: m for path, m in self.modules.items() if isinstance(m, LoRALinear)}

    def saved_states(self) -> dict[str, State]:
        """Path → tensors of every module in modules_to_save. Raises ValueError if such a module was
        replaced, or its tensors have other names or shapes than before training."""
        present = set(self.modules[""].modules())
        states = {p: self.modules[p].state_dict(keep_vars=True) for p in self.saved_before}
        for path, state in states.items():
            before = self.saved_before[path]
            shapes = [{name: t.shape for name, t in s.items()} for s in (state, before)]
            if self.modules[path] not in present or shapes[0] != shapes[1]:
                raise ValueError(
                    f"{path!r} in modules_to_save was replaced, wrapped or changed after LoRA was "
                    "added; do that first (a new head, resized embeddings), then add LoRA"
                )
        return states

    def exchange_saved(self, states: dict[str, State]) -> dict[str, State]:
        """Swap these tensors into modules_to_save, and return the old ones. Nothing is written in
        place, so that graphs made earlier stay valid."""
        were = {}
        for path, places in self.saved_states().items():
            were[path] = {name: place.data for name, place in places.items()}
            for name, place in places.items():
                with of_the_kind_of(place):
                    place.data = states[path][name].to(place, copy=True)
        return were

    def restore_requires_grad(self) -> None:
        for module, name, required in self.required_grad:
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(required)


# --- in ------------------------------------------------------------------------------------------


def add_lora_to_model(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: Names | str = ("W_q", "W_v"),
    dropout: float = 0.0,
    use_rslora: bool = False,
    modules_to_save: Iterable[str] = (),
) -> tuple[nn.Module, list[LoRALinear]]:
    """Replace every targeted linear layer by a LoRALinear, in place; returns (model, LoRA layers).

    A target names a module by its exact path or the end of it after a dot, as in PEFT: "W_q"
    matches "blocks.0.attention.W_q". "all-linear" stands for every linear layer, the output layer
    too; a compiled regular expression has to match a whole path. Nothing in `modules_to_save` is
    targeted: these modules (a new head, say) are trained and saved whole. As in PEFT they are all
    whose path ends with one of the names, dot or not: "head" means "subhead" too. A layer shared
    with a second model is adapted there too.

    Raises ValueError if a name matches nothing, a setting is wrong, the model has LoRA already or
    could not use it where it is wanted, or is not in memory (meta device, offloaded). Raises
    TypeError if a target is not a linear layer. The model is then as before.
    """
    checks.check_settings(rank, alpha, dropout, use_rslora)
    if isinstance(target_modules, str) and target_modules != "all-linear":
        checks.name_list(target_modules, "target_modules", ' or the word "all-linear"')
    if not isinstance(target_modules, str | re.Pattern):
        target_modules = checks.name_list(target_modules, "target_modules")
    saved = checks.name_list(modules_to_save, "modules_to_save")
    modules = plain_modules(model)
    checks.check_names(modules, target_modules)
    paths = target_paths(modules, target_modules, saved_paths(modules, saved))
    settings = dict.fromkeys(paths, (rank, alpha))
    return model, inject(modules, settings, target_modules, dropout, use_rslora, saved)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path → module, without the prefix of torch.compile. Raises ValueError if LoRA is there."""
    if any(lora_layers(model)):
        raise ValueError(
            "this model has LoRA layers already; take a fresh model, or call unload_lora(model)"
        )
    return dict(getattr(model, "_orig_mod", model).named_modules())


@torch.inference_mode(False)  # what is made may be trained later
def inject(
    modules: dict[str, nn.Module],
    settings: dict[str, tuple[int, float]],
    targets: Names | str,
    dropout: float,
    use_rslora: bool,
    saved: tuple[str, ...],
) -> list[LoRALinear]:
    """Put LoRA into the plain model with these modules; `settings`: path → (rank, alpha)."""
    checks.check_not_wrapped(modules)
    checks.check_saved(modules, saved)
    checks.check_targets(modules, list(settings), saved)
    injection = Injection(
        modules=modules,
        targets=targets,
        saved_names=saved,
        saved_before={
            p: copy.deepcopy(modules[p].state_dict()) for p in saved_paths(modules, saved)
        },
        required_grad=[
            (module, name, parameter.requires_grad)
            for module in modules.values()
            for name, parameter in module.named_parameters(recurse=False)
        ],
        running_means=[
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
    except BaseException:  # out of memory, interrupted
        injection.restore_requires_grad()
        raise
    model = modules[""]
    for path, layer in layers.items():
        model.set_submodule(path, layer.train(layer.original.training))
    injection.modules = modules | layers
    vars(model)[_NOTE] = injection
    return list(layers.values())


def injection_of(model: nn.Module, switched_off: bool = False) -> Injection:
    """What add_lora_to_model noted, also if `model` is a wrapper around that model (DDP, say).

    Raises ValueError if there is no such note, RuntimeError if the adapter is switched off.
    """
    layers = list(lora_layers(model))
    if not layers:
        raise ValueError("this model has no LoRA layers; call add_lora_to_model(model) first")
    if not switched_off and not all(layer.enabled for layer in layers):
        raise RuntimeError(
            "the adapter is switched off: do this outside of `with adapter_disabled(model):`"
        )
    notes = [vars(m)[_NOTE] for m in model.modules() if _NOTE in vars(m)]
    if len(notes) != 1 or set(notes[0].layers().values()) != set(layers):
        raise ValueError(
            "this model holds LoRA layers that add_lora_to_model did not put into it: pass the "
            "model that it was called on (for a part, the whole); LoRALinear layers put in by hand "
            "are merged and saved by hand"
        )
    return notes[0]


def freeze_non_lora_params(model: nn.Module) -> None:
    """Leave only the LoRA factors, and the modules named in modules_to_save, trainable.

    Raises ValueError if the model has no LoRA layers, RuntimeError if the adapter is switched off.
    """
    injection = injection_of(model)
    injection.saved_states()  # raises if a module that should train is gone
    model.requires_grad_(False)
    for layer in injection.layers().values():
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()
    for path in injection.saved_before:
        injection.modules[path].requires_grad_()


# --- merged, and out -----------------------------------------------------------------------------


def merge_lora_weights(model: nn.Module) -> nn.Module:
    """Fold every ΔW into its weight; layers that are merged already stay as they are.

    Raises ValueError if the model has no LoRA layers or a weight is tied to another module,
    TypeError and FloatingPointError as merged_weight, RuntimeError if the adapter is switched off.
    The model is then as before. A weight that a second model shares is merged there too.
    """
    layers = [layer for layer in injection_of(model).layers().values() if not layer.merged]
    checks.check_not_tied(model, [layer.original for layer in layers])
    weights = [layer.merged_weight() for layer in layers]  # all of them, before any is used
    for layer, weight in zip(layers, weights, strict=True):
        layer.use_merged(weight)
    return model


def unmerge_lora_weights(model: nn.Module) -> nn.Module:
    """Restore every weight bit for bit. Raises ValueError if the model has no LoRA layers,
    RuntimeError if a weight was changed since the merge or the adapter is switched off; the model
    is then as before."""
    layers = injection_of(model).layers().values()
    for layer in layers:
        layer.check_still_merged()
    for layer in layers:
        layer.unmerge()
    return model


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
        injection.saved_states()  # raises, before anything changes, if they cannot be put back
        unmerge_lora_weights(model)
        injection.exchange_saved(injection.saved_before)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.original)
    for layer in injection.layers().values():  # whoever still holds one gets original's output
        layer.enabled, layer._weight_before_merge = False, None
    injection.restore_requires_grad()
    for module in model.modules():
        vars(module).pop(_NOTE, None)
    return model


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """`with adapter_disabled(model):` inside the block the model is the base again, modules_to_save
    as before training included. Afterwards what was merged is merged again.

    Raises as unmerge_lora_weights and, afterwards, as merge_lora_weights. One model in several
    threads is switched for all of them.
    """
    injection = injection_of(model, switched_off=True)
    layers = list(injection.layers().values())
    before = [(layer.merged, layer.enabled) for layer in layers]
    injection.saved_states()  # raises before anything changes
    if any(merged for merged, _ in before):
        unmerge_lora_weights(model)
    trained = injection.exchange_saved(injection.saved_before)
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        injection.exchange_saved(trained)
        for layer, (_, enabled) in zip(layers, before, strict=True):
            layer.enabled = enabled
        for layer, (merged, _) in zip(layers, before, strict=True):
            if merged:
                layer.merge()
