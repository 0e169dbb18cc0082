"""Answers to the exercises: right ones of another make than the reference, and wrong ones that are
in no list of mistakes.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import lora_lib
from lora_course.exercises import ex02, ex07, transfer
from lora_course.tiny_lora import TinyLoRA
from lora_lib.targets import is_named

# --- right ---------------------------------------------------------------------------------------


def k90_by_search(values):
    energy = values.square().cumsum(0) / values.square().sum()
    return torch.searchsorted(energy, torch.tensor(0.9, dtype=torch.float64)) + 1


def forward_by_einsum(x, weight, A, B, alpha):
    small = torch.einsum("...i,ri->...r", x, A)
    return x @ weight.T + torch.einsum("...r,or->...o", small, B) * alpha / B.shape[1]


def initialise_as_the_library(d_out, d_in, rank):
    layer = lora_lib.LoRALinear(nn.Linear(d_in, d_out), rank)
    return layer.lora_A, layer.lora_B


def initialise_as_the_lesson(d_out, d_in, rank):
    return [nn.Parameter(0.01 * torch.randn(rank, d_in)), nn.Parameter(torch.zeros(d_out, rank))]


class TinyInFunctions(nn.Module):
    def __init__(self, original, rank=8, alpha=16.0):
        super().__init__()
        self.original, self.scaling = original, torch.tensor(alpha / rank)
        for parameter in original.parameters():
            parameter.requires_grad = False
        d_out, d_in = original.weight.shape
        self.register_parameter("lora_A", nn.Parameter(torch.empty(rank, d_in)))
        self.register_parameter("lora_B", nn.Parameter(torch.empty(d_out, rank)))
        nn.init.normal_(self.lora_A, std=0.01)
        nn.init.zeros_(self.lora_B)

    def forward(self, x):
        return F.linear(F.linear(x * self.scaling, self.lora_A), self.lora_B) + self.original(x)


def inject_by_parents(model, target, rank, alpha):
    wanted = target.split(".")
    for parent_path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            pieces = [*parent_path.split("."), name]
            if isinstance(child, nn.Linear) and pieces[-len(wanted) :] == wanted:
                setattr(parent, name, lora_lib.LoRALinear(child, rank=rank, alpha=alpha))
    return model


def inject_and_freeze(model, target, rank, alpha):
    return inject_by_parents(model.requires_grad_(False), target, rank, alpha)


def freeze_by_type(model, saved):
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if isinstance(module, TinyLoRA):
            module.lora_A.requires_grad = module.lora_B.requires_grad = True
        if is_named(path, saved):
            module.requires_grad_(True)


def step_of(make_optimizer, chosen="lora_"):
    def step(model, compute_loss, lr):
        parameters = [p for name, p in model.named_parameters() if chosen in name]
        optimizer = make_optimizer(parameters, lr)
        optimizer.zero_grad()
        compute_loss().backward()
        optimizer.step()

    return step


def step_without_backward(model, compute_loss, lr):
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    gradients = torch.autograd.grad(compute_loss(), factors)
    for parameter, gradient in zip(factors, gradients, strict=True):
        parameter.data.sub_(lr * gradient)


def merge_by_einsum(W, A, B, alpha):
    total = W.clone()
    total += torch.einsum("or,ri->oi", B, A).mul(alpha).div(B.shape[1])
    return total


def rate_by_sorting(rows):
    scored = [(r["validation"]["bits"], r["lr"]) for r in rows if r["validation"]["bits"] < 1e9]
    return np.float64(sorted(scored)[0][1])


class Adapted(nn.Module):
    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(base.in_features, rank))
        self.up = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x):
        return self.base(x) + 2 * x @ self.down @ self.up


def lora_on_with_a_layer_of_its_own(names, rank):
    model = lora_lib.load_pretrained()[0].requires_grad_(False)
    for path, module in list(model.named_modules()):
        if path.split(".")[-1] in names:
            model.set_submodule(path, Adapted(module, rank))
    return [model, sum(p.numel() for p in model.parameters() if p.requires_grad)]


def rank_by_trying(model, names, budget):
    linear = [(p, m) for p, m in model.named_modules() if type(m) is nn.Linear]
    paths = [path for path, _ in linear if path.split(".")[-1] in names]
    for rank in range(1, 400):
        _, layers = lora_lib.add_lora_to_model(copy.deepcopy(model), rank, 1.0, paths)
        if sum(layer.num_trainable_params for layer in layers) > budget:
            break
    if rank == 1:
        raise ValueError
    return torch.tensor(rank - 1)


def swap_by_hand(model, directory):
    for path, module in list(model.named_modules()):
        if isinstance(module, lora_lib.LoRALinear):
            module.unmerge()
            model.set_submodule(path, module.original)
    return lora_lib.load_adapter(model, directory)


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


class Functional(nn.Module):
    """The sum is built, and A is the factor at zero."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())
        self.up = nn.Parameter(torch.rand(linear.out_features, rank) - 0.5)
        self.down = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.factor = alpha / rank

    def forward(self, x):
        return F.linear(x, self.weight + self.factor * self.up @ self.down, self.bias)


class Added(nn.Module):
    def __init__(self, shape, rank, alpha):
        super().__init__()
        self.down = nn.Parameter(torch.randn(shape[1], rank))
        self.up = nn.Parameter(torch.zeros(rank, shape[0]))
        self.scaling = alpha / rank

    def forward(self, weight):
        return weight + self.scaling * (self.down @ self.up).T


def by_parametrization(model, names, rank, alpha):
    """The factors are transposed, and no layer is replaced."""
    for parameter in model.parameters():
        parameter.requires_grad = parameter is model.head.weight or parameter is model.head.bias
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path.split(".")[-1] in names:
            added = Added(layer.weight.shape, rank, alpha)
            parametrize.register_parametrization(layer, "weight", added)
    return model


def by_the_library(model, names, rank, alpha):
    lora_lib.add_lora_to_model(model, rank, alpha, names, modules_to_save=("head",))
    lora_lib.freeze_non_lora_params(model)
    return model


RIGHT = {
    "01 k90": [k90_by_search],
    "02 forward": [forward_by_einsum],
    "02 initialise": [initialise_as_the_library, initialise_as_the_lesson],
    "02 tiny_lora": [TinyInFunctions],
    "03 inject": [inject_by_parents, inject_and_freeze],
    "03 freeze": [freeze_by_type],
    "04 step": [step_of(torch.optim.SGD), step_without_backward],
    "05 merge": [merge_by_einsum],
    "06 lora_parameters": [lambda shapes, rank: torch.tensor(shapes).sum() * rank],
    "06 choose_rate": [rate_by_sorting],
    "07 lora_on": [lora_on_with_a_layer_of_its_own],
    "07 rank_for_budget": [rank_by_trying],
    "07 swap": [swap_by_hand],
    "07 change_ranks": [change_ranks_by_hand],
    "07 quantise": [quantise_row_by_row],
    "transfer put_lora": [transfer.put(layer=Functional), by_parametrization, by_the_library],
    "transfer repaired": [Functional],
}

# --- wrong ---------------------------------------------------------------------------------------


def forward_with_b_a(x, weight, A, B, alpha):
    return x @ weight.T + alpha / len(A) * x @ (B @ A).T


def initialise_with_whole_b(d_out, d_in, rank):
    return torch.randn(rank, d_in) / math.sqrt(d_in), torch.zeros(d_out, rank, dtype=torch.int64)


class TinyWithoutReturn(TinyLoRA):
    def forward(self, x):
        self.original(x)


class TinyOfACopy(TinyLoRA):
    def __init__(self, original, rank=8, alpha=16.0):
        super().__init__(copy.deepcopy(original), rank, alpha)


class TinyWithOtherNames(nn.Module):
    def __init__(self, original, rank=8, alpha=16.0):
        super().__init__()
        self.original = original.requires_grad_(False)
        self.A = nn.Parameter(0.01 * torch.randn(rank, original.in_features))
        self.B = nn.Parameter(torch.zeros(original.out_features, rank))


def inject_and_spoil(model, target, rank, alpha):
    model.head.weight.data += 1
    return inject_by_parents(model, target, rank, alpha)


def freeze_and_delete(model, saved):
    freeze_by_type(model, saved)
    del model.head


def step_into_new_tensors(model, compute_loss, lr):
    compute_loss().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter = parameter - lr * parameter.grad


Squashed = ex02.tiny(forward=ex02.adding(lambda W, BA, s, r: W + (s * BA).tanh()))

WRONG = [
    ("02 forward", forward_with_b_a, "a matrix as large as W"),
    ("02 initialise", initialise_with_whole_b, "expected [True, True], and [True, False] came"),
    ("02 forward", lambda x, W, *factors: ex02.forward_with()(x, W + 0, *factors), "a copy"),
    ("02 tiny_lora", TinyWithoutReturn, "the output at the start: expected"),
    ("02 tiny_lora", TinyOfACopy, "the layer it was given: expected True, and False came"),
    ("02 tiny_lora", TinyWithOtherNames, "'lora_A', 'lora_B'"),
    ("03 inject", inject_and_spoil, "the output at the start: expected 'as before', and 'moved'"),
    ("04 step", step_of(torch.optim.Adam), "as with Adam"),
    ("04 step", step_of(torch.optim.AdamW), "the first step, divided by lr: the shape (40,) is"),
    ("04 step", step_of(torch.optim.SGD, chosen=""), "what is not wrapped moved as well"),
    ("04 step", step_into_new_tensors, "no parameter moved"),
    ("03 freeze", freeze_and_delete, "names of the parameters: missing: head.bias"),
    ("06 choose_rate", lambda rows: rows.sort(key=str) or 0.1, "changed results, which it was"),
    ("07 lora_on", lambda n, r: ex07.with_lora()(n, r)[0], "a model and a number', and 'a model'"),
    ("07 swap", lambda *given: swap_by_hand(*given) and None, "and ['None', 'None'"),
    ("07 quantise", lambda w, b: [x.numpy() for x in quantise_row_by_row(w, b)], "'ndarray and nd"),
    ("transfer put_lora", lambda *given: by_the_library(*given) and None, "and 'None' came"),
    ("transfer put_lora", transfer.put(layer=Squashed), "the output once the factors are set"),
]
