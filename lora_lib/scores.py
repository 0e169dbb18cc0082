"""What a model says, and how right it is: losses, writing names, scores of names and of classes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_lib.model import SmallTransformer
from lora_lib.names import SECOND_SCRIPT, load_pairs, load_spellings, package_for_names
from lora_lib.tokens import IGNORE, Batch, Example, Tokenizer, make_batch, pair_examples

# --- losses ---------------------------------------------------------------------------------------


def language_model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the labelled positions of a Batch."""
    batch = batch.to(next(model.parameters()).device)
    logits = model(batch.input_ids)  # (B, T, vocab)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)


def classify(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) and labels (B,) of a batch from a TokenDataset, on the model's device."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return model(batch["input_ids"], batch.get("attention_mask")), batch["label"]


def classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy in nats over the sequences of a batch from a TokenDataset."""
    return F.cross_entropy(*classify(model, batch))


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside; afterwards every module is in the mode that it had before."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training


# --- writing --------------------------------------------------------------------------------------


@torch.inference_mode()
def transliterate(
    model: SmallTransformer,
    tokenizer: Tokenizer,
    names: Sequence[str],
    max_new: int = 48,
    script: str | None = None,
) -> list[str]:
    """The model's spelling of every Latin name, by greedy decoding, in the order given.

    The base writes Cyrillic, with script="arabic" Arabic; an adapted model its own script. Names
    of equal length run together, so no padding is needed.

    Raises TypeError if `names` is one string, ValueError if a name leaves no room to write, for
    another script, or for max_new below 1.
    """
    if max_new < 1:
        raise ValueError(f"max_new is {max_new}; it must be at least 1")
    if isinstance(names, str):
        raise TypeError(f"names is the string {names!r}; give a list of names: [{names!r}]")
    device = next(model.parameters()).device
    prompts = [tokenizer.prompt(name, script) for name in names]
    results = [""] * len(names)
    with mode(model, training=False):
        for length in set(map(len, prompts)):
            rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
            ids = torch.tensor([prompts[row] for row in rows], device=device)
            for row, written in zip(rows, _greedy(model, ids, max_new), strict=True):
                results[row] = tokenizer.decode(written)
    return results


def _greedy(model: SmallTransformer, prompts: Tensor, max_new: int) -> list[list[int]]:
    """prompts (B, T), all of one length → the generated ids of each row, up to EOS."""
    room = model.max_len - prompts.shape[1]
    if room < 1:
        raise ValueError(
            f"a name of {prompts.shape[1] - 2} characters leaves no room in the model's "
            f"{model.max_len} positions (max_len); shorten it"
        )
    cache, token, written = {}, prompts, prompts[:, :0]
    for _ in range(min(max_new, room)):
        token = model(token, cache=cache)[:, -1:].argmax(dim=-1)  # (B, 1)
        written = torch.cat((written, token), dim=1)
        if (written == Tokenizer.EOS).any(dim=1).all():
            break
    return [list(takewhile(lambda token: token != Tokenizer.EOS, row)) for row in written.tolist()]


# --- scores ---------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Of names that were written: two means over names, and bits per target character."""

    exact_match: float
    error_rate: float
    bits: float


def evaluate(
    model: SmallTransformer,
    tokenizer: Tokenizer,
    script: str,
    split: str = "test",
    limit: int | None = None,
) -> Scores:
    """Scores on the names of a split; `limit` keeps the first so many. Raises as load_spellings."""
    spellings = load_spellings(script, split, limit)
    pairs = [pair for pair in load_pairs(script, split) if pair.latin in spellings]
    tag = script if script == SECOND_SCRIPT else None
    written = transliterate(model, tokenizer, list(spellings), script=tag)
    bits = bits_per_character(model, pair_examples(pairs, tokenizer, tag))
    return Scores(*score_names(written, spellings), bits)


def score_names(
    written: Sequence[str], spellings: Mapping[str, Sequence[str]]
) -> tuple[float, float]:
    """(exact match, error rate) of `written`, in the order of `spellings`: means over names.

    Raises ValueError if there are no spellings, or not one name written for each.
    """
    if not spellings:
        raise ValueError("there are no names to score; give at least one with its spellings")
    pairs = list(zip(written, spellings.values(), strict=True))
    exact = sum(name in accepted for name, accepted in pairs)
    return exact / len(pairs), sum(error_rate(*pair) for pair in pairs) / len(pairs)


def error_rate(written: str, accepted: Sequence[str]) -> float:
    """Edit distance over length, to the nearest accepted spelling: from 0, and sometimes over 1."""
    distance = package_for_names("rapidfuzz.distance").Levenshtein.distance
    return min(distance(written, spelling) / len(spelling) for spelling in accepted)


@torch.inference_mode()
def bits_per_character(
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int = 256,
    loss_function: Callable[[nn.Module, Batch], Tensor] = language_model_loss,
) -> float:
    """Cross-entropy in bits over all that the examples ask to be predicted, EOS too, divided by
    the number of these characters, a token each; `loss_function` gives its mean over a Batch, in
    nats. Raises ValueError if there are no examples.
    """
    if not examples:
        raise ValueError("there is nothing to predict; give at least one example")
    examples = sorted(examples, key=lambda example: len(example.ids))
    nats = characters = 0
    with mode(model, training=False):
        for start in range(0, len(examples), batch_size):
            batch = make_batch(examples[start : start + batch_size])
            n = (batch.labels != IGNORE).sum().item()
            nats += loss_function(model, batch).item() * n
            characters += n
    return nats / characters / math.log(2)


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Share of right classes, 0 to 1. Raises ValueError if the loader gives nothing."""
    with mode(model, training=False):
        right = [logits.argmax(-1) == y for logits, y in (classify(model, b) for b in loader)]
    if not right:
        raise ValueError("the loader gives no batches; give at least one")
    return torch.cat(right).sum().item() / sum(map(len, right))
