"""What LoRA refuses, and why. Errors name what was given, what was expected and what to do."""

import math
import re
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from lora_lib.targets import (
    conv1d,
    count_places,
    inside,
    is_linear,
    listing,
    matches,
    saved_in_peft,
    saved_paths,
)

# --- arguments -----------------------------------------------------------------------------------


def check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not an nn.Module; note that add_lora_to_model "
            "returns two things: model, layers = add_lora_to_model(model)"
        )


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


def name_list(names: Iterable[str], argument: str, otherwise: str = "") -> tuple[str, ...]:
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = tuple(names)
        if all(isinstance(name, str) for name in names):
            return names
    example = [names] if isinstance(names, str) else ["W_q", "W_v"]
    raise ValueError(f"{argument} is {names!r}; give a list of names, such as {example}{otherwise}")


# --- one layer -----------------------------------------------------------------------------------


def check_linear(module: nn.Module, where: str) -> None:
    """That LoRA can stand beside it."""
    kind = type(module).__name__
    if kind == "LoRALinear":
        raise TypeError(f"{where} is a LoRALinear already; LoRA is not put into LoRA")
    if not is_linear(module):
        raise TypeError(
            f"{where} is a {kind}; LoRA here adapts nn.Linear only (and GPT-2's Conv1D)"
        )
    if isinstance(module, nn.LazyLinear):
        raise TypeError(f"{where} has no shape yet; run the model once before you add LoRA")
    check_in_memory(module, where)
    check_own_forward(module, where)


def check_in_memory(module: nn.Module, where: str) -> None:
    if any(tensor.is_meta for tensor in module.state_dict(keep_vars=True).values()
           if isinstance(tensor, Tensor)):  # fmt: skip
        raise ValueError(
            f"{where} has no memory (meta device, or offloaded); load the model's weights first"
        )


def check_own_forward(linear: nn.Module, where: str) -> None:
    """A function on the instance is bound to it, and would compute with W whatever we do."""
    if "forward" in vars(linear) and not is_plain(linear):
        raise TypeError(
            f"the forward of {where} was replaced on this one module; make it a method of a class, "
            "or name other targets"
        )


def takes_a_sum(linear: nn.Module) -> bool:
    """Whether W + ΔW can take the place of its weight: a plain matrix of 16 bits or more. One that
    is quantised, packed, sharded, or computed from others is not."""
    weight = linear._parameters.get("weight")
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.ndim == 2
        and weight.is_floating_point()
        and weight.element_size() >= 2
    )


def check_takes_a_sum(linear: nn.Module) -> None:
    if takes_a_sum(linear):
        return
    weight = linear._parameters.get("weight")
    if weight is None:  # weight normalisation and pruning compute it anew in every forward pass
        raise TypeError("a weight that is computed from other tensors cannot be merged with ΔW")
    raise TypeError(
        f"a quantised, packed or sharded weight ({type(weight).__name__} of {weight.dtype}) cannot "
        "be merged with ΔW"
    )


def is_plain(linear: nn.Module) -> bool:
    """Whether x Wᵀ + b is all that it computes: nn.Linear's own forward (or Conv1D's), and no hook
    that may change what goes in or comes out."""
    # accelerate keeps the forward aside around which it moves tensors between devices
    own = vars(linear).get("_old_forward") or vars(linear).get("forward")
    forward = getattr(own, "__func__", own) or type(linear).forward
    return forward in (nn.Linear.forward, *(kind.forward for kind in conv1d())) and not (
        linear._forward_pre_hooks
        or linear._forward_hooks
        or linear._backward_pre_hooks
        or linear._backward_hooks
    )


# --- a whole model -------------------------------------------------------------------------------


def check_not_wrapped(model: nn.Module) -> None:
    """A wrapper knows the parameters of its beginning, and puts its own names into the paths."""
    wrappers = nn.DataParallel | nn.parallel.DistributedDataParallel
    for path, module in model.named_modules():
        if isinstance(module, wrappers) or {"_orig_mod", "_checkpoint_wrapped_module"} & {
            *module._modules
        }:
            raise ValueError(
                f"{path or 'model'} is wrapped in {type(module).__name__}; add LoRA to the plain "
                "model first, then wrap it"
            )


def check_names(modules: dict[str, nn.Module], targets: tuple[str, ...] | str | re.Pattern) -> None:
    """That there are linear layers, and that every name in a list of targets means something."""
    names = targets if isinstance(targets, tuple) else ()
    missing = [name for name in names if not saved_paths(modules, [name])]
    linear = listing(path for path, module in modules.items() if path and is_linear(module))
    if not linear:
        raise ValueError(
            "there is no nn.Linear below this model; if it is one itself, pass what holds it"
        )
    if missing:
        raise ValueError(f"target_modules {missing} match no module; linear layers are {linear}")


def check_targets(model: nn.Module, paths: Iterable[str], saved: tuple[str, ...]) -> None:
    modules, places = dict(model.named_modules()), count_places(model, "_modules")
    saved_too = saved_in_peft(modules, saved)
    if not paths:
        linear = listing(path for path, module in modules.items() if path and is_linear(module))
        raise ValueError(
            f"target_modules match nothing outside modules_to_save {saved}; linear layers are "
            f"{linear}"
        )
    for path in paths:
        check_linear(modules[path], f"target {path!r}")
        if places[id(modules[path])] > 1:
            raise ValueError(
                f"target {path!r} is one module in several places, and LoRA would reach only this "
                "one; give every place a module of its own"
            )
        if inside(path, saved_too):
            raise ValueError(
                f"PEFT would take modules_to_save {saved} for the target {path!r} too; put its "
                "whole name there as well, or do not target it"
            )


def check_saved(model: nn.Module, names: tuple[str, ...]) -> None:
    modules, places = dict(model.named_modules()), count_places(model, "_parameters")
    paths = saved_in_peft(modules, names)
    missing = [name for name in names if not any(matches(path, name) for path in paths)]
    if missing:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"modules_to_save {missing} match no module; at the top are: {children}")
    for path in paths:
        where = f"{path!r} in modules_to_save"
        if outer := [other for other in paths if other != path and inside(path, [other])]:
            raise ValueError(f"{where} lies inside {outer[0]!r}, which is saved whole; name one")
        if any(places[id(p)] > 1 for p in modules[path].parameters()):
            raise ValueError(
                f"{where} is tied to another module, which would be trained and not saved; untie "
                "it first"
            )
        check_in_memory(modules[path], where)
        for name, value in modules[path].state_dict().items():
            if not isinstance(value, Tensor):  # get_extra_state
                raise ValueError(f"{where} keeps {name}, which is no tensor and cannot be saved")
            if 0 in value.stride() and value.numel() > 1:
                raise ValueError(
                    f"{where} keeps {name}, an expanded tensor whose entries share memory and "
                    "cannot be loaded one by one; make it contiguous first"
                )


def check_finite(tensors: dict[str, Tensor]) -> None:
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is not finite ({len(wrong)} such tensors), so nothing was written; the "
            "training diverged: start again from the last good adapter, at a lower learning rate"
        )
