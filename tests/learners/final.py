"""Notebook 07."""

import copy
import math

import torch
from torch import nn

from lora_lib.adapters import load_adapter
from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
)
from lora_lib.lora import LoRALinear, count_parameters, lora_layers
from lora_lib.model import SmallTransformer
from lora_lib.pretrained import load_pretrained, read_metadata
from lora_lib.rank import effective_rank, k90, singular_values, weight_changes

# --- 1: targets ----------------------------------------------------------------------------------


def lora_on(names, rank):
    model, _ = load_pretrained()
    add_lora_to_model(model, rank, 2.0 * rank, names)
    freeze_non_lora_params(model)
    return model, count_parameters(model, only_trainable=True)


def lora_on_by_hand(names, rank):
    model = load_pretrained()[0].requires_grad_(False)
    count = 0
    for path, module in list(model.named_modules()):
        if path.endswith(tuple(names)):
            model.set_submodule(path, LoRALinear(module, rank=rank, alpha=2 * rank))
            count += rank * (module.in_features + module.out_features)
    return model, count


def _default_targets(names, rank):
    model, _ = add_lora_to_model(load_pretrained()[0], rank, 2.0 * rank)
    freeze_non_lora_params(model)
    return model, count_parameters(model, only_trainable=True)


def _not_frozen(names, rank):
    model, _ = add_lora_to_model(load_pretrained()[0], rank, 2.0 * rank, names)
    return model, count_parameters(model, only_trainable=True)


def _alpha_stays(names, rank):
    model, _ = add_lora_to_model(load_pretrained()[0], rank, 16.0, names)
    freeze_non_lora_params(model)
    return model, count_parameters(model, only_trainable=True)


def _counts_all(names, rank):
    model, _ = lora_on(names, rank)
    return model, count_parameters(model)


def _counts_something(names, rank):
    return lora_on(names, rank)[0], rank * 128 * 128


def _fixed_rank(names, rank):
    return lora_on(names, 8)


def _model_only(names, rank):
    return lora_on(names, rank)[0]


def _frozen_factors(names, rank):
    model, count = lora_on(names, rank)
    return model.requires_grad_(False), count


def _untrained_base(names, rank):
    model = SmallTransformer(**read_metadata()["config"])
    add_lora_to_model(model, rank, 2.0 * rank, names)
    freeze_non_lora_params(model)
    return model, count_parameters(model, only_trainable=True)


def _no_lora(names, rank):
    return load_pretrained()[0], 0


def _one_model():
    model, _ = load_pretrained()

    def lora_on_it(names, rank):
        add_lora_to_model(model, rank, 2.0 * rank, names)
        freeze_non_lora_params(model)
        return model, count_parameters(model, only_trainable=True)

    return lora_on_it


# --- 2: budget -----------------------------------------------------------------------------------


def _named(model, names):
    return [
        m
        for p, m in model.named_modules()
        if isinstance(m, nn.Linear) and p.rpartition(".")[2] in names
    ]


def rank_for_budget(model, names, budget):
    rank = budget // sum(sum(m.weight.shape) for m in _named(model, names))
    if rank == 0:
        raise ValueError("too small")
    return rank


def rank_by_trying(model, names, budget):
    rank = 0
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.split(".")[-1] in names
    ]
    while True:
        trial, _ = add_lora_to_model(copy.deepcopy(model), rank + 1, 1.0, paths)
        freeze_non_lora_params(trial)
        if count_parameters(trial, only_trainable=True) > budget:
            break
        rank += 1
    if rank < 1:
        raise ValueError("too small")
    return rank


def _rounds_up(model, names, budget):
    return math.ceil(budget / sum(sum(m.weight.shape) for m in _named(model, names)))


def _one_layer(model, names, budget):
    return budget // sum(_named(model, names)[0].weight.shape)


def _strictly_below(model, names, budget):
    return (budget - 1) // sum(sum(m.weight.shape) for m in _named(model, names))


def _injects(model, names, budget):
    add_lora_to_model(model, 1, 1.0, names)
    freeze_non_lora_params(model)
    return budget // count_parameters(model, only_trainable=True)


def _never_raises(model, names, budget):
    return budget // sum(sum(m.weight.shape) for m in _named(model, names))


def _rank_by(matches, kind=nn.Linear, cost=lambda m: m.in_features + m.out_features):
    def answer(model, names, budget):
        modules = [
            m for path, m in model.named_modules() if isinstance(m, kind) and matches(path, names)
        ]
        rank = budget // sum(map(cost, modules))
        if rank < 1:
            raise ValueError("too small")
        return rank

    return answer


def _last_piece(path, names):
    return path.split(".")[-1] in names


def _always_eight(model, names, budget):
    return 1000


# --- 3: swap -------------------------------------------------------------------------------------


def swap(model, directory):
    if any(lora_layers(model)):
        unload_lora(model, merge=False)
    return load_adapter(model, directory)


def swap_by_hand(model, directory):
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.unmerge()
            model.set_submodule(path, module.original)
    load_adapter(model, directory)
    return model


def _unload_merges(model, directory):
    if any(lora_layers(model)):
        unload_lora(model)
    return load_adapter(model, directory)


def _only_loads(model, directory):
    return load_adapter(model, directory)


def _always_unloads(model, directory):
    return load_adapter(unload_lora(model, merge=False), directory)


def _another_model(model, directory):
    model = copy.deepcopy(model)
    return swap(model, directory)


def _returns_nothing(model, directory):
    swap(model, directory)


def _merges_after(model, directory):
    return merge_lora_weights(swap(model, directory))


def _loads_nothing(model, directory):
    if any(lora_layers(model)):
        unload_lora(model, merge=False)
    return model


def _subtracts(model, directory):
    with torch.no_grad():
        for path, module in list(model.named_modules()):
            if isinstance(module, LoRALinear):
                module.unmerge()
                module.original.weight += module.delta_weight()
                module.original.weight -= module.delta_weight()
                model.set_submodule(path, module.original)
    return load_adapter(model, directory)


def _new_base(model, directory):
    return load_adapter(load_pretrained()[0], directory)


def _first_stays(model, directory):
    return model if any(lora_layers(model)) else load_adapter(model, directory)


# --- 4: ranks of a change ------------------------------------------------------------------------


def change_ranks(before, after):
    changes = weight_changes(before, after)
    return {path: k90(singular_values(change)) for path, change in changes.items() if change.any()}


def change_ranks_by_hand(before, after):
    found = {}
    for path, module in before.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        change = (after.get_submodule(path).weight - module.weight).detach()
        energy = torch.linalg.svdvals(change) ** 2
        if energy.sum() == 0:
            continue
        total = kept = 0.0
        total, count = float(energy.sum()), 0
        while kept < 0.9 * total:
            kept += float(energy[count])
            count += 1
        found[path] = count
    return found


def _by(measure):
    def answer(before, after):
        return {
            path: measure(singular_values(after.get_submodule(path).weight - m.weight))
            for path, m in before.named_modules()
            if isinstance(m, nn.Linear)
            and not torch.equal(m.weight, after.get_submodule(path).weight)
        }

    return answer


def _includes_unchanged(before, after):
    return {path: k90(singular_values(c)) for path, c in weight_changes(before, after).items()}


def _zero_for_unchanged(before, after):
    return change_ranks(before, after) | {"same": 0}


def _names_of_parameters(before, after):
    return {f"{path}.weight": k for path, k in change_ranks(before, after).items()}


def _of_after(before, after):
    linear = {path: m for path, m in after.named_modules() if isinstance(m, nn.Linear)}
    return {path: k90(singular_values(m.weight)) for path, m in linear.items()}


def _of_the_matrix(before, after):
    return {
        path: k90(change) for path, change in weight_changes(before, after).items() if change.any()
    }


def _asks_the_sum(before, after):
    changes = weight_changes(before, after)
    return {path: k90(singular_values(change)) for path, change in changes.items() if change.sum()}


def _one_number(before, after):
    return max(change_ranks(before, after).values())


def _first_only(before, after):
    return {"first": change_ranks(before, after)["first"]}


# --- 5: quantise ---------------------------------------------------------------------------------


def quantise(weight, bits):
    top = 2 ** (bits - 1) - 1
    scales = weight.abs().amax(dim=1, keepdim=True) / top
    scales[scales == 0] = 1.0
    return (weight / scales).round().to(torch.int8), scales


def quantise_row_by_row(weight, bits):
    top = 2 ** (bits - 1) - 1
    integers = torch.zeros(weight.shape, dtype=torch.int8)
    scales = torch.ones(len(weight), 1)
    for i, row in enumerate(weight):
        size = max(abs(float(row.max())), abs(float(row.min())))
        if size > 0:
            scales[i] = size / top
            integers[i] = torch.clamp(torch.floor(row / scales[i] + 0.5), -top, top).to(torch.int8)
    return integers, scales


def _with(scale, convert=lambda q: q.round().to(torch.int8)):
    def answer(weight, bits):
        scales = scale(weight, 2 ** (bits - 1) - 1)
        return convert(weight / scales), scales

    return answer


def _rows(weight, top):
    return weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-9) / top


def _inverse(weight, bits):
    scales = (2 ** (bits - 1) - 1) / weight.abs().amax(1, keepdim=True)
    return (weight * scales).round().to(torch.int8), scales


def _infinite(weight, bits):
    integers, scales = quantise(weight, bits)
    return integers, scales.masked_fill(~weight.any(1, keepdim=True), torch.inf)


def _in_place(weight, bits):
    answer = quantise(weight, bits)
    weight.copy_(answer[0] * answer[1])
    return answer


def _flat_scales(weight, bits):
    integers, scales = quantise(weight, bits)
    return integers, scales[:, 0]


def _restored_only(weight, bits):
    integers, scales = quantise(weight, bits)
    return integers * scales


RIGHT = {
    "lora_on": [lora_on, lora_on_by_hand],
    "rank_for_budget": [rank_for_budget, rank_by_trying],
    "swap": [swap, swap_by_hand],
    "change_ranks": [change_ranks, change_ranks_by_hand],
    "quantise": [quantise, quantise_row_by_row],
}

WRONG = {
    "lora_on": {
        "names was not passed on": _default_targets,
        "freeze the base": _not_frozen,
        "computed from the rank": _alpha_stays,
        "counted every parameter": _counts_all,
        "the factors hold": _counts_something,
        "pass rank on": _fixed_rank,
        "return two things": _model_only,
        "do not require a gradient": _frozen_factors,
        "does not answer as the base": _untrained_base,
        "has no LoRA layers": _no_lora,
    },
    "rank_for_budget": {
        "round down": _rounds_up,
        "counted one layer": _one_layer,
        "counts the full weights": _rank_by(_last_piece, cost=lambda m: m.weight.numel()),
        "it still fits": _strictly_below,
        "changed the model": _injects,
        "only ends like W_q": _rank_by(lambda path, names: path.endswith(names)),
        "not as name": _rank_by(lambda path, names: any(name in path for name in names)),
        "ask isinstance(module, nn.Linear)": _rank_by(_last_piece, kind=nn.Module),
        "no layer matched": _rank_by(lambda path, names: path in names),
        "must raise ValueError": _never_raises,
        "not 1000": _always_eight,
    },
    "swap": {
        "unless you say merge=False": _unload_merges,
        "take off what is there first": _only_loads,
        "nothing to take off on the first call": _always_unloads,
        "returned another model": _another_model,
        "return the model": _returns_nothing,
        "an adapter was merged into it": _merges_after,
        "not on a new base": _new_base,
        "answers as the bare base": _loads_nothing,
        "W + ΔW − ΔW is not W": _subtracts,
        "the outputs are not those": _first_stays,
    },
    "change_ranks": {
        "square the singular values": _by(lambda v: k90(v.sqrt())),
        "the question is its change": _of_after,
        "not a matrix": _of_the_matrix,
        "with a sum of zero": _asks_the_sum,
        "one too few": _by(lambda v: k90(v) - 1),
        "not zero": _by(lambda v: int((v > 1e-4 * v[0]).sum())),
        "the answer is": _by(effective_rank),
        "k90 of nothing is undefined": _includes_unchanged,
        "did not change (its bias did)": _zero_for_unchanged,
        "not names of parameters": _names_of_parameters,
        "return a dict": _one_number,
        "the changed layers are": _first_only,
    },
    "quantise": {
        "one scale for all": _with(lambda w, top: w.abs().max() / top),
        "an output channel is a row": _with(lambda w, top: w.abs().amax(0, keepdim=True) / top),
        "as trunc does: round": _with(_rows, lambda q: q.to(torch.int8)),
        "as floor does: round": _with(_rows, lambda q: q.floor().to(torch.int8)),
        "is your scale the inverse?": _inverse,
        "needs a finite, positive scale": _infinite,
        "weight.abs()?": _with(lambda w, top: w.amax(1, keepdim=True).clamp_min(1e-9) / top),
        "keepdim=True) keeps": _with(lambda w, top: w.abs().amax(1).clamp_min(1e-9) / top),
        "saves no memory": _with(_rows, torch.round),
        "should be int8": _with(_rows, lambda q: q.round().to(torch.int32)),
        "wrap round": _with(lambda w, top: _rows(w, top + 1)),
        "bits hold at most": _with(lambda w, top: _rows(w, 127)),
        "Look at the scale": _with(lambda w, top: 4 * _rows(w, top)),
        "a scale must be positive": _with(lambda w, top: w.abs().amax(1, keepdim=True) / top),
        "changed the weight": _in_place,
        "scales should have shape": _flat_scales,
        "return two tensors": _restored_only,
    },
}
