"""Notebook 03."""

import copy

from torch import nn

from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import LoRALinear
from lora_lib.targets import matches

# --- injection -----------------------------------------------------------------------------------


def linears(model):
    return [(p, m) for p, m in list(model.named_modules()) if isinstance(m, nn.Linear)]


def injecting(matches):
    """An answer that replaces what `matches(path, target)`."""

    def answer(model, target, rank, alpha):
        for path, module in linears(model):
            if matches(path, target):
                model.set_submodule(path, LoRALinear(module, rank, alpha))

    return answer


def by_parents(model, target, rank, alpha):
    """Another way: over parents and their attributes, comparing pieces of the path."""
    wanted = target.split(".")
    for parent_path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            pieces = [*parent_path.split("."), name]
            if isinstance(child, nn.Linear) and pieces[-len(wanted) :] == wanted:
                setattr(parent, name, LoRALinear(child, rank=rank, alpha=alpha))
    return model


def by_the_library(model, target, rank, alpha):
    return add_lora_to_model(model, rank, alpha, [target])


def only_made(model, target, rank, alpha):
    return [LoRALinear(m, rank, alpha) for p, m in linears(model) if matches(p, target)]


def on_a_copy(model, target, rank, alpha):
    return by_parents(copy.deepcopy(model), target, rank, alpha)


def children_only(model, target, rank, alpha):
    for name, child in list(model.named_children()):
        if name == target:
            setattr(model, name, LoRALinear(child, rank, alpha))


def around_a_new_linear(model, target, rank, alpha):
    for path, module in linears(model):
        if matches(path, target):
            new = nn.Linear(module.in_features, module.out_features)
            model.set_submodule(path, LoRALinear(new, rank, alpha))


def with_default_rank(model, target, rank, alpha):
    for path, module in linears(model):
        if matches(path, target):
            model.set_submodule(path, LoRALinear(module))


def twice(model, target, rank, alpha):
    by_parents(model, target, rank, alpha)
    injecting(lambda p, t: p.endswith(t + ".original"))(model, target, rank, alpha)


def random_b(model, target, rank, alpha):
    by_parents(model, target, rank, alpha)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B)


def unfrozen(model, target, rank, alpha):
    by_parents(model, target, rank, alpha).requires_grad_(True)


# --- freezing ------------------------------------------------------------------------------------


def by_type(model, modules_to_save):
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.lora_A.requires_grad = module.lora_B.requires_grad = True
        if any(matches(path, name) for name in modules_to_save):
            module.requires_grad_(True)


def by_parameter_name(model, modules_to_save):
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        saved = any(f".{path}.".find(f".{m}.") >= 0 for m in modules_to_save)
        parameter.requires_grad_(last in ("lora_A", "lora_B") or saved)


def freeze_by_the_library(model, modules_to_save):
    freeze_non_lora_params(model)


def trains_if(wanted):
    """An answer that sets every parameter by `wanted(name, modules_to_save)`."""

    def answer(model, modules_to_save):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted(name, modules_to_save))

    return answer


def factor(name):
    return name.endswith(("lora_A", "lora_B"))


def only_switches_off(model, modules_to_save):
    for name, parameter in model.named_parameters():
        if not factor(name) and not any(f"{m}." in name[:5] for m in modules_to_save):
            parameter.requires_grad_(False)


def zeroes(model, modules_to_save):
    by_type(model, modules_to_save)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            parameter.data.zero_()


RIGHT = {
    "inject": [injecting(matches), by_parents, by_the_library],
    "freeze": [by_type, by_parameter_name, freeze_by_the_library],
}

WRONG = {
    "inject": {
        "set_submodule": only_made,
        "changed a copy": on_a_copy,
        "contains 'q' somewhere": injecting(lambda path, target: target in path),
        "dot in front": injecting(lambda path, target: path.endswith(target)),
        "compare each path": injecting(lambda path, target: True),
        "compare for equality": injecting(lambda path, target: path.endswith("." + target)),
        "whole path, not with": injecting(lambda path, target: path.split(".")[-1] == target),
        "visits every depth": children_only,
        "another nn.Linear": around_a_new_linear,
        "pass them on": with_default_rank,
        "LoRA inside LoRA": twice,
        "output moved": random_b,
        "LoRALinear had frozen it": unfrozen,
    },
    "freeze": {
        "nothing was frozen": lambda model, saved: None,
        "nothing trains now": lambda model, saved: model.requires_grad_(False),
        "factors are frozen": trains_if(lambda n, saved: n.startswith("head.")),
        "both factors": trains_if(lambda n, saved: n.endswith("lora_B") or n.startswith("head.")),
        "wrapped weight": trains_if(lambda n, saved: factor(n) or "original" in n),
        '"header" trains': trains_if(lambda n, saved: factor(n) or any(s in n for s in saved)),
        '"flora" trains': trains_if(lambda n, saved: "lora" in n or n.startswith("head.")),
        "still trains": trains_if(lambda n, saved: factor(n) or "norm" in n),
        "named in modules_to_save, is frozen": trains_if(lambda n, saved: factor(n)),
        "head.bias is frozen": trains_if(lambda n, saved: factor(n) or n == "head.weight"),
        "was empty": trains_if(lambda n, saved: factor(n) or n.startswith("head.")),
        "as after load_adapter": only_switches_off,
        "another value": zeroes,
    },
}
