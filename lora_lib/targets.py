"""Which modules a name means: PEFT's rules."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LoRAConfig:
    """What add_lora_to_model was asked for; the model keeps it as `model.lora_config`."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str | re.Pattern
    dropout: float
    use_rslora: bool
    modules_to_save: tuple[str, ...]


def name_list(names: Iterable[str], argument: str, otherwise: str = "") -> tuple[str, ...]:
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = tuple(names)
        if all(isinstance(name, str) for name in names):
            return names
    example = [names] if isinstance(names, str) else ["W_q", "W_v"]
    raise ValueError(f"{argument} is {names!r}; give a list of names, such as {example}{otherwise}")


def matches(path: str, name: str) -> bool:
    """PEFT's rule for a list of names: the whole path, or its end after a dot."""
    return path == name or path.endswith("." + name)


def inside(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def target_paths(model: nn.Module, config: LoRAConfig) -> list[str]:
    targets, saved = config.target_modules, saved_paths(model, config.modules_to_save)
    modules = {path: m for path, m in model.named_modules() if path and not inside(path, saved)}
    if targets == "all-linear":
        return [path for path, module in modules.items() if is_linear(module)]
    if isinstance(targets, re.Pattern):
        return [path for path in modules if targets.fullmatch(path)]
    return [path for path in modules if any(matches(path, name) for name in targets)]


def is_linear(module: nn.Module) -> bool:
    """Conv1D, the linear layer of GPT-2, counts, so that it is refused rather than left out."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def saved_paths(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [path for path, _ in model.named_modules() if any(matches(path, n) for n in names)]


def saved_in_peft(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """PEFT asks for no dot before the name of a module to save: "head" is "subhead" as well."""
    return [path for path, _ in model.named_modules() if path.endswith(names)]


def count_places(model: nn.Module, kind: str) -> Counter:
    """In how many places each module ("_modules") or parameter ("_parameters") is, by its id."""
    return Counter(id(x) for module in model.modules() for x in getattr(module, kind).values())


def listing(paths: list[str]) -> str:
    """The last names with their counts: "W_q (4 times), W_v (4 times), classifier"."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return ", ".join(name if n == 1 else f"{name} ({n} times)" for name, n in counts.items())
