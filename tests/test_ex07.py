"""Notebook 07: right answers pass however they are written, and wrong ones are told what came."""

import copy
from contextlib import suppress

import pytest
import torch
from torch import nn

from lora_course.exercises import checker, ex07
from lora_lib import LoRALinear, add_lora_to_model, load_adapter, load_pretrained, unload_lora


class TinyLoRA(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(base.in_features, rank))
        self.up = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x):
        return self.base(x) + 2 * x @ self.down @ self.up


def lora_on_with_a_layer_of_its_own(names, rank):
    model = load_pretrained()[0].requires_grad_(False)
    for path, module in list(model.named_modules()):
        if path.split(".")[-1] in names:
            model.set_submodule(path, TinyLoRA(module, rank))
    return [model, sum(p.numel() for p in model.parameters() if p.requires_grad)]


def rank_by_trying(model, names, budget):
    linear = [(p, m) for p, m in model.named_modules() if type(m) is nn.Linear]
    paths = [path for path, _ in linear if path.split(".")[-1] in names]
    for rank in range(1, 400):
        _, layers = add_lora_to_model(copy.deepcopy(model), rank, 1.0, paths)
        if sum(layer.num_trainable_params for layer in layers) > budget:
            break
    if rank == 1:
        raise ValueError
    return torch.tensor(rank - 1)


def swap_by_hand(model, directory):
    for path, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.unmerge()
            model.set_submodule(path, module.original)
    return load_adapter(model, directory)


def swap_without_asking(model, directory):
    with suppress(ValueError):
        unload_lora(model, merge=False)
    return load_adapter(model, directory)


def change_ranks_by_hand(before, after):
    found = {}
    for path, module in before.named_modules():
        if isinstance(module, nn.Linear):
            energy = torch.linalg.svdvals(after.get_submodule(path).weight - module.weight) ** 2
            if energy.sum() > 0:
                found[path] = (energy.cumsum(0) < 0.9 * energy.sum()).sum() + 1
    return found


def quantise_row_by_row(weight, bits):
    top, integers = 2 ** (bits - 1) - 1, torch.zeros(weight.shape, dtype=torch.int8)
    scales = torch.ones(len(weight), 1, dtype=torch.float64)
    for i, row in enumerate(weight):
        if row.any():
            scales[i] = max(row.max(), -row.min()).item() / top
            integers[i] = torch.clamp(torch.floor(row / scales[i] + 0.5), -top, top)
    return [integers, scales]


RIGHT = [
    (ex07.lora_on, lora_on_with_a_layer_of_its_own),
    (ex07.rank_for_budget, rank_by_trying),
    (ex07.swap, swap_by_hand),
    (ex07.swap, swap_without_asking),
    (ex07.change_ranks, change_ranks_by_hand),
    (ex07.quantise, quantise_row_by_row),
]
WRONG = [
    (ex07.lora_on, lambda n, r: ex07.with_lora()(n, r)[0], "'a model and a number', and 'a model'"),
    (ex07.rank_for_budget, lambda *given: 1000, "the rank: expected "),
    (ex07.swap, lambda *given: swap_by_hand(*given) and None, "and ['None', 'None'"),
    (
        ex07.change_ranks,
        lambda *given: [change_ranks_by_hand(*given)],
        "expected 'dict', and 'list'",
    ),
    (ex07.quantise, lambda w, b: [x.numpy() for x in quantise_row_by_row(w, b)], "'ndarray and nd"),
    (ex07.quantise, lambda w, b: quantise_row_by_row(w.mul_(2), b), "changed weight, which"),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("exercise, answer", RIGHT)
def test_a_right_answer_passes_however_it_is_written(exercise, answer, seed, monkeypatch):
    monkeypatch.setattr(checker, "new_seed", lambda: seed)
    assert exercise.judge(answer) is None


@pytest.mark.parametrize("exercise, answer, words", WRONG)
def test_what_no_mistake_matches_is_told_what_came(exercise, answer, words):
    assert words in exercise.judge(answer)
