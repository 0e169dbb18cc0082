"""One training loop; writing names; scores of both tasks.

The loop knows nothing of LoRA: it trains whatever has `requires_grad`.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_lib.model import SmallTransformer
from lora_lib.names import SECOND_SCRIPT, Pair, load_pairs, load_spellings, package_for_names
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


def training_steps(
    model: nn.Module,
    batches: Iterable,
    optimizer: Optimizer,
    loss_function: Callable[[nn.Module, object], Tensor] = language_model_loss,
    max_norm: float = math.inf,
) -> Iterator[float]:
    """The loop: takes one step for each batch and gives its loss, before the next one is taken.

    Gradients are clipped to norm `max_norm`. The model stays in the mode it is in. Warns of
    parameters that should train and get no gradient.

    Raises ValueError if there are no batches, or no gradient at all; FloatingPointError if the
    loss is not finite, with the weights as after the step before.
    """
    held, lr = [p for g in optimizer.param_groups for p in g["params"]], optimizer.defaults["lr"]
    step = 0
    for step, batch in enumerate(batches, start=1):
        loss = loss_function(model, batch)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step} (learning rate {lr}); lower the learning "
                "rate or the scaling alpha / rank, and start again from a fresh model"
            )
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        if step == 1:
            _check_gradients(model)
        if max_norm < math.inf:
            nn.utils.clip_grad_norm_(held, max_norm)
        optimizer.step()
        yield loss.item()
    if step == 0:
        raise ValueError("there are no batches to train on; give at least one")


def _check_gradients(model: nn.Module) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missed = [name for name, p in trainable.items() if p.grad is None]
    message = (
        f"{len(missed)} of {len(trainable)} trainable parameters got no gradient and will not "
        f"train ({', '.join(missed[:3])}, …): freeze what the loss does not need; with gradient "
        "checkpointing use its form use_reentrant=False"
    )
    if len(missed) == len(trainable):
        raise ValueError(message)
    if missed:
        warnings.warn(message, stacklevel=2)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters with requires_grad. Raises ValueError if there are none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter has requires_grad=True, so there is nothing to train")
    return parameters


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


def adamw(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    """AdamW with weight decay 0.01, the course's optimizer."""
    return AdamW(parameters, lr, weight_decay=0.01, fused=True)


def warm_up_then_decay(step: int, steps: int, warm_up: float = 0.1) -> float:
    """Share of the peak learning rate: up in a straight line, then down to zero."""
    position = (step + 1) / steps
    return min(1.0, position / warm_up, (1 - step / steps) / (1 - warm_up))


def fit(
    model: nn.Module,
    batches: Iterable,
    steps: int,
    lr: float,
    *,
    loss_function: Callable[[nn.Module, object], Tensor] = language_model_loss,
    optimizer: Callable[[list[nn.Parameter], float], Optimizer] = adamw,
    description: str = "",
) -> list[float]:
    """Train what has requires_grad for `steps` steps; returns the loss of every step.

    The learning rate rises to `lr` over the first tenth and then falls to zero; gradients are
    clipped to norm 1. An interrupt (Ctrl-C, the stop button) ends the training early and returns
    what was measured; `batches` that run out do the same, on the schedule of all `steps`.

    Raises as training_steps, and ValueError if nothing is trainable or steps is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    optimizer = optimizer(trainable_parameters(model), lr)
    schedule = LambdaLR(optimizer, lambda step: warm_up_then_decay(step, steps))
    taken = training_steps(model, islice(batches, steps), optimizer, loss_function, max_norm=1.0)
    losses = []
    try:
        with mode(model, training=True):
            for loss in tqdm(taken, total=steps, desc=description, leave=False):
                losses.append(loss)
                schedule.step()
    except KeyboardInterrupt:
        print(f"interrupted after {len(losses)} of {steps} steps")
    return losses


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
    optimizer: Callable[[list[nn.Parameter], float], Optimizer] = adamw,
) -> list[float]:
    """Train on pairs (Latin name, target) with `fit`; the seed fixes the order of the batches."""
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


class Scores(NamedTuple):
    """Of task B: two means over names, and bits per target character."""

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
    model: nn.Module, examples: Sequence[Example], batch_size: int = 256
) -> float:
    """Cross-entropy in bits over all that the examples ask to be predicted, EOS too, divided by
    the number of these characters. Raises ValueError if there are no examples.
    """
    if not examples:
        raise ValueError("there is nothing to predict; give at least one example")
    examples = sorted(examples, key=lambda example: len(example.ids))
    nats = characters = 0
    with mode(model, training=False):
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
    """Share of right classes, 0 to 1. Raises ValueError if the loader gives nothing."""
    with mode(model, training=False):
        right = [logits.argmax(-1) == y for logits, y in (_classify(model, b) for b in loader)]
    if not right:
        raise ValueError("the loader gives no batches; give at least one")
    return torch.cat(right).sum().item() / sum(map(len, right))


def train_model(
    model: nn.Module,
    train_loader: DataLoader,
    test_loader: DataLoader,
    epochs: int = 10,
    lr: float = 1e-4,
    description: str = "",
) -> dict[str, list[float]]:
    """Train a classifier with AdamW (weight decay 0.01, constant rate) on what has requires_grad.

    Batches are dicts with `input_ids`, `label` and, where rows differ in length, `attention_mask`.
    Returns `train_loss`, `train_acc`, `test_acc`, one value an epoch; an interrupt returns the
    epochs that were finished. Raises as trainable_parameters, training_steps and accuracy.
    """
    optimizer = adamw(trainable_parameters(model), lr)
    history = {"train_loss": [], "train_acc": [], "test_acc": []}
    right = []  # for each batch of an epoch, which of its classes were right

    def loss_function(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits, labels = _classify(model, batch)
        right.append(logits.argmax(dim=-1) == labels)
        return F.cross_entropy(logits, labels)

    try:
        with mode(model, training=True):
            for _ in tqdm(range(epochs), desc=description, leave=False):
                right.clear()
                losses = list(training_steps(model, train_loader, optimizer, loss_function))
                sizes = list(map(len, right))
                train_loss = sum(map(math.prod, zip(losses, sizes, strict=True))) / sum(sizes)
                train_acc = torch.cat(right).sum().item() / sum(sizes)
                epoch = train_loss, train_acc, accuracy(model, test_loader)
                for values, value in zip(history.values(), epoch, strict=True):
                    values.append(value)
    except KeyboardInterrupt:
        print(f"interrupted after {len(history['test_acc'])} of {epochs} epochs")
    return history
