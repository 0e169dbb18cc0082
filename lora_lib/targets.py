"""Which modules a name means, by PEFT's rules, and which modules are linear layers."""

import re
import sys
from collections.abc import Iterable

from torch import nn

Names = Iterable[str] | re.Pattern


def is_named(path: str, names: Names) -> bool:
    """By a list of names: as the whole path, or its end after a dot. A regular expression has to
    match the whole path."""
    if isinstance(names, re.Pattern):
        return names.fullmatch(path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def saved_paths(paths: Iterable[str], names: Iterable[str]) -> list[str]:
    """For modules_to_save PEFT asks for no dot before the name: "head" is "subhead" as well."""
    return [path for path in paths if path.endswith(tuple(names))]


def lies_in(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(parent + ".") for parent in parents)


def target_paths(
    modules: dict[str, nn.Module], targets: Names | str, saved: Iterable[str], excluded: Names = ()
) -> list[str]:
    """Paths that are targeted; "all-linear" stands for every linear layer. Paths in `saved` ones
    and `excluded` ones are left out, and so is the root, whose path is empty."""
    paths = [p for p in modules if p and not lies_in(p, saved) and not is_named(p, excluded)]
    if targets == "all-linear":
        return [path for path in paths if is_linear(modules[path])]
    return [path for path in paths if is_named(path, targets)]


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
