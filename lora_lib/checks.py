"""What LoRA refuses, and why. Errors name what was given, what was expected and what to do."""

import math
import sys
from collections import Counter
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lora_lib.targets import Names, conv1d, is_linear, is_named, lies_in, saved_paths, shape_of

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
    if kind == "LoRALinear":  # by name: its module imports this one
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
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise ValueError(
            f"{where} has no memory (meta device, or offloaded); load the model's weights first"
        )


def check_own_forward(linear: nn.Module, where: str) -> None:
    """A function put on the instance computes with W whatever we do, unless it is a method of it,
    or as accelerate puts it there, a partial function of it."""
    own = vars(linear).get("forward")
    of_this = (getattr(own, "__self__", None), *getattr(own, "args", ()))
    if own is not None and not any(x is linear for x in of_this):
        raise TypeError(
            f"the forward of {where} was replaced on this one module; make it a method of a class, "
            "or name other targets"
        )


def takes_a_sum(linear: nn.Module) -> bool:
    """Whether W + ΔW can take the place of its weight: a plain matrix of 16 bits or more. One that
    is quantised, packed, sharded, or computed from others is not."""
    weight = held_weight(linear)
    return (
        type(weight) in (nn.Parameter, Tensor, FakeTensor)
        and tuple(weight.shape) in (shape_of(linear), shape_of(linear)[::-1])
        and weight.is_floating_point()
        and weight.element_size() >= 2
        and not hasattr(type(linear), "weight")  # a property of its class
    )


def held_weight(linear: nn.Module) -> Tensor | None:
    """Replicas of DataParallel keep their parameters in another place."""
    held = vars(linear).get("_former_parameters") or linear._parameters
    return held.get("weight")


def check_takes_a_sum(linear: nn.Module) -> None:
    if takes_a_sum(linear):
        return
    weight = held_weight(linear)
    # Weight normalisation and pruning compute it anew in every forward pass.
    if weight is None or hasattr(type(linear), "weight"):
        raise TypeError("a weight that is computed from other tensors cannot be merged with ΔW")
    raise TypeError(
        f"a quantised, packed or sharded weight ({type(weight).__name__} of {weight.dtype}) cannot "
        "be merged with ΔW"
    )


def has_its_own_way(linear: nn.Module) -> bool:
    """Whether LoRA runs its own forward with W + ΔW: it is no plain linear layer (another forward,
    or hooks), and its weight can take a sum. A quantised one gets W x + ΔW x."""
    return not is_plain(linear) and takes_a_sum(linear)


def is_plain(linear: nn.Module) -> bool:
    """Whether x Wᵀ + b is all that it computes: nn.Linear's own forward (or Conv1D's), and no hook
    that may change what goes in or comes out."""
    if (
        linear._forward_pre_hooks
        or linear._forward_hooks
        or linear._backward_pre_hooks
        or linear._backward_hooks
    ):
        return False
    forward = type(linear).forward
    if "forward" in vars(linear):
        # accelerate keeps the forward aside around which it moves tensors between devices
        own = vars(linear).get("_old_forward", linear.forward)
        forward = getattr(own, "__func__", own)
    return forward is nn.Linear.forward or any(forward is kind.forward for kind in conv1d())


# --- a whole model -------------------------------------------------------------------------------

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # their children


def check_not_wrapped(modules: dict[str, nn.Module]) -> None:
    """A wrapper puts a name of its own into the paths, which no other copy of the model has; a
    sharded model would not shard what is added."""
    for path, module in modules.items():
        parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
        parallel |= any(map(_is_sharded, module._parameters.values()))
        if parallel or any(name in module._modules for name in WRAPPERS):
            raise ValueError(
                f"{path or 'model'} is wrapped in {type(module).__name__}; add LoRA to the plain "
                "model first, then wrap it"
            )


def check_names(modules: dict[str, nn.Module], targets: Names | str) -> None:
    """That there are linear layers, and that every name in a list of targets means something."""
    if not any(path and is_linear(module) for path, module in modules.items()):
        raise ValueError(
            "there is no nn.Linear below this model; if it is one itself, pass what holds it"
        )
    names = targets if isinstance(targets, tuple) else ()
    missing = [name for name in names if not any(is_named(path, [name]) for path in modules)]
    if missing:
        raise ValueError(f"target_modules {missing} match no module; {linear_layers(modules)}")


def check_targets(modules: dict[str, nn.Module], paths: list[str], saved: tuple[str, ...]) -> None:
    if not paths:
        raise ValueError(
            f"target_modules match nothing outside modules_to_save {saved}; "
            f"{linear_layers(modules)}"
        )
    places = count_places(modules.values(), "_modules")
    for path in paths:
        check_linear(modules[path], f"target {path!r}")
        if places[id(modules[path])] > 1:
            raise ValueError(
                f"target {path!r} is one module in several places, and LoRA would reach only this "
                "one; give every place a module of its own"
            )


def check_saved(modules: dict[str, nn.Module], names: tuple[str, ...]) -> None:
    """That modules_to_save are there, and can be saved and loaded whole."""
    missing = [name for name in names if not saved_paths(modules, [name])]
    if missing:
        children = ", ".join(name for name, _ in modules[""].named_children())
        raise ValueError(f"modules_to_save {missing} match no module; at the top are: {children}")
    paths, places = saved_paths(modules, names), count_places(modules.values(), "_parameters")
    for path in paths:
        where = f"{path!r} in modules_to_save"
        if outer := [other for other in paths if other != path and lies_in(path, [other])]:
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


def check_not_tied(model: nn.Module, linears: Iterable[nn.Module]) -> None:
    places = count_places(model.modules(), "_parameters")
    if any(places[id(linear._parameters.get("weight"))] > 1 for linear in linears):
        raise ValueError(
            "a targeted weight is tied to another module, which a merge would change too; "
            "keep the adapter unmerged, or untie the weight first"
        )


def count_places(modules: Iterable[nn.Module], kind: str) -> Counter:
    """In how many places each module ("_modules") or parameter ("_parameters") is, by its id."""
    return Counter(id(x) for module in modules for x in getattr(module, kind).values())


def linear_layers(modules: dict[str, nn.Module]) -> str:
    """Their last names, counted: "linear layers are W_q (4 times), classifier"."""
    names = (p.rpartition(".")[2] for p, module in modules.items() if p and is_linear(module))
    counts = Counter(names).items()
    return "linear layers are " + ", ".join(n if k == 1 else f"{n} ({k} times)" for n, k in counts)


# --- tensors -------------------------------------------------------------------------------------


def _is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; whoever has one has imported the module, which takes a second."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def check_finite(tensors: dict[str, Tensor]) -> None:
    if sharded := [name for name, tensor in tensors.items() if _is_sharded(tensor)]:
        raise ValueError(
            f"{sharded[0]} is sharded ({len(sharded)} such tensors): gather them into an unsharded "
            "model first, with torch.distributed.checkpoint.state_dict.get_model_state_dict"
        )
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise ValueError(
            f"{wrong[0]} is not finite ({len(wrong)} such tensors), so nothing was written; the "
            "training diverged: start again from the last good adapter, at a lower learning rate"
        )
