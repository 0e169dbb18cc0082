"""Exercises of notebook 04: a training step, and the clinic of broken runs."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora_course.claims import say_options
from lora_course.exercises.checker import Check, Exercise, NotAttempted, variants
from lora_course.exercises.choices import Choice, letter_of
from lora_course.exercises.factors import is_factor
from lora_course.georgian import reads
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import count_parameters, lora_layers
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained
from lora_lib.scores import language_model_loss, transliterate
from lora_lib.tokens import batches_by_length, pair_examples

# --- a training step -----------------------------------------------------------------------------


def draw_step() -> Iterator[tuple]:
    """Two layers with LoRA, B already filled, and two without; nothing else is frozen yet."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Linear(4, 3))
    add_lora_to_model(model, rank=2, alpha=4, target_modules=("0", "2"))
    for layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.5)
    yield model, torch.randn(16, 6), torch.randn(16, 3), 0.1


def observe_step(step: Callable, model: nn.Module, x: Tensor, y: Tensor, lr: float) -> dict:
    """Two steps: the second finds out whether the gradients of the first are still there."""
    start, losses, steps = parameters_of(model), [], []

    def compute_loss() -> Tensor:
        losses.append((model(x) - y).square().mean())
        return losses[-1]

    for _ in range(2):
        before = parameters_of(model)
        step(model, compute_loss, lr)
        moves = {name: (p - before[name]) / lr for name, p in parameters_of(model).items()}
        steps.append([move for name, move in moves.items() if is_factor(name)])
    moved = {n for n, p in parameters_of(model).items() if not torch.equal(p, start[n])}
    return {
        "whether the loss was computed": bool(losses),
        "other parameters that moved": {name for name in moved if not is_factor(name)},
        "factors that moved": {name for name in moved if is_factor(name)},
        "the first step, divided by lr": torch.cat([move.flatten() for move in steps[0]]),
        "the second step, divided by lr": torch.cat([move.flatten() for move in steps[1]]),
    }


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@variants
def stepping(model, compute_loss, lr, chosen=is_factor, by=lambda p, lr: lr * p.grad, clear=True):
    """A step that subtracts `by` from the parameters whose names are chosen."""
    if clear:
        model.zero_grad()
    compute_loss().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if chosen(name):
                parameter -= by(parameter, lr)


def recorded_by_autograd(model, compute_loss, lr):
    compute_loss().backward()
    for name, parameter in model.named_parameters():
        if is_factor(name):
            parameter -= lr * parameter.grad


step = Exercise(
    "04 step",
    stepping(),
    draw_step,
    observe=observe_step,
    may_change=True,
    mistakes={
        "an update is no part of the loss: make it inside `with torch.no_grad():`": (
            recorded_by_autograd
        ),
        "a frozen weight has no gradient, its .grad is None; choose the factors by their names": (
            stepping(chosen=lambda name: True)
        ),
        "what is not wrapped moved as well; only the adapter's factors are to move": (
            stepping(chosen=lambda name: "original" not in name)
        ),
        "no parameter moved: change each in place; `p = p - …` makes a new tensor": (
            stepping(chosen=lambda name: False)
        ),
        "you add the gradient; downhill is to subtract it": stepping(by=lambda p, lr: -lr * p.grad),
        "you subtract the whole gradient; take lr times as much": stepping(by=lambda p, lr: p.grad),
        "every entry moved by lr, as with Adam; plain descent moves by lr times the gradient": (
            stepping(by=lambda p, lr: lr * p.grad.sign())
        ),
        "only lora_B moved; lora_A is a factor, too": stepping(
            chosen=lambda n: n.endswith("lora_B")
        ),
        "the step also shrinks the weights, as weight decay does; plain descent does not": stepping(
            by=lambda p, lr: lr * (p.grad + 0.1 * p)
        ),
        "the gradient was brought to length 1 first; plain descent takes it as it is": stepping(
            by=lambda p, lr: lr * p.grad / p.grad.norm()
        ),
        "the second step has the first one's gradient in it: backward() adds to .grad, so clear "
        "that first (zero_grad)": stepping(clear=False),
    },
)

# --- the clinic ----------------------------------------------------------------------------------

RATE, STEPS = 5e-3, 30
RUNS = ("healthy", "A", "B", "C", "D", "E")


def prepare_run(name: str) -> tuple:
    """The model, the tokenizer and the optimizer of a run; A to E have one fault each."""
    torch.manual_seed(0)
    model, tokenizer = load_pretrained(dropout=0.0)
    before = list(model.parameters())
    if name == "E":
        model.classifier = nn.Linear(model.classifier.in_features, model.classifier.out_features)
    add_lora_to_model(model, target_modules=("W_v",) if name == "B" else ("W_q", "W_v"))
    freeze_non_lora_params(model)
    if name == "A":
        for layer in lora_layers(model):
            nn.init.zeros_(layer.lora_A)
    held = before if name == "D" else [p for p in model.parameters() if p.requires_grad]
    return model, tokenizer, torch.optim.AdamW(held, lr=1.0 if name == "C" else RATE)


def clinic_run(name: str) -> dict:
    """Train one of RUNS for 30 steps and return its symptoms; your random numbers stay as they are.

    `losses`; `trainable`: parameters with requires_grad; `held`: how many scalars the optimizer
    holds; `gradient_A`, `gradient_B`: largest entry of the factors' gradients at the last step;
    `change_B`: largest entry of B at the end (it starts at zero); `reads`: what it then writes for
    Batman, in Latin letters where it is Georgian, and its first dozen letters.
    """
    with torch.random.fork_rng(devices=[]):
        model, tokenizer, optimizer = prepare_run(name)
        examples = pair_examples(load_pairs("georgian", "train"), tokenizer)
        batches, losses = batches_by_length(examples, 16, seed=0), []
        model.train()
        for _ in range(STEPS):
            loss = language_model_loss(model, next(batches))
            model.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        [written] = transliterate(model, tokenizer, ["Batman"])
    layers = list(lora_layers(model))
    return {
        "losses": losses,
        "trainable": count_parameters(model, only_trainable=True),
        "held": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
        "gradient_A": max(layer.lora_A.grad.abs().max().item() for layer in layers),
        "gradient_B": max(layer.lora_B.grad.abs().max().item() for layer in layers),
        "change_B": max(layer.lora_B.abs().max().item() for layer in layers),
        "reads": reads(written[:12]) + "…" * (len(written) > 12),
    }


class Diagnosis(Check):
    """Call it with {"A": "d", …}: for every run the letter of its cause.

    `words["causes"]` has for each letter a cause, its sign, and the run that shows it.
    """

    @property
    def causes(self) -> dict[str, dict]:
        return self.words["causes"]

    @property
    def why(self) -> str:
        signs = sorted(f"{cause['run']}: {cause['sign']}" for cause in self.causes.values())
        return f"The signs that decide. {'; '.join(signs)}."

    def __call__(self, answer=None) -> None:
        say_options({letter: cause["cause"] for letter, cause in self.causes.items()})
        super().__call__(answer)

    def judge(self, answer) -> str | None:
        runs = sorted(cause["run"] for cause in self.causes.values())
        if answer is None or (isinstance(answer, dict) and not any(answer.values())):
            raise NotAttempted(
                "Give each run the letter of a cause, in quotes, and run the cell again."
            )
        if not isinstance(answer, dict) or sorted(map(str, answer)) != runs:
            return f"give a letter for each run, as in {dict.fromkeys(runs, 'a')}"
        replies = {run: self._reply(run, answer[run]) for run in runs}
        right = sum(reply.startswith("right: ") for reply in replies.values())
        lines = [f"  {run}: {reply}" for run, reply in replies.items()]
        if right == len(lines):
            return None
        return "\n".join([f"{right} of {len(lines)} runs are right.", *lines])

    def _reply(self, run: str, answer) -> str:
        try:
            found = self.causes[letter_of(answer or None, self.causes)]
        except NotAttempted as to_do:
            return str(to_do) if answer else "not answered"
        if found["run"] == run:
            return f"right: {found['sign']}"
        return f"if {found['cause']}, then {found['sign']}; this run shows no such sign"


diagnose = Diagnosis("04 diagnose")
few_seeds = Choice("04 few_seeds")
rate = Choice("04 rate")
