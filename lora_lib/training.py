"""One training loop; scores for both tasks; greedy transliteration.

The loop knows nothing of LoRA: it trains whatever has `requires_grad`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_lib.model import SmallTransformer
from lora_lib.names import Pair, load_pairs, load_spellings
from lora_lib.tokens import (
    IGNORE,
    Batch,
    Example,
    Tokenizer,
    batches_by_length,
    make_batch,
    pair_examples,
)

# --- the loop ------------------------------------------------------------------------------------


def language_model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the labelled positions of a Batch."""
    batch = batch.to(next(model.parameters()).device)
    logits = model(batch.input_ids)  # (B, T, vocab)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)


def warm_up_then_decay(step: int, steps: int, warm_up: float = 0.1) -> float:
    """Share of the peak learning rate: up in a straight line, then down to zero."""
    position = (step + 1) / steps
    return min(1.0, position / warm_up, (1 - step / steps) / (1 - warm_up))


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with requires_grad; a ValueError if there are none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter has requires_grad=True, so there is nothing to train")
    return parameters


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW with weight decay 0.01, the course's optimizer."""
    return torch.optim.AdamW(parameters, lr, weight_decay=0.01, fused=True)


def fit(
    model: nn.Module,
    batches: Iterable,
    steps: int,
    lr: float,
    *,
    loss_function: Callable[[nn.Module, Batch], Tensor] = language_model_loss,
    optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] = adamw,
    description: str = "",
) -> list[float]:
    """Train what has requires_grad for `steps` steps; returns the loss of every step.

    The learning rate rises to `lr` over the first tenth and then falls to zero; gradients are
    clipped to norm 1. An interrupt (Ctrl-C, the stop button) ends the training early and returns
    what was measured; `batches` that run out do the same, on the schedule of all `steps`. Leaves
    the model in eval mode.

    Raises ValueError if nothing is trainable or steps is below 1, FloatingPointError if the loss
    is not finite.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    parameters = _trainable(model)
    optimizer = optimizer(parameters, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: warm_up_then_decay(s, steps))
    losses = []
    model.train()
    try:
        bar = tqdm(islice(batches, steps), total=steps, desc=description, leave=False)
        for batch in bar:
            loss = loss_function(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if len(losses) % 25 == 0:  # reading the loss makes a GPU wait: now and then is enough
                _require_finite(losses[-25:], len(losses), lr)
                bar.set_postfix(loss=f"{losses[-1].item():.3f}", refresh=False)
    except KeyboardInterrupt:
        print(f"interrupted after {len(losses)} of {steps} steps")
    finally:
        model.eval()
    _require_finite(losses[-25:], len(losses), lr)  # those that came after the last look
    return torch.stack(losses).tolist() if losses else []


def _require_finite(last_losses: Sequence[Tensor], steps: int, lr: float) -> None:
    """`last_losses` are those of the last of `steps` steps; the first that is not finite counts."""
    losses = torch.stack(list(last_losses)).tolist() if last_losses else []
    for step, loss in enumerate(losses, steps - len(losses) + 1):
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {step} (learning rate {lr:g}); lower the learning "
                "rate or the scaling alpha / rank, and start again from a fresh model"
            )


# --- task B: write it in … -----------------------------------------------------------------------


def adapt(
    model: SmallTransformer,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    *,
    steps: int,
    lr: float,
    batch_size: int = 64,
    seed: int = 42,
    description: str = "",
    optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] = adamw,
) -> list[float]:
    """Train on pairs (Latin name, target) with `fit`; the seed fixes the order of the batches.

    Leaves the model in eval mode.
    """
    batches = batches_by_length(pair_examples(pairs, tokenizer), batch_size, seed)
    return fit(model, batches, steps, lr, optimizer=optimizer, description=description)


@torch.inference_mode()
def transliterate(
    model: SmallTransformer,
    tokenizer: Tokenizer,
    names: Sequence[str],
    max_new: int = 48,
    script: str | None = None,
) -> list[str]:
    """The model's spelling of every Latin name, by greedy decoding, in the order given.

    Prompts of equal length run together with a key-value cache, so no padding is needed. The base
    answers in Cyrillic, with script="arabic" in Arabic; an adapted model in its own script. Leaves
    the model in eval mode.

    Raises TypeError if `names` is one string, ValueError if a name leaves no room to write or
    max_new is below 1.
    """
    if max_new < 1:
        raise ValueError(f"max_new is {max_new}; it must be at least 1")
    if isinstance(names, str):
        raise TypeError(f"names is the string {names!r}; give a list of names: [{names!r}]")
    device = next(model.parameters()).device
    model.eval()
    by_length = defaultdict(list)
    for position, name in enumerate(names):
        prompt = tokenizer.prompt(name, script)
        by_length[len(prompt)].append((position, prompt))
    results = [""] * len(names)
    for rows in by_length.values():
        positions, prompts = zip(*rows, strict=True)
        for position, ids in zip(
            positions, _greedy(model, torch.tensor(prompts, device=device), max_new), strict=True
        ):
            results[position] = tokenizer.decode(ids)
    return results


def _greedy(model: SmallTransformer, prompts: Tensor, max_new: int) -> list[list[int]]:
    """prompts (B, T), all of one length → the generated ids of each row, up to EOS."""
    if prompts.shape[1] >= model.max_len:
        raise ValueError(
            f"a name of {prompts.shape[1] - 2} characters leaves no room in the model's "
            f"{model.max_len} positions (max_len); shorten it"
        )
    cache: dict = {}
    step_input, generated = prompts, []
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    for _ in range(min(max_new, model.max_len - prompts.shape[1])):
        token = model(step_input, cache=cache)[:, -1].argmax(dim=-1)
        generated.append(token)
        alive &= token != Tokenizer.EOS
        if not alive.any():
            break
        step_input = token[:, None]
    rows = torch.stack(generated, dim=1).tolist()
    return [row[: row.index(Tokenizer.EOS)] if Tokenizer.EOS in row else row for row in rows]


def error_rate(written: str, accepted: Sequence[str]) -> float:
    """Character error rate: edit distance over length, to the nearest accepted spelling."""
    return min(Levenshtein.distance(written, a) / len(a) for a in accepted)


class Scores(NamedTuple):
    """Scores of task B. `bits`: per target character; the other two over names, 0 to 1 (CER may
    exceed 1)."""

    exact_match: float
    error_rate: float
    bits: float


def score_names(written: Sequence[str], spellings: Mapping[str, Sequence[str]]) -> tuple:
    """(exact match, character error rate) of `written`, in the order of `spellings`."""
    accepted = list(spellings.values())
    pairs = list(zip(written, accepted, strict=True))
    return (
        sum(w in a for w, a in pairs) / len(pairs),
        sum(error_rate(w, a) for w, a in pairs) / len(pairs),
    )


def evaluate(
    model: SmallTransformer,
    tokenizer: Tokenizer,
    script: str,
    split: str = "test",
    limit: int | None = None,
) -> Scores:
    """Exact match, error rate and bits per character on the names of a split.

    `limit` keeps the first so many names. Leaves the model in eval mode.
    """
    spellings = load_spellings(script, split, limit)
    pairs = [pair for pair in load_pairs(script, split) if pair.latin in spellings]
    written = transliterate(model, tokenizer, list(spellings), script=script)
    bits = bits_per_character(model, tokenizer, pairs, script)
    return Scores(*score_names(written, spellings), bits)


def bits_per_character(
    model: SmallTransformer,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    script: str | None = None,
    batch_size: int = 256,
) -> float:
    """Cross-entropy in bits over the target's characters and EOS, divided by their number.

    Leaves the model in eval mode.
    """
    return bits_of(model, pair_examples(pairs, tokenizer, script), batch_size)


@torch.inference_mode()
def bits_of(model: SmallTransformer, examples: Sequence[Example], batch_size: int = 256) -> float:
    """The same for any examples: mean cross-entropy in bits of what they ask to be predicted.

    Leaves the model in eval mode.
    """
    model.eval()
    examples = sorted(examples, key=lambda e: len(e.ids))
    nats = characters = 0
    for start in range(0, len(examples), batch_size):
        batch = make_batch(examples[start : start + batch_size])
        n = (batch.labels != IGNORE).sum().item()
        nats += language_model_loss(model, batch).item() * n
        characters += n
    return nats / characters / math.log(2)


# --- classification: task A and the synthetic task -----------------------------------------------


def _classify(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits (B, classes) and labels (B,) of a batch from a TokenDataset, on the model's device."""
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return model(batch["input_ids"], batch.get("attention_mask")), batch["label"]


def classification_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy in nats over the sequences of a batch from a TokenDataset."""
    return F.cross_entropy(*_classify(model, batch))


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Share of right classes, 0 to 1. Leaves the model in eval mode."""
    model.eval()
    right = total = 0
    for batch in loader:
        logits, labels = _classify(model, batch)
        right += (logits.argmax(dim=-1) == labels).sum().item()
        total += len(labels)
    return right / total


def train_model(
    model: nn.Module,
    train_loader: DataLoader,
    test_loader: DataLoader,
    epochs: int = 10,
    lr: float = 1e-4,
    description: str = "",
) -> dict[str, list[float]]:
    """Train a classifier with AdamW (weight decay 0.01, constant rate) on what has requires_grad.

    Batches are dicts with `input_ids`, `label` and, where rows differ in length,
    `attention_mask`. Returns `train_loss`, `train_acc`, `test_acc`, one value an epoch; an
    interrupt returns the epochs that were finished. Leaves the model in eval mode.

    Raises ValueError if nothing is trainable, FloatingPointError if the loss is not finite.
    """
    parameters = _trainable(model)
    optimizer = adamw(parameters, lr)
    history = {"train_loss": [], "train_acc": [], "test_acc": []}
    steps = 0
    try:
        for _ in tqdm(range(epochs), desc=description, leave=False):
            model.train()
            loss_sum = right = total = 0
            for batch in train_loader:
                logits, labels = _classify(model, batch)
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
                _require_finite([loss.detach()], steps, lr)
                loss_sum += loss.item() * len(labels)
                right += (logits.argmax(dim=-1) == labels).sum().item()
                total += len(labels)
            epoch = loss_sum / total, right / total, accuracy(model, test_loader)
            for values, value in zip(history.values(), epoch, strict=True):
                values.append(value)
    except KeyboardInterrupt:
        print(f"interrupted after {len(history['test_acc'])} of {epochs} epochs")
    finally:
        model.eval()
    return history
