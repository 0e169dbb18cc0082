"""What LoRA refuses, and why. Errors name what was given, what was expected and what to do."""

import math
from numbers import Integral, Real

import torch
from torch import nn

from lora_lib.targets import (
    LoRAConfig,
    count_places,
    inside,
    is_linear,
    listing,
    matches,
    saved_in_peft,
)


def check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not an nn.Module; note that add_lora_to_model "
            "returns two things: model, layers = add_lora_to_model(model)"
        )


def check_not_wrapped(model: nn.Module) -> None:
    """A wrapper knows the parameters of its beginning, and puts its own names into the paths."""
    wrappers = nn.DataParallel | nn.parallel.DistributedDataParallel
    for path, module in model.named_modules():
        if isinstance(module, wrappers) or hasattr(module, "_orig_mod"):
            raise ValueError(
                f"{path or 'model'} is wrapped in {type(module).__name__}; add LoRA to the plain "
                "model first, then wrap it"
            )


def check_linear(module: nn.Module, where: str) -> None:
    if not isinstance(module, nn.Linear):
        kind = type(module).__name__
        why = ", and GPT-2's Conv1D is a transposed one; use PEFT for it" * (kind == "Conv1D")
        raise TypeError(f"{where} is a {kind}; LoRA here adapts nn.Linear only{why}")
    if isinstance(module, nn.LazyLinear):
        raise TypeError(f"{where} has no shape yet; run the model once before you add LoRA")


def check_takes_a_sum(linear: nn.Linear) -> None:
    weight = linear._parameters.get("weight")
    if weight is None:  # weight normalisation and pruning compute it anew in every forward pass
        raise TypeError("a weight that is computed from other tensors cannot be merged with ΔW")
    if weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"a quantised weight ({weight.dtype}) cannot be merged with ΔW")


def check_settings(rank: int, alpha: float, dropout: float, use_rslora: bool) -> None:
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


def check_targets(model: nn.Module, config: LoRAConfig, paths: list[str]) -> None:
    modules, places = dict(model.named_modules()), count_places(model, "_modules")
    targets, saved = config.target_modules, saved_in_peft(model, config.modules_to_save)
    names = targets if isinstance(targets, tuple) else ()
    missing = [name for name in names if not any(matches(path, name) for path in modules)]
    linear = listing([path for path, module in modules.items() if path and is_linear(module)])
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
        check_linear(modules[path], f"target {path!r}")
        if places[id(modules[path])] > 1:
            raise ValueError(
                f"target {path!r} is one module in several places, and LoRA would reach only this "
                "one; give every place a module of its own"
            )
        if inside(path, saved):
            raise ValueError(
                f"PEFT would take modules_to_save {config.modules_to_save} for the target {path!r} "
                "too; put its whole name there as well, or do not target it"
            )
        check_not_read_behind_its_back(modules, path)


def check_not_read_behind_its_back(modules: dict[str, nn.Module], path: str) -> None:
    """These modules hand their children's weights to fused code, which would ignore LoRA."""
    parts = path.split(".")
    for end in range(len(parts)):
        parent = modules[".".join(parts[:end])]
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            raise ValueError(
                f"target {path!r} lies inside a {type(parent).__name__} module, which reads its "
                "children's weights itself and would silently ignore LoRA; name other targets"
            )


def check_saved(model: nn.Module, names: tuple[str, ...]) -> None:
    paths, places = saved_in_peft(model, names), count_places(model, "_parameters")
    missing = [name for name in names if not any(matches(path, name) for path in paths)]
    if missing:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"modules_to_save {missing} match no module; at the top are: {children}")
    for path in paths:
        if outer := [other for other in paths if other != path and inside(path, [other])]:
            raise ValueError(
                f"{path!r} in modules_to_save lies inside {outer[0]!r}, which is saved whole; name "
                "one of them"
            )
        if any(places[id(p)] > 1 for p in model.get_submodule(path).parameters()):
            raise ValueError(
                f"{path!r} in modules_to_save is tied to another module, which would be trained "
                "and not saved; untie it first"
            )
