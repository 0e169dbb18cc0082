"""Exercises of notebook 07: five functions to write, and what their results support.

A helper such as `swapped()` makes the right function, and with another part a wrong one.
"""

import copy
import operator
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Choice, Exercise
from lora_course.exercises.factors import kinds, last_piece, numbers_that_train, set_factors
from lora_lib.adapters import load_adapter, save_adapter
from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
)
from lora_lib.lora import LoRALinear, count_parameters, lora_layers
from lora_lib.model import SmallTransformer
from lora_lib.pretrained import load_pretrained
from lora_lib.rank import k90, singular_values, weight_changes

# --- 1: other target modules ---------------------------------------------------------------------


@cache
def shipped_base() -> tuple[nn.Module, Tensor, Tensor]:
    """The pretrained base, a prompt, and what the base makes of it."""
    model, tokenizer = load_pretrained()
    prompt = torch.tensor([tokenizer.prompt("Hrazdan")])
    with torch.no_grad():
        return model, prompt, model(prompt).double()


def with_lora(names, rank, alpha=None):
    model = copy.deepcopy(shipped_base()[0])
    add_lora_to_model(model, rank, alpha or 2.0 * rank, names)
    freeze_non_lora_params(model)
    return model, count_parameters(model, only_trainable=True)


def but(change: Callable) -> Callable:
    return lambda names, rank: change(*with_lora(names, rank))


def draw_targets() -> Iterator[tuple]:
    yield random.choice((("W_k", "W_o"), ("W_k", "linear1", "W_o"))), random.choice((3, 5, 7))


@torch.no_grad()
def observe_targets(function: Callable, names: tuple[str, ...], rank: int) -> dict:
    result, again = function(names, rank), function(names, rank)
    if kinds(result) != "a model and a number":
        return {"what comes back": kinds(result)}
    own = again[0] is not result[0]
    facts = {"what comes back": "a model and a number", "a base of its own at each call": own}
    if not own:  # the learner's own model is left alone
        return facts
    base, prompt, written = shipped_base()
    model = result[0].cpu().double().eval()
    starts_at_the_base = torch.allclose(model(prompt), written, atol=1e-4)
    set_factors(model)
    return facts | {
        "the numbers that train, by layer": numbers_that_train(model, base),
        "writing as the pretrained base before training": starts_at_the_base,
        "the output once the factors are not zero": model(prompt),
        "the number": result[1],
    }


lora_on = Exercise(
    "07 lora_on",
    with_lora,
    draw_targets,
    mistakes={
        "two calls gave the same model; call load_pretrained() inside": lru_cache(1)(with_lora),
        "LoRA sits on W_q and W_v, the default; pass names on": (
            lambda names, rank: with_lora(("W_q", "W_v"), rank)
        ),
        "this has rank 8, the default; pass rank on": lambda names, rank: with_lora(names, 8),
        "alpha is 16, the default, so two ranks differ in step size too": (
            lambda names, rank: with_lora(names, rank, alpha=16.0)
        ),
        "alpha is 2, which is to be the scaling; alpha is twice the rank": (
            lambda names, rank: with_lora(names, rank, alpha=2.0)
        ),
        "the base still trains; freeze it": but(lambda m, n: (m.requires_grad_(), n)),
        "the factors are frozen too": but(lambda m, n: (m.requires_grad_(False), n)),
        "you counted all; count what requires_grad": but(lambda m, n: (m, count_parameters(m))),
        "you counted layers, not what trains": but(lambda m, n: (m, len(list(lora_layers(m))))),
        "the model comes first, then the number": but(lambda m, n: (n, m)),
    },
    observe=observe_targets,
    why="The choice of targets is one argument; what it is worth is a measurement.",
    hints=[
        "Three steps: a fresh base, LoRA on the named layers, everything else frozen.",
        "add_lora_to_model(model, rank, 2 * rank, names) changes the model in place.",
        "After freeze_non_lora_params(model), count_parameters(model, only_trainable=True).",
    ],
)

conclude_targets = Choice(
    "07 conclude_targets",
    "Q and V against K and O: equal counts, one learning rate, one seed, a short training. Which "
    "conclusion does your result support?",
    {
        "The pair that ended with fewer bits is the better one for LoRA on such tasks.": "one seed "
        "and one rate were tried, and either can turn the order; notebook 06 shows it.",
        "LoRA does not need W_q and W_v: on W_k and W_o it learns this task too.": "One run shows "
        "that a choice works; to rank two takes several seeds, and a rate tuned for each.",
        "Nothing: one seed at one rate cannot show whether W_k and W_o learn the task.": "one run "
        "that learns is enough to show that it can be learned; a ranking would take more.",
        "W_k and W_o learned because this model is small; large ones need W_q and W_v.": "no "
        "larger model was measured; W_q and W_v are the paper's habit, not a law.",
    },
    right="b",
    hint="Hold each of the two runs against the base without LoRA.",
)

# --- 2: an equal budget --------------------------------------------------------------------------


def highest_rank(
    matches=last_piece,
    kind=nn.Linear,
    cost=lambda layer: sum(layer.weight.shape),
    total=sum,
    divide=operator.floordiv,
    least=1,
) -> Callable:
    def rank_for_budget(model, names, budget):
        layers = [m for p, m in model.named_modules() if isinstance(m, kind) and matches(p, names)]
        rank = divide(budget, total([cost(layer) for layer in layers]))
        if rank < least:
            raise ValueError("rank 1 takes more than the budget")
        return rank

    return rank_for_budget


def draw_budgets() -> Iterator[tuple]:
    """Between two ranks, exactly a rank, beside layers of similar names, and too little."""
    d = 8 * random.randint(2, 5)
    model, names = SmallTransformer(random.randint(20, 60), d, 4, 1, 5), ("W_q", "linear1")
    rank, one = random.randint(5, 20), (d + d) + (d + 4 * d)  # parameters of rank 1
    yield model, names, rank * one + one - random.randint(1, d)
    yield model, names, rank * one
    similar = {name: nn.Linear(d, d, bias=False) for name in ("W_q", "old_W_q", "W_q_old")}
    similar["table"] = nn.ModuleDict({"W_q": nn.Embedding(5, d)})
    yield nn.ModuleDict({"layer": nn.ModuleDict(similar)}), ("W_q",), 3 * rank * 2 * d
    yield model, names, one - 1


def observe_rank(function: Callable, *arguments) -> dict:
    try:
        return {"the rank": function(*arguments)}
    except ValueError:
        return {"the rank": "ValueError"}


PIECE = 'compare its last piece, path.split(".")[-1]'

rank_for_budget = Exercise(
    "07 rank_for_budget",
    highest_rank(),
    draw_budgets,
    mistakes={
        f"no layer matched, since a path is longer than a name; {PIECE}": (
            highest_rank(lambda path, names: path in names)
        ),
        f"old_W_q only ends like W_q; {PIECE}": (
            highest_rank(lambda path, names: path.endswith(names))
        ),
        f"old_W_q and W_q_old hold W_q and are other names; {PIECE}": (
            highest_rank(lambda path, names: any(name in path for name in names))
        ),
        "an nn.Embedding called W_q was counted": highest_rank(kind=nn.Module),
        "a budget below rank 1 must raise ValueError": highest_rank(least=0),
        "you counted one layer; all that match get factors": highest_rank(total=lambda x: x[0]),
        "weight.numel() counts all of W; rank 1 costs d_out + d_in": (
            highest_rank(cost=lambda layer: layer.weight.numel())
        ),
        "not every weight is square; rank 1 costs d_out + d_in": (
            highest_rank(cost=lambda layer: 2 * layer.in_features)
        ),
        "that is A alone; B has numbers too": highest_rank(cost=lambda layer: layer.in_features),
        "that rank takes more than the budget; round down": (
            highest_rank(divide=lambda budget, cost: round(budget / cost))
        ),
        "the budget may be used up to its last number: at most means ≤": (
            highest_rank(divide=lambda budget, cost: (budget - 1) // cost)
        ),
    },
    observe=observe_rank,
    why="Targets can now be compared at one price, so what differs is where the rank is spent.",
    hints=[
        "How many parameters does rank 1 take? Rank r takes r times that.",
        'Look at named_modules() for nn.Linear where path.split(".")[-1] is one of the names; a '
        "layer costs d_out + d_in.",
        "budget // cost, and ValueError if that is 0.",
    ],
)

conclude_budget = Choice(
    "07 conclude_budget",
    "One budget, spent in four ways: at rank 8 on all layers, and at higher ranks on fewer of "
    "them. Which conclusion do the recorded results support?",
    {
        "A higher rank on fewer layers is the better use of a budget: rank is what learns.": "the "
        "highest rank stands on W_q and W_v, which came out last in the table.",
        "Feed-forward layers matter more than attention, in this model and in others.": "their "
        "ranges just overlap, and only one task and one model were measured.",
        "Here a budget does more over all layers than in W_q and W_v.": "The price is equal and "
        "the result is not, so it matters where the rank is spent.",
        "All layers win because they have more trainable parameters than the others.": "the counts "
        "are within three per cent of each other; that is what your function is for.",
    },
    right="c",
    hint="Which ranges of seeds do not touch?",
)

# --- 3: two tasks, two adapters ------------------------------------------------------------------


def swapped(take_off=lambda model: unload_lora(model, merge=False), then=lambda model: model):
    def swap(model, directory):
        if any(lora_layers(model)):
            take_off(model)
        return then(load_adapter(model, directory))

    return swap


@torch.no_grad()
def subtract(model: nn.Module) -> None:
    for layer in lora_layers(model):
        layer.unmerge()
        layer.original.weight += layer.delta_weight()
        layer.original.weight -= layer.delta_weight()
    unload_lora(model, merge=False)


def cut_out(model: nn.Module, names: str = "") -> None:
    """Put the plain layers back as they are, merged or not."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear) and names in path:
            model.set_submodule(path, layer.original)


def merged(model: nn.Module) -> nn.Module:
    merge_lora_weights(model)
    return model


def draw_adapters() -> Iterator[tuple]:
    """A base, and three adapters for it, of other ranks on other layers."""
    base = SmallTransformer(20, 16, 2, 1, 20, dropout=0.0).eval()
    adapters = []
    for rank, targets in (2, ["W_q", "W_v"]), (5, "all-linear"), (3, ["W_o"]):
        model, layers = add_lora_to_model(copy.deepcopy(base), rank, 4.0, targets)
        for layer in layers:
            nn.init.normal_(layer.lora_B, std=0.3)
        adapters.append(model)
    yield base, *adapters


def observe_swap(function: Callable, model: nn.Module, *adapters: nn.Module) -> dict:
    """One swap after the other, the last with a merged adapter on the model."""
    base, seen = copy.deepcopy(model.state_dict()), defaultdict(list)
    with TemporaryDirectory() as folder:
        for number, adapter in enumerate(adapters):
            if number == 2 and any(lora_layers(model)):
                merge_lora_weights(model)
            directory = save_adapter(adapter, Path(folder) / f"adapter_{number}")
            try:
                result = function(model, directory)
            except ValueError as error:  # names a folder, which is another one at every call
                error.args = (str(error).replace(folder, "…"),)
                raise
            same = result is model
            seen["what comes back"].append("the model it was given" if same else kinds(result))
            written = result if isinstance(result, nn.Module) else model
            with torch.no_grad():
                seen["the outputs"].append(written.eval()(torch.arange(5, 17).view(2, 6)))
            seen["the base weights"].append(_moved(base, model))
    return seen | {"the outputs": torch.stack(seen["the outputs"])}


def _moved(base: dict[str, Tensor], model: nn.Module) -> str:
    now = {name.replace(".original.", "."): t for name, t in model.state_dict().items()}
    largest = max((now[name] - tensor).abs().max().item() for name, tensor in base.items())
    return "as they were" if largest == 0 else "off by rounding" if largest < 1e-5 else "changed"


swap = Exercise(
    "07 swap",
    swapped(),
    draw_adapters,
    mistakes={
        "a plain model has nothing to take off; ask first whether it has LoRA layers": (
            lambda model, path: load_adapter(unload_lora(model, merge=False), path)
        ),
        "another adapter was on the model; take it off first": swapped(lambda model: None),
        "only attention was cleared; an adapter may sit on any layer": (
            swapped(lambda model: cut_out(model, "attention"))
        ),
        "you returned another model; put the adapter on the one you were given": (
            lambda model, path: swapped()(copy.deepcopy(model), path)
        ),
        "the old adapter was merged into the base: unload_lora merges unless you say merge=False": (
            swapped(unload_lora)
        ),
        "a merged adapter stayed in the base; unmerge before you take it off": swapped(cut_out),
        "the first adapter stays on; take it off, then load the new one": (
            lambda model, path: model if any(lora_layers(model)) else load_adapter(model, path)
        ),
        "you merged the new adapter, and the base weights are to stay": swapped(then=merged),
        "the base is off by rounding, as W + ΔW − ΔW is; put the kept W back": swapped(subtract),
    },
    observe=observe_swap,
    may_change=True,
    why="One base serves any number of tasks, and nothing of one task leaks into the next.",
    hints=[
        "Two steps: take off what is on the model, then load the new adapter.",
        "unload_lora(model, merge=False) puts the original weights back, also after a merge; it "
        "raises on a plain model.",
        "any(isinstance(m, LoRALinear) for m in model.modules()) says whether one is on.",
    ],
)

conclude_swap = Choice(
    "07 conclude_swap",
    "You wrote towns in two scripts with one base and found its weights unchanged bit for bit. "
    "Which conclusion does this support?",
    {
        "Both adapters can be on at once, one added to the other, without harm to either.": "you "
        "had one adapter on at a time; the sum of two is a third model, not measured.",
        "Adapters make full fine-tuning unnecessary, as swapping loses no quality.": "swapping "
        "says nothing about quality; in the recorded results full fine-tuning stays ahead.",
        "Three towns are written as before; whether others are has to be tried.": "every tensor of "
        "the base is the same, bit for bit, so it writes every town as before.",
        "Another task costs an adapter's memory, and harms no task before it.": "Each adapter is "
        "loaded onto the same untouched base, so tasks stay apart.",
    },
    right="d",
    hint="What is left in the model of an adapter that was taken off?",
)

# --- 4: SVD of the merged change -----------------------------------------------------------------


def measured(measure=k90, of=singular_values, changed=Tensor.any, changes=weight_changes):
    def change_ranks(before, after):
        found = changes(before, after).items()
        return {path: measure(of(change)) for path, change in found if changed(change)}

    return change_ranks


def after_alone(before, after):
    return {path: after[path].weight for path in measured()(before, after)}


def with_the_table(before, after):
    table = after["table"].weight - before["table"].weight
    return weight_changes(before, after) | {"table": table}


def draw_models() -> Iterator[tuple]:
    """Two large changes, a small one whose sum is zero; a bias and a table changed as well."""
    shapes = {"first": (40, 56), "same": (30, 30), "last": (64, 32), "tiny": (24, 24)}
    before = nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})
    before["table"] = nn.Embedding(20, 30)
    with torch.no_grad():
        before["tiny"].weight.mul_(1024).round_().div_(1024)  # so that the change below is exact
        after = copy.deepcopy(before)
        after["tiny"].weight += torch.tensor([1.0, -1.0]).repeat(12) * 2.0**-14
        after["same"].bias += 1.0
        after["table"].weight += torch.randn(20, 30)
        for name in ("first", "last"):  # singular values 1, 0.8, 0.64, …: 24 of them
            u, v = (torch.linalg.qr(torch.randn(d, 24)).Q for d in after[name].weight.shape)
            after[name].weight += u * 0.8 ** torch.arange(24) @ v.T
    yield before, after


def observe_ranks(function: Callable, before: nn.Module, after: nn.Module) -> dict:
    ranks = function(before, after)
    facts = {"what comes back": type(ranks).__name__}
    layers = isinstance(ranks, dict) and sorted(map(str, ranks))
    return facts | {"the layers": layers, "k90 of each change": ranks}


change_ranks = Exercise(
    "07 change_ranks",
    measured(),
    draw_models,
    mistakes={
        "a layer did not change, and k90 of nothing is undefined; leave it out": (
            measured(changed=lambda change: True)
        ),
        'the weight of "same" did not change (its bias did), so leave it out': (
            lambda *models: measured()(*models) | {"same": 0}
        ),
        'the weight of "tiny" did change, with a sum of zero; ask change.any()': (
            measured(changed=Tensor.sum)
        ),
        '"table" is an nn.Embedding, and no nn.Linear': measured(changes=with_the_table),
        "this is the weight afterwards; take its change": measured(changes=after_alone),
        "k90 takes singular values, not a matrix": measured(of=lambda change: change),
        "90 % of Σσ² are asked for, and this is 90 % of Σσ": (
            measured(of=lambda change: singular_values(change).sqrt())
        ),
        "one too few: the k-th direction has the index k − 1": (
            measured(lambda values: k90(values) - 1)
        ),
        "you counted all directions that are not zero, not those with 90 % of the energy": (
            measured(torch.linalg.matrix_rank, of=lambda change: change)
        ),
    },
    observe=observe_ranks,
    why="You can now ask any pair of checkpoints how many directions training used.",
    hints=[
        "weight_changes, singular_values and k90 of lora_lib.rank do most of it; "
        "`from lora_lib import rank; help(rank)` shows them.",
        "weight_changes(before, after) is {path: change}; skip a change that is zero everywhere.",
        "k90(singular_values(change)) for each of the others, in a dict with the same paths.",
    ],
)

conclude_ranks = Choice(
    "07 conclude_ranks",
    "Merged adapter: k90 of every change at most 8. Full fine-tuning: k90 of attention changes "
    "between noise and 8. On unseen towns the exact matches stand close. Which conclusion do these "
    "results support?",
    {
        "A rank of 8 can suffice without being what full fine-tuning finds.": "The adapter's "
        "change has a low rank by construction, full fine-tuning's has not, and yet they do nearly "
        "the same.",
        "Training the adapter discovered that this task has a rank of 8 at most.": "B·A has rank 8 "
        "at most, whatever the data; you found what was put in.",
        "Full fine-tuning's change is noise beyond its first 8 directions; cut them off.": "its "
        "k90 lies well below that of noise; and cut to rank 8 it wrote next to no town right, as "
        "notebook 04 shows.",
        "LoRA cannot come near full fine-tuning, since the ranks differ so much.": "the exact "
        "matches stand close while the ranks do not: two different changes can do nearly the same.",
    },
    right="a",
    hint="Which of the two ranks was free to be anything?",
)

# --- 5: a quantised base -------------------------------------------------------------------------


def sizes(weight: Tensor, dim: int = 1) -> Tensor:
    """The largest size in each row, and 1 for a row of zeros."""
    size = weight.abs().amax(dim=dim, keepdim=True)
    return size.where(size > 0, 1.0)


def quantised(
    scale=lambda weight, top: sizes(weight) / top,
    convert=lambda multiples: multiples.round().to(torch.int8),
    top=lambda bits: 2 ** (bits - 1) - 1,
    kept=lambda integers, scales: (integers, scales),
) -> Callable:
    def quantise(weight, bits):
        scales = scale(weight, top(bits))
        return kept(convert(weight / scales), scales)

    return quantise


def draw_weights() -> Iterator[tuple]:
    """Rows of very different sizes, one of them zero."""
    for bits in (8, 4, random.choice((3, 5, 6))):
        d_out, d_in = random.randint(20, 30), random.randint(40, 60)
        weight = torch.randn(d_out, d_in) * 10 ** torch.linspace(-2, 1, d_out)[:, None]
        weight[3] = 0
        yield weight, bits


def observe_quantise(function: Callable, weight: Tensor, bits: int) -> dict:
    result = function(weight, bits)
    if kinds(result) != "a tensor and a tensor":
        return {"what comes back": kinds(result)}
    integers, scales = result
    kind = "floats" if scales.is_floating_point() else str(scales.dtype)
    facts = {
        "what comes back": "a tensor and a tensor",
        "the integers": f"{integers.dtype}, shape {tuple(integers.shape)}",
        "the scales": f"{kind}, shape {tuple(scales.shape)}",
    }
    if integers.shape != weight.shape or scales.shape != (len(weight), 1):
        return facts
    top, used = 2 ** (bits - 1) - 1, weight.any(dim=1)
    steps = (integers * scales - weight).abs() / (sizes(weight) / top)
    error, largest = steps[used].max().item(), integers.int().abs().max().item()
    of_zeros = scales[~used].item()
    return facts | {
        "the largest error, in steps": 0.5 if error <= 0.51 else error,
        "the largest integer": top if largest <= top else largest,
        "the scale of a row of zeros": "positive" if 0 < of_zeros < torch.inf else of_zeros,
        "whether a row of zeros has others": integers[~used].any(),
    }


quantise = Exercise(
    "07 quantise",
    quantised(),
    draw_weights,
    mistakes={
        "the integers come first, then the scales": quantised(kept=lambda n, s: (s, n)),
        "the integers are floats; .to(torch.int8) keeps a byte each": quantised(
            convert=torch.round
        ),
        "the scales lack a dimension: amax(dim=1, keepdim=True) gives (d_out, 1)": (
            quantised(lambda weight, top: sizes(weight)[:, 0] / top)
        ),
        "one scale a column; each output channel is a row, so take dim=1": (
            quantised(lambda weight, top: sizes(weight, dim=0) / top)
        ),
        "one scale for all: the row with the largest weights spoils every other row": (
            quantised(lambda weight, top: weight.abs().max() / top)
        ),
        "the scales are upside down": quantised(kept=lambda n, s: (n, 1 / s)),
        "a row's largest weight can be negative; take the scale from weight.abs()": (
            quantised(lambda weight, top: weight.amax(dim=1, keepdim=True).clamp_min(1e-9) / top)
        ),
        "an entry is off by a whole step, as torch.int8 cuts off; round first": (
            quantised(convert=lambda multiples: multiples.to(torch.int8))
        ),
        "top is one less; so the largest integer wraps round": quantised(
            top=lambda n: 2 ** (n - 1)
        ),
        "the integers are those of 8 bits, whatever bits says": quantised(top=lambda n: 127),
        "a row of zeros gives 0 / 0; a scale must be positive there too": (
            quantised(lambda weight, top: weight.abs().amax(dim=1, keepdim=True) / top)
        ),
    },
    observe=observe_quantise,
    why="A base can be kept in a quarter of its bytes or fewer, and each row has its own step.",
    hints=[
        "top = 2**(bits − 1) − 1; a row's scale is its largest size over top.",
        "weight.abs().amax(dim=1, keepdim=True) / top has shape (d_out, 1).",
        "(weight / scale).round().to(torch.int8), with a scale of 1 where the row is all zero.",
    ],
)

conclude_quantise = Choice(
    "07 conclude_quantise",
    "The Georgian adapter, trained on the float32 base, on a base of 8, 4 and 2 bits. Which "
    "conclusion do your results support?",
    {
        "Fewer bits are always free, since the float32 adapter repairs what the base loses.": "at "
        "2 bits no town is right; the adapter was not made for that base.",
        "The adapter was quantised, which is why the file of an adapter is so small.": "the base "
        "was quantised; the factors stayed float32.",
        "8 and 4 bits cost little beside what they save; 2 bits cost too much.": "How many bits a "
        "base can lose is a measurement, for each model and each scheme.",
        "A quantised base trains faster: integers are multiplied faster than floats.": "speed was "
        "not measured, and the weights are turned back into floats to multiply.",
    },
    right="c",
    hint="Compare the error rates with that of 32 bits.",
)
