"""Exercises of notebook 07: five functions to write, and what their results support.

A helper such as `swapped()` gives the right function, and with another part a wrong one.
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

from lora_course.directions import lora_by_path
from lora_course.exercises.checker import Exercise, variants
from lora_course.exercises.choices import Choice
from lora_course.exercises.factors import WRONG_MATCHES, kinds, observe
from lora_lib.adapters import load_adapter, save_adapter
from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
)
from lora_lib.lora import count_parameters, lora_layers
from lora_lib.model import SmallTransformer
from lora_lib.pretrained import load_pretrained
from lora_lib.rank import k90, singular_values, weight_changes
from lora_lib.targets import is_named

# --- 1: other target modules ---------------------------------------------------------------------


@cache
def shipped_base() -> tuple[nn.Module, Tensor]:
    """The pretrained base, and a prompt for it."""
    model, tokenizer = load_pretrained()
    return model, torch.tensor([tokenizer.prompt("Hrazdan")])


@variants
def with_lora(names, rank, alpha=None):
    model = copy.deepcopy(shipped_base()[0])
    add_lora_to_model(model, rank, alpha or 2.0 * rank, names)
    freeze_non_lora_params(model)
    return model, count_parameters(model, only_trainable=True)


def but(change: Callable) -> Callable:
    return lambda names, rank: change(*with_lora()(names, rank))


def draw_targets() -> Iterator[tuple]:
    yield random.choice((("W_k", "W_o"), ("W_k", "linear1", "W_o"))), random.choice((3, 5, 7))


def observe_targets(function: Callable, names: tuple[str, ...], rank: int) -> dict:
    result, again = function(names, rank), function(names, rank)
    if kinds(result) != "a model and a number":
        return {"what comes back": kinds(result)}
    own = again[0] is not result[0]
    facts = {"what comes back": "a model and a number", "a base of its own at each call": own}
    if not own:  # the learner's own model is left alone
        return facts
    base, prompt = copy.deepcopy(shipped_base())
    return facts | observe(result[0].cpu().eval(), base, prompt) | {"the number": result[1]}


lora_on = Exercise(
    "07 lora_on",
    with_lora(),
    draw_targets,
    mistakes={
        "two calls gave the same model; call load_pretrained() inside": lru_cache(1)(with_lora()),
        "LoRA sits on W_q and W_v, the default; pass names on": (
            lambda names, rank: with_lora()(("W_q", "W_v"), rank)
        ),
        "this has rank 8, the default; pass rank on": lambda names, rank: with_lora()(names, 8),
        "alpha is 16, the default; alpha is twice the rank": with_lora(alpha=16.0),
        "alpha is 2, which is to be the scaling; alpha is twice the rank": with_lora(alpha=2.0),
        "the base still trains; freeze it": but(lambda m, n: (m.requires_grad_(), n)),
        "the factors are frozen too": but(lambda m, n: (m.requires_grad_(False), n)),
        "you counted all; count what requires_grad": but(lambda m, n: (m, count_parameters(m))),
        "you counted layers, not what trains": but(lambda m, n: (m, len(list(lora_layers(m))))),
        "the model comes first, then the number": but(lambda m, n: (n, m)),
    },
    observe=observe_targets,
)

conclude_targets = Choice("07 conclude_targets")

# --- 2: an equal budget --------------------------------------------------------------------------


@variants
def highest_rank(
    model,
    names,
    budget,
    matches=is_named,
    kind=nn.Linear,
    cost=lambda layer: sum(layer.weight.shape),
    total=sum,
    divide=operator.floordiv,
    least=1,
) -> int:
    layers = [m for p, m in model.named_modules() if isinstance(m, kind) and matches(p, names)]
    rank = divide(budget, total([cost(layer) for layer in layers]))
    if rank < least:
        raise ValueError("rank 1 takes more than the budget")
    return rank


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


rank_for_budget = Exercise(
    "07 rank_for_budget",
    highest_rank(),
    draw_budgets,
    mistakes={message: highest_rank(matches=matches) for message, matches in WRONG_MATCHES.items()}
    | {
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
)

conclude_budget = Choice("07 conclude_budget")

# --- 3: two tasks, two adapters ------------------------------------------------------------------


def take_off(model: nn.Module) -> nn.Module:
    return unload_lora(model, merge=False)


@variants
def swapped(model, path, off=take_off, then=lambda model: model) -> nn.Module:
    if any(lora_layers(model)):
        off(model)
    return then(load_adapter(model, path))


@torch.no_grad()
def subtract(model: nn.Module) -> None:
    for layer in lora_layers(model):
        layer.unmerge()
        layer.original.weight += layer.delta_weight()
        layer.original.weight -= layer.delta_weight()
    take_off(model)


def cut_out(model: nn.Module) -> None:
    """Put the plain layers back as they are, merged or not."""
    for path, layer in lora_by_path(model).items():
        model.set_submodule(path, layer.original)


def draw_adapters() -> Iterator[tuple]:
    """A base, and three adapters for it, of other ranks on other layers."""
    base = SmallTransformer(20, 16, 2, 1, 20, dropout=0.0).eval()
    adapters = []
    for rank, targets in (2, ["W_q", "W_v"]), (5, "all-linear"), (3, ["W_o"]):
        model, layers = add_lora_to_model(copy.deepcopy(base), rank, 4.0, targets)
        freeze_non_lora_params(model)
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
            lambda model, path: load_adapter(take_off(model), path)
        ),
        "another adapter was on the model; take it off first": swapped(off=lambda model: None),
        "you returned another model; put the adapter on the one you were given": (
            lambda model, path: swapped()(copy.deepcopy(model), path)
        ),
        "the old adapter was merged into the base: unload_lora merges unless you say merge=False": (
            swapped(off=unload_lora)
        ),
        "a merged adapter stayed in the base; unmerge before you take it off": swapped(off=cut_out),
        "the first adapter stays on; take it off, then load the new one": (
            lambda model, path: model if any(lora_layers(model)) else load_adapter(model, path)
        ),
        "you merged the new adapter; the base is to stay": swapped(then=merge_lora_weights),
        "off by rounding, as W + ΔW − ΔW is; put the kept W back": swapped(off=subtract),
    },
    observe=observe_swap,
    may_change=True,
)

conclude_swap = Choice("07 conclude_swap")

# --- 4: SVD of the merged change -----------------------------------------------------------------


@variants
def measured(
    before, after, measure=k90, of=singular_values, changed=Tensor.any, changes=weight_changes
) -> dict:
    found = changes(before, after).items()
    return {path: measure(of(change)) for path, change in found if changed(change)}


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
        "one too few: the k-th has the index k − 1": measured(measure=lambda v: k90(v) - 1),
        "you counted all directions that are not zero, not those with 90 % of the energy": (
            measured(measure=torch.linalg.matrix_rank, of=lambda change: change)
        ),
    },
    observe=observe_ranks,
)

conclude_ranks = Choice("07 conclude_ranks")

# --- 5: a quantised base -------------------------------------------------------------------------


def sizes(weight: Tensor, dim: int = 1) -> Tensor:
    """The largest size in each row, and 1 for a row of zeros."""
    size = weight.abs().amax(dim=dim, keepdim=True)
    return size.where(size > 0, 1.0)


@variants
def quantised(
    weight,
    bits,
    scale=lambda weight, top: sizes(weight) / top,
    convert=lambda multiples: multiples.round().to(torch.int8),
    top=lambda bits: 2 ** (bits - 1) - 1,
    kept=lambda integers, scales: (integers, scales),
) -> tuple[Tensor, Tensor]:
    scales = scale(weight, top(bits))
    return kept(convert(weight / scales), scales)


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
        "the integers are floats; .to(torch.int8) keeps a byte": quantised(convert=torch.round),
        "the scales lack a dimension: amax(dim=1, keepdim=True) gives (d_out, 1)": (
            quantised(scale=lambda weight, top: sizes(weight)[:, 0] / top)
        ),
        "one scale a column; each output channel is a row, so take dim=1": (
            quantised(scale=lambda weight, top: sizes(weight, dim=0) / top)
        ),
        "one scale for all: the row with the largest weights spoils every other row": (
            quantised(scale=lambda weight, top: weight.abs().max() / top)
        ),
        "the scales are upside down": quantised(kept=lambda n, s: (n, 1 / s)),
        "a row's largest weight can be negative; take the scale from weight.abs()": (
            quantised(
                scale=lambda weight, top: weight.amax(dim=1, keepdim=True).clamp_min(1e-9) / top
            )
        ),
        "an entry is off by a whole step, as torch.int8 cuts off; round first": (
            quantised(convert=lambda multiples: multiples.to(torch.int8))
        ),
        "top is one less; the largest wraps round": quantised(top=lambda n: 2 ** (n - 1)),
        "the integers are those of 8 bits, whatever bits says": quantised(top=lambda n: 127),
        "a row of zeros gives 0 / 0; a scale must be positive there too": (
            quantised(scale=lambda weight, top: weight.abs().amax(dim=1, keepdim=True) / top)
        ),
    },
    observe=observe_quantise,
)

conclude_quantise = Choice("07 conclude_quantise")
