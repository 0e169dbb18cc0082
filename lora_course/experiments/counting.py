"""Two rivals that only count: a letter table and a context table, learned from pairs.

`python -m lora_course.experiments.counting` scores them (a minute on a CPU).

Each source letter maps to nought to three target letters, in order (a monotone alignment). The
alignment of every pair and the counts of images are improved in turn (expectation-maximisation
with Viterbi, that is with the single best alignment).
"""

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from lora_course.experiments.recording import record_tables
from lora_lib.names import SCRIPTS, Pair, load_pairs, load_spellings, nfd
from lora_lib.scores import score_names

MAX_IMAGE = 3  # target letters that one source letter may map to
_EDGE = "#"

Alignment = list[tuple[str, str]]  # (source letter, its image), in order


class CountingTable:
    """Writes a name letter by letter: the most frequent image of the letter in its context.

    `contexts` are (letters to the left, letters to the right), tried in order: the first one that
    was seen in training decides.
    """

    def __init__(self, alignments: Sequence[Alignment], contexts: Sequence[tuple[int, int]]):
        self.contexts = contexts
        counts: Mapping[tuple, Counter] = defaultdict(Counter)
        for alignment in alignments:
            letters = [letter for letter, _ in alignment]
            for position, (_, image) in enumerate(alignment):
                for context in contexts:
                    counts[_window(letters, position, context)][image] += 1
        self.images = {window: images.most_common(1)[0][0] for window, images in counts.items()}

    def write(self, names: Sequence[str]) -> list[str]:
        return [self._write(nfd(name)) for name in names]

    def _write(self, letters: str) -> str:
        images = (self._image(letters, position) for position in range(len(letters)))
        return unicodedata.normalize("NFC", "".join(images))

    def _image(self, letters: str, position: int) -> str:
        windows = (_window(letters, position, context) for context in self.contexts)
        return next((self.images[window] for window in windows if window in self.images), "")


def letter_table(pairs: Sequence[Pair]) -> CountingTable:
    """The most frequent image of each letter, whatever stands beside it."""
    return CountingTable(align(pairs), [(0, 0)])


def context_table(pairs: Sequence[Pair]) -> CountingTable:
    """The most frequent image given two letters on either side, backing off to fewer."""
    return CountingTable(align(pairs), [(2, 2), (1, 2), (1, 1), (0, 1), (0, 0)])


def _window(letters: Sequence[str], position: int, context: tuple[int, int]) -> tuple:
    left, right = context
    return context, tuple(
        letters[i] if 0 <= i < len(letters) else _EDGE
        for i in range(position - left, position + right + 1)
    )


def align(pairs: Sequence[Pair], rounds: int = 5) -> list[Alignment]:
    """The best monotone alignment of every pair that has one (at most three letters for one)."""
    split = [(nfd(latin), nfd(target)) for latin, target in pairs]
    split = [(s, t) for s, t in split if len(t) <= MAX_IMAGE * len(s)]
    alignments = [_proportional(s, t) for s, t in split]
    for _ in range(rounds):
        cost = _image_costs(alignments)
        alignments = [_viterbi(s, t, cost) for s, t in split]
    return alignments


def _proportional(source: str, target: str) -> Alignment:
    """A first guess: cut the target into as many pieces, of equal length."""
    cuts = [round(i * len(target) / len(source)) for i in range(len(source) + 1)]
    return [(letter, target[cuts[i] : cuts[i + 1]]) for i, letter in enumerate(source)]


def _image_costs(alignments: Sequence[Alignment]) -> dict[str, dict[str, float]]:
    """−log p(image | letter) from counts."""
    counts = defaultdict(Counter)
    for alignment in alignments:
        for letter, image in alignment:
            counts[letter][image] += 1
    return {
        letter: {image: -math.log(n / images.total()) for image, n in images.items()}
        for letter, images in counts.items()
    }


def _viterbi(source: str, target: str, cost: dict[str, dict[str, float]]) -> Alignment:
    """The cheapest way to cut `target` into the images of the letters of `source`."""
    n = len(target)
    best = [0.0] + [math.inf] * n  # best[j]: cost of having written target[:j]
    back = []
    for letter in source:
        images = cost[letter]
        now, choice = [math.inf] * (n + 1), [0] * (n + 1)
        for j in range(n + 1):
            for length in range(min(MAX_IMAGE, j) + 1):
                # An image never seen for this letter stays possible, at a price for each letter.
                price = images.get(target[j - length : j], 7.0 + 3.0 * length)
                if best[j - length] + price < now[j]:
                    now[j], choice[j] = best[j - length] + price, length
        best = now
        back.append(choice)
    alignment, j = [], n
    for letter, choice in zip(reversed(source), reversed(back), strict=True):
        alignment.append((letter, target[j - choice[j] : j]))
        j -= choice[j]
    return alignment[::-1]


# --- their scores --------------------------------------------------------------------------------

TABLES = {"letter": letter_table, "context": context_table}


def score(table: str, script: str, n_pairs: int | None) -> dict:
    """One table, learned from the first `n_pairs` training pairs (None: all), on test towns."""
    spellings = load_spellings(script, "test")
    written = TABLES[table](load_pairs(script, "train")[:n_pairs]).write(list(spellings))
    scores = zip(("exact_match", "error_rate"), score_names(written, spellings), strict=True)
    return {"table": table, "script": script, "pairs": n_pairs} | dict(scores)


def main() -> None:
    jobs = [(table, script, None) for table in TABLES for script in SCRIPTS]
    jobs += [(table, "georgian", n) for table in TABLES for n in (100, 300, 1000)]
    scores = [score(*job) for job in tqdm(jobs)]
    record_tables("counting", torch.device("cpu"), {"counting": scores})


if __name__ == "__main__":
    main()
