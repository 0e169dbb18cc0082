"""Search functions by what they do, with sentence vectors: a text becomes a vector of length 1, and
what is near a query is found."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_course.docstrings import Function, words_of
from lora_lib.scores import mode

TEMPERATURE = 0.05
MAX_TOKENS = 48


class Search(NamedTuple):
    """How well the right function was found: shares of queries with it first, or among the first
    five, and the mean of 1 / its rank (mean reciprocal rank)."""

    recall_1: float
    recall_5: float
    mrr: float


def query_of(function: Function) -> str:
    return function.summary


def entry_of(function: Function) -> str:
    """What is searched: the words of the name."""
    return words_of(function.name)


# --- vectors -------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """A model that gives a vector for each token, its tokenizer, and where a text is cut."""

    model: nn.Module
    tokenizer: object
    max_tokens: int = MAX_TOKENS

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (texts, d) on the model's device: the mean over tokens, with gradients."""
        device = next(self.model.parameters()).device
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(device)
        tokens = self.model(**batch).last_hidden_state  # (B, T, d)
        kept = batch["attention_mask"][..., None]
        return F.normalize((tokens * kept).sum(1) / kept.sum(1), dim=-1)

    @torch.inference_mode()
    def vectors(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """The same in eval mode, in batches of similar length, without gradients; on the CPU."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        with mode(self.model, training=False):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                parts.append(self([texts[i] for i in rows]).cpu())
        return torch.cat(parts)[torch.tensor(order).argsort()]


def info_nce(encoder: Encoder, batch: tuple[Sequence[str], Sequence[str]]) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): each query has to pick its own entry among those of the
    batch, by softmax over cosines / temperature."""
    queries, entries = batch
    cosines = encoder(queries) @ encoder(entries).T
    own = torch.arange(len(queries), device=cosines.device)
    return F.cross_entropy(cosines / TEMPERATURE, own)


def search_batches(
    functions: Sequence[Function], batch_size: int, seed: int
) -> Iterator[tuple[list[str], list[str]]]:
    """Endless shuffled batches (queries, entries); every epoch is shuffled anew. Raises ValueError
    if there are fewer functions than a batch holds."""
    if len(functions) < batch_size:
        raise ValueError(
            f"there are {len(functions)} functions, and a batch holds {batch_size}; "
            "make it smaller, or read more packages"
        )
    rng, order = random.Random(seed), list(functions)
    while True:
        rng.shuffle(order)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            batch = order[start : start + batch_size]
            yield [query_of(f) for f in batch], [entry_of(f) for f in batch]


# --- searching -----------------------------------------------------------------------------------


def search_scores(similarities: np.ndarray) -> Search:
    """Of a square matrix (queries, entries) in which entry i is right for query i. An entry that is
    as near as the right one counts as before it."""
    right = np.diag(similarities)[:, None]
    ranks = (similarities >= right).sum(1)  # the right one counts itself: 1 is best
    return Search(float((ranks == 1).mean()), float((ranks <= 5).mean()), float((1 / ranks).mean()))


def evaluate_search(encoder: Encoder, functions: Sequence[Function]) -> Search:
    """Every function's sentence is searched among the names of all of them."""
    queries = encoder.vectors([query_of(f) for f in functions])
    entries = encoder.vectors([entry_of(f) for f in functions])
    return search_scores((queries @ entries.T).numpy())


class TfIdf:
    """The rival that only counts words: a word weighs more the fewer texts it is in
    (log((1 + n) / (1 + texts with it)) + 1), and a text is a unit vector of such weights."""

    def __init__(self, texts: Sequence[str]):
        counts = Counter(word for text in texts for word in set(self.words(text)))
        self.column = {word: i for i, word in enumerate(sorted(counts))}
        self.weight = {w: math.log((1 + len(texts)) / (1 + n)) + 1 for w, n in counts.items()}

    @staticmethod
    def words(text: str) -> list[str]:
        return re.findall(r"[a-z0-9]+", text.lower())

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, words); words that the first texts did not have do not count."""
        table = np.zeros((len(texts), len(self.column)), np.float32)
        for row, text in enumerate(texts):
            for word, n in Counter(self.words(text)).items():
                if word in self.column:
                    table[row, self.column[word]] = n * self.weight[word]
        return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)


def evaluate_tfidf(functions: Sequence[Function], learned_from: Sequence[Function]) -> Search:
    """As evaluate_search; the weights of words come from other functions, and from these names."""
    texts = [text(f) for f in learned_from for text in (query_of, entry_of)]
    tfidf = TfIdf(texts + [entry_of(f) for f in functions])
    queries = tfidf.vectors([query_of(f) for f in functions])
    return search_scores(queries @ tfidf.vectors([entry_of(f) for f in functions]).T)
