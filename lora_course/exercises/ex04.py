"""Checks of notebook 04: a training step, and the clinic of broken runs."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Choice, Exercise, Wrong
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import count_parameters, lora_layers
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained, read_metadata
from lora_lib.tokens import batches_by_length, pair_examples
from lora_lib.training import language_model_loss

# --- a training step -----------------------------------------------------------------------------


def _small_problem() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Two layers with LoRA and a plain one; nothing outside the LoRA layers is frozen yet."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4), nn.Linear(4, 3))
    add_lora_to_model(model, rank=2, alpha=6, target_modules=("0", "2"))
    for layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    x, y = torch.randn(16, 6), torch.randn(16, 3)
    return model, lambda: (model(x) - y).square().mean()


def _test_step(learner) -> None:
    model, compute_loss = _small_problem()
    earlier = None
    for _ in range(2):  # the second step finds out whether old gradients are still there
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        names = [name for name in before if "lora_" in name]
        factors = [p for name, p in model.named_parameters() if "lora_" in name]
        gradients = torch.autograd.grad(compute_loss(), factors)
        learner(model, compute_loss, 1e-3)
        after = dict(model.named_parameters())
        others = [n for n in before if n not in names and not torch.equal(before[n], after[n])]
        if others:
            raise Wrong(
                f"{others[0]} changed, and it is not part of the adapter: step over the "
                "parameters whose name holds lora_A or lora_B, or freeze the rest first"
            )
        steps = [after[n].detach() - before[n] for n in names]
        if not any(step.any() for step in steps):
            if not any(p.grad is not None for p in factors):
                raise NotImplementedError
            raise Wrong(
                "no parameter changed: after backward(), update each of them in place; "
                "`p = p - …` only makes a new tensor"
            )
        unchanged = [
            name
            for name, step, gradient in zip(names, steps, gradients, strict=True)
            if gradient.any() and not step.any()
        ]
        if len(unchanged) == 2 and unchanged[0][0] == unchanged[1][0]:
            raise Wrong(f"layer {unchanged[0][0]} did not change; every LoRA layer is trained")
        if unchanged:
            raise Wrong(f"{unchanged[0]} did not change; both factors of a layer are trained")
        _compare_steps(steps, gradients, earlier, 1e-3)
        earlier = gradients


def _compare_steps(steps, gradients, earlier, lr: float) -> None:
    """All steps taken together, as one vector each; `earlier`: the step before's gradients."""
    step, gradient = (torch.cat([t.flatten() for t in ts]) for ts in (steps, gradients))
    before = torch.cat([t.flatten() for t in earlier]) if earlier else torch.zeros_like(step)

    def is_about(wanted: Tensor) -> bool:  # the rounding of an entry of 2 is 1e-7
        return torch.allclose(step, wanted, rtol=1e-2, atol=1e-6)

    if is_about(-lr * gradient):
        return
    if is_about(lr * gradient):
        raise Wrong("you add the gradient; going downhill means to subtract it")
    if is_about(-gradient):
        raise Wrong("you subtract the whole gradient; the step is lr times as large")
    if is_about(-lr * (gradient + before)):
        raise Wrong(
            "the second step contains the first one's gradient: backward() adds to .grad, so clear "
            "it first (zero_grad)"
        )
    if step.abs().max() < 1.1 * lr and step.abs().median() > 0.9 * lr:
        raise Wrong(
            "every entry moved by about lr, as with Adam or the sign of the gradient; plain "
            "gradient descent moves by −lr times the gradient"
        )
    raise Wrong("the factors moved, but not by −lr times the gradient of this step")


step = Exercise(
    "04 step",
    _test_step,
    contract="step(model, compute_loss, lr) changes the LoRA factors by one step.",
    why="Only the factors moved: the base stays whole, so one base can carry many adapters.",
    hints=[
        "Clear old gradients, compute the loss, call backward(), then update.",
        "model.named_parameters() gives names; the adapter's hold lora_A or lora_B.",
        "Plain gradient descent, under torch.no_grad(): p -= lr * p.grad.",
    ],
)

# --- the clinic ----------------------------------------------------------------------------------

RATE, STEPS = 5e-3, 30


def _model(targets=("W_q", "W_v"), fresh_head: bool = False) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model, tokenizer = load_pretrained(dropout=0.0)
    if fresh_head:
        model.classifier = nn.Linear(model.classifier.in_features, model.classifier.out_features)
    add_lora_to_model(model, target_modules=targets)
    freeze_non_lora_params(model)
    return model, tokenizer


def _healthy():
    return *_model(), RATE, None


def _optimizer_before_injection():
    model, tokenizer = load_pretrained(dropout=0.0)
    before = list(model.parameters())
    torch.manual_seed(0)
    add_lora_to_model(model)
    freeze_non_lora_params(model)
    return model, tokenizer, RATE, before


def _frozen_new_head():
    return *_model(fresh_head=True), RATE, None


def _missed_target():
    return *_model(targets=("W_v",)), RATE, None


def _both_factors_zero():
    model, tokenizer = _model()
    for layer in lora_layers(model):
        nn.init.zeros_(layer.lora_A)
    return model, tokenizer, RATE, None


def _rate_too_high():
    return *_model(), 1.0, None


RUNS = {
    "healthy": _healthy,
    "A": _both_factors_zero,
    "B": _missed_target,
    "C": _rate_too_high,
    "D": _optimizer_before_injection,
    "E": _frozen_new_head,
}


def clinic_run(name: str) -> dict:
    """Train "healthy" or one of the broken runs "A" to "E" for 30 steps; returns its symptoms.

    `losses`; `trainable`: parameters with requires_grad; `held`: how many scalars the optimizer
    holds; `gradient_A`, `gradient_B`: largest entry of the factors' gradients at the last step;
    `change_B`: largest entry of B at the end (it starts at zero).
    """
    model, tokenizer, lr, parameters = RUNS[name]()
    held = parameters or [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(held, lr=lr)
    examples = pair_examples(load_pairs("georgian", "train"), tokenizer)
    batches, losses = batches_by_length(examples, 16, seed=0), []
    model.train()
    for _ in range(STEPS):
        loss = language_model_loss(model, next(batches))
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    layers = list(lora_layers(model))
    return {
        "losses": losses,
        "trainable": count_parameters(model, only_trainable=True),
        "held": sum(p.numel() for p in held),
        "gradient_A": max(layer.lora_A.grad.abs().max().item() for layer in layers),
        "gradient_B": max(layer.lora_B.grad.abs().max().item() for layer in layers),
        "change_B": max(layer.lora_B.abs().max().item() for layer in layers),
    }


CAUSES = {
    "a": "the optimizer was built before the injection",
    "b": "a new random head was left frozen",
    "c": "one of the two targets was missed",
    "d": "both factors start at zero",
    "e": "the learning rate is far too high",
}
_SIGNS = {  # what each cause would show: told to whoever names it for another run
    "a": "the optimizer holds the whole base's scalars and B never moves, while the gradients are "
    "alive",
    "b": "the loss starts above the healthy run's, near that of guessing among all characters "
    f"(about {math.log(read_metadata()['config']['vocab_size']):.1f} nats), with the usual counts",
    "c": "fewer parameters are trainable than in the healthy run",
    "d": "the gradients of A and of B are both exactly zero",
    "e": "the loss leaps up and down, and B grows by orders of magnitude",
}
_RIGHT = {"A": "d", "B": "c", "C": "e", "D": "a", "E": "b"}


def _diagnosis(run: str) -> Choice:
    right = _RIGHT[run]
    return Choice(
        f"04 run {run}",
        question=f"Run {run}: what went wrong?",
        options=CAUSES,
        right=right,
        why=f"Its sign: {_SIGNS[right]}.",
        misconceptions={
            cause: f"if {text}, then {_SIGNS[cause]}. Run {run} does not show that."
            for cause, text in CAUSES.items()
            if cause != right
        },
    )


diagnose = {run: _diagnosis(run) for run in _RIGHT}

few_seeds = Choice(
    "04 few_seeds",
    question="One run with rank 16 scores .558, one with rank 32 scores .535. What follows?",
    options={
        "a": "Rank 16 is better on this task.",
        "b": "Rank 32 has too many parameters and overfits.",
        "c": "Nothing about ranks: seeds differ by as much.",
        "d": "The seed that gave .558 should be used from now on.",
    },
    right="c",
    why="A difference counts once it is larger than the spread over seeds.",
    misconceptions={
        "a": "look at the spread of each rank in the figure: the two overlap.",
        "b": "that explains a difference which is not there; the seeds of each rank overlap.",
        "d": "choosing the luckiest seed on test towns fits the choice to the test; the next "
        "test set will not repeat it.",
    },
)
