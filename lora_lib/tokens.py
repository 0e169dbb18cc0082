"""From names to tensors: tokenizer, examples, batches."""

import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from lora_lib.names import SECOND_SCRIPT, Pair, nfd


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
        counts = Counter(character for name in names for character in nfd(name))
        return cls("".join(sorted(c for c, n in counts.items() if n >= min_count)))

    def __len__(self) -> int:
        return self.N_SPECIAL + len(self.characters)

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(c, self.UNK) for c in nfd(text)]

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
        """What the model continues. `script`, None or "arabic", adds that script's tag.

        Raises ValueError for any other script.
        """
        if script not in (None, SECOND_SCRIPT):
            raise ValueError(
                f"script is {script!r}, but only {SECOND_SCRIPT!r} has a tag; leave it out, and "
                "the base writes Cyrillic, a model with an adapter the script of the adapter"
            )
        tag = [] if script is None else [self.ARABIC]
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
    """Pad on the right to the longest sequence; inputs are ids[:-1], labels ids[1:].

    Raises ValueError if there are no examples.
    """
    if not examples:
        raise ValueError("no examples were given; a batch needs at least one")
    inputs = [torch.tensor(ids[:-1]) for ids, _ in examples]
    labels = [torch.tensor([IGNORE] * (first - 1) + ids[first:]) for ids, first in examples]
    return Batch(
        pad_sequence(inputs, batch_first=True, padding_value=Tokenizer.PAD),
        pad_sequence(labels, batch_first=True, padding_value=IGNORE),
    )


def batches_by_length(
    examples: Sequence[Example], batch_size: int, seed: int, pool: int = 16
) -> Iterator[Batch]:
    """Endless shuffled batches in which sequences have similar lengths, so that little is padding.

    Every epoch is shuffled; `pool` batches at a time are sorted by length, cut into batches, and
    given out in random order. `pool=1` is plain shuffling.

    Raises ValueError if there are no examples.
    """
    if not examples:  # the loop below would never end
        raise ValueError("no examples were given; endless batches need at least one")
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
