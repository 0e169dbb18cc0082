"""Which modules a name means, by PEFT's rules, and which modules are linear layers."""

import re
import sys
from collections import Counter
from collections.abc import Iterable

from torch import nn


def matches(path: str, name: str) -> bool:
    """The rule for a list of names: the whole path, or its end after a dot."""
    return path == name or path.endswith("." + name)


def means(path: str, targets: Iterable[str] | re.Pattern) -> bool:
    """A list of names as above; a regular expression has to match the whole path."""
    if isinstance(targets, re.Pattern):
        return targets.fullmatch(path) is not None
    return any(matches(path, name) for name in targets)


def inside(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def target_paths(
    modules: dict[str, nn.Module],
    targets: Iterable[str] | str | re.Pattern,
    saved: Iterable[str] = (),
    excluded: Iterable[str] | re.Pattern = (),
) -> list[str]:
    """Paths that are targeted: "all-linear" stands for every linear layer. Nothing is, that lies in
    a `saved` path or is `excluded`."""
    paths = [p for p in modules if p and not inside(p, saved) and not means(p, excluded)]
    if targets == "all-linear":
        return [path for path in paths if is_linear(modules[path])]
    return [path for path in paths if means(path, targets)]


def saved_paths(modules: Iterable[str], names: Iterable[str]) -> list[str]:
    return [path for path in modules if means(path, names)]


def saved_in_peft(modules: Iterable[str], names: Iterable[str]) -> list[str]:
    """PEFT asks for no dot before the name of a module to save: "head" is "subhead" as well."""
    return [path for path in modules if path.endswith(tuple(names))]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *conv1d()))


def conv1d() -> tuple[type, ...]:
    """transformers' Conv1D, an nn.Linear that keeps Wᵀ (d_in, d_out), as in GPT-2; nothing while
    transformers is not imported, since nobody then has one."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return (kind,) if kind else ()


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in), also of a weight that is packed or transposed."""
    if isinstance(linear, conv1d()):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def count_places(model: nn.Module, kind: str) -> Counter:
    """In how many places each module ("_modules") or parameter ("_parameters") is, by its id."""
    return Counter(id(x) for module in model.modules() for x in getattr(module, kind).values())


def listing(paths: Iterable[str]) -> str:
    """The last names with their counts: "W_q (4 times), W_v (4 times), classifier"."""
    counts = Counter(path.rpartition(".")[2] for path in paths)
    return ", ".join(name if n == 1 else f"{name} ({n} times)" for name, n in counts.items())
