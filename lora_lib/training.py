"""One training loop, and what runs on it: the course's recipe for names, the lesson's for classes.

The loop knows nothing of LoRA: it trains whatever has `requires_grad`.
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_lib.model import SmallTransformer
from lora_lib.names import Pair
from lora_lib.scores import accuracy, classify, language_model_loss, mode
from lora_lib.tokens import Tokenizer, batches_by_length, pair_examples


def training_steps(
    model: nn.Module,
    batches: Iterable,
    optimizer: Optimizer,
    loss_function: Callable[[nn.Module, object], Tensor] = language_model_loss,
    max_norm: float = math.inf,
) -> Iterator[float]:
    """The loop: one step of the optimizer for each batch. Yields the loss of each step, so that
    you may look at the model, or change the learning rate, before the next one.

    Gradients are clipped to norm `max_norm`; the model stays in the mode it is in. Warns of
    parameters with requires_grad that got no gradient in the first step.

    Raises ValueError if there are no batches, or no gradient at all; FloatingPointError if the
    loss is not finite, with the weights as after the step before.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    step = 0
    for step, batch in enumerate(batches, start=1):
        loss = loss_function(model, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {step} (learning rate {optimizer.defaults['lr']}); "
                "lower the learning rate or the scaling alpha / rank, and start again from a fresh "
                "model"
            )
        optimizer.zero_grad()
        if loss.requires_grad:  # otherwise the check below says what is wrong
            loss.backward()
        if step == 1:
            _check_gradients(model)
        if max_norm < math.inf:
            nn.utils.clip_grad_norm_(held, max_norm)
        optimizer.step()
        yield value
    if step == 0:
        raise ValueError("there are no batches to train on; give at least one")


def _check_gradients(model: nn.Module) -> None:
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    missed = [name for name, p in trainable.items() if p.grad is None]
    message = (
        f"{len(missed)} of {len(trainable)} trainable parameters got no gradient in the first "
        f"step ({', '.join(missed[:3])}, …): freeze what the loss does not need; with gradient "
        "checkpointing, use its form use_reentrant=False"
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


def adamw(parameters: list[nn.Parameter], lr: float) -> Optimizer:
    """AdamW with weight decay 0.01, the course's optimizer."""
    return AdamW(parameters, lr, weight_decay=0.01, fused=True)


def warm_up_then_decay(step: int, steps: int) -> float:
    """Share of the peak learning rate: straight up over a tenth of the steps, then down to zero."""
    return min(1.0, (step + 1) / steps / 0.1, (1 - step / steps) / 0.9)


def progress(iterable: Iterable, total: int, description: str = "") -> tqdm:
    """A bar for whoever watches, in a terminal or a notebook; none in a file or a pipe. It is on
    stdout, since JupyterLab paints what is on stderr as an error, and goes when it is full."""
    watched = sys.stdout.isatty() or type(sys.stdout).__module__.startswith("ipykernel")
    bar = dict(total=total, desc=description, leave=False, file=sys.stdout)
    return tqdm(iterable, disable=not watched, **bar)


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
    stepper = optimizer(trainable_parameters(model), lr)
    schedule = LambdaLR(stepper, lambda step: warm_up_then_decay(step, steps))
    taken = training_steps(model, islice(batches, steps), stepper, loss_function, max_norm=1.0)
    losses = []
    try:
        with mode(model, training=True):
            for loss in progress(taken, steps, description):
                losses.append(loss)
                schedule.step()
    except KeyboardInterrupt:
        print(f"interrupted after {len(losses)} of {steps} steps")
    return losses


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
        logits, labels = classify(model, batch)
        right.append(logits.argmax(dim=-1) == labels)
        return F.cross_entropy(logits, labels)

    try:
        with mode(model, training=True):
            for _ in progress(range(epochs), epochs, description):
                right.clear()
                losses = list(training_steps(model, train_loader, optimizer, loss_function))
                sizes = list(map(len, right))
                summed = sum(loss * n for loss, n in zip(losses, sizes, strict=True))
                test_acc = accuracy(model, test_loader)  # all of an epoch, or nothing of it
                history["train_loss"].append(summed / sum(sizes))
                history["train_acc"].append(torch.cat(right).sum().item() / sum(sizes))
                history["test_acc"].append(test_acc)
    except KeyboardInterrupt:
        print(f"interrupted after {len(history['test_acc'])} of {epochs} epochs")
    return history
