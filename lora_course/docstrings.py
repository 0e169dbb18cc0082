"""Functions of installed libraries, and what their docstrings say they do.

Read from the sources on this machine at run time, without importing them; nothing of them is kept
in the repository. Which functions there are depends on the installed versions.
"""

import ast
import gc
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lora_lib.names import split_of, stable_hash

LIBRARIES = ("numpy", "scipy", "matplotlib", "IPython", "stdlib")
# Folders of tests, and what Python 3.12 and 3.13 no longer have or not everybody installs.
_SKIPPED = {"tests", "test", "testing", "site-packages", "distutils", "lib2to3", "idlelib"} | {
    "tkinter",
    "turtledemo",
}
_LONGEST = 160  # characters of a sentence or of a signature


class Function(NamedTuple):
    name: str  # "scipy.stats.zscore"
    signature: str  # "(a, axis=0, ddof=0, nan_policy='propagate')"
    summary: str  # "Compute the z score."


def load_functions(packages: Iterable[str] = LIBRARIES) -> list[Function]:
    """The documented public functions and methods of some packages ("stdlib" is Python's own
    library), in an order that depends on nothing but their names: any first n are a fair sample.

    A sentence that several functions share is kept once, so that each has one right answer.

    Raises ModuleNotFoundError for a package that is not installed, TypeError for one string.
    """
    if isinstance(packages, str):
        raise TypeError(f"packages is the string {packages!r}; give a list: [{packages!r}]")
    with _no_garbage_collection():
        found = [f for package in packages for f in _functions_of(package)]
    found.sort(key=lambda function: stable_hash(function.name))
    by_summary = {function.summary.casefold(): function for function in reversed(found)}
    by_name = {function.name: function for function in reversed(by_summary.values())}
    return list(by_name.values())


def split_functions(functions: Sequence[Function]) -> dict[str, list[Function]]:
    """Eight in ten train, one validates, one tests: by a hash of the name, so that a function stays
    in its split whatever else is installed."""
    splits = {"train": [], "validation": [], "test": []}
    for function in functions:
        splits[split_of(function.name)].append(function)
    return splits


def library_versions(packages: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """The versions that the docstrings come from."""
    python = ".".join(map(str, sys.version_info[:3]))
    names = packages_distributions()
    return {p: python if p == "stdlib" else version(names[p][0]) for p in packages}


def words_of(name: str) -> str:
    """The words of a name: "torch.nn.functional.log_softmax" and "DataFrame.toDict" become "torch
    nn functional log softmax" and "data frame to dict"."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)
    return " ".join(parts).lower()


# --- reading -------------------------------------------------------------------------------------


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A syntax tree holds no circles, and looking for some takes as long as parsing does."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _functions_of(package: str) -> Iterator[Function]:
    for module, path in _modules_of(package):
        text = path.read_text("utf-8", errors="replace")
        if '"""' not in text and "'''" not in text:
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # a template, or of another Python
            continue
        yield from _documented(tree.body, module)


def _modules_of(package: str) -> Iterator[tuple[str, Path]]:
    """The dotted name and the file of every module; "a._b.c" is called a.c, as users import it."""
    if package == "stdlib":
        root = Path(ast.__file__).parent
        tops = [root / name for name in sorted(sys.stdlib_module_names) if name[0] != "_"]
        files = [f.with_suffix(".py") for f in tops if f.with_suffix(".py").is_file()]
        files += [path for folder in tops if folder.is_dir() for path in folder.rglob("*.py")]
    else:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"there is no package {package!r} here whose sources could be read; name one that "
                "is installed, by the name you import it with"
            )
        origin = Path(spec.origin)
        alone = spec.submodule_search_locations is None
        root = origin.parent if alone else origin.parent.parent
        files = [origin] if alone else origin.parent.rglob("*.py")
    for path in sorted(files):
        parts = path.relative_to(root).with_suffix("").parts
        if not _SKIPPED & set(parts):
            yield ".".join(part for part in parts if part[0] != "_"), path


_NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(body: Sequence[ast.stmt], prefix: str) -> Iterator[Function]:
    for node in body:
        if not isinstance(node, _NAMED) or node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        if isinstance(node, ast.ClassDef):
            yield from _documented(node.body, name)
        else:
            summary = first_sentence(ast.get_docstring(node) or "")
            signature = _signature(node.args)
            if summary and len(signature) <= _LONGEST:
                yield Function(name, signature, summary)


def first_sentence(docstring: str) -> str:
    """The first sentence, on one line; "" if it is not one that says what a function does."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    plain = sentence.isascii() and sentence[:1].isalpha() and 20 <= len(sentence) <= _LONGEST
    return sentence if plain and len(sentence.split()) >= 4 else ""


def _signature(arguments: ast.arguments) -> str:
    """As it is written, without annotations and `self`."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(arguments))
    return f"({text})"
