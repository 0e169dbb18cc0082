"""The transfer task."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from lora_lib.injection import add_lora_to_model, freeze_non_lora_params


class LowRank(nn.Module):
    """A right layer; the wrong ones differ from it in one thing."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / math.sqrt(linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x):
        return self.frozen(x) + self.path(x)

    def frozen(self, x):
        return self.linear(x)

    def path(self, x):
        return self.scaling * (x @ self.A.T) @ self.B.T


def putting(layer_class, matches=lambda path, names: path.split(".")[-1] in names, head=True):
    def answer(model, names, rank, alpha):
        model.requires_grad_(False)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and matches(path, names):
                model.set_submodule(path, layer_class(module, rank, alpha))
        model.head.requires_grad_(head)
        return model

    return answer


class Added(nn.Module):
    def __init__(self, shape, rank, alpha):
        super().__init__()
        self.down = nn.Parameter(torch.randn(shape[1], rank))
        self.up = nn.Parameter(torch.zeros(rank, shape[0]))
        self.scaling = alpha / rank

    def forward(self, weight):
        return weight + self.scaling * (self.down @ self.up).T


def by_parametrization(model, names, rank, alpha):
    """Another way, with the factors transposed."""
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    for block in model.blocks:
        for name in names:
            layer = getattr(block, name)
            added = Added(layer.weight.shape, rank, alpha)
            parametrize.register_parametrization(layer, "weight", added)
    return model


def by_the_library(model, names, rank, alpha):
    add_lora_to_model(model, rank, alpha, names, modules_to_save=("head",))
    freeze_non_lora_params(model)
    return model


class BothZero(LowRank):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.zeros_(self.A)


class BothRandom(LowRank):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.B)


class Unscaled(LowRank):
    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, rank)


class NotDivided(LowRank):
    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, rank * alpha)


class NoGradient(LowRank):
    def frozen(self, x):
        with torch.no_grad():
            return self.linear(x)


class Detached(LowRank):
    def frozen(self, x):
        return self.linear(x.detach())


class OneMore(LowRank):
    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank + 1, alpha)


class Unfrozen(LowRank):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.linear.requires_grad_(True)


class OfTheOutput(LowRank):
    def path(self, x):
        return torch.tanh(super().path(x))


class DetachedPath(LowRank):
    def path(self, x):
        return super().path(x.detach())


class PathAlone(LowRank):
    def frozen(self, x):
        return 0


def base_trains(model, names, rank, alpha):
    return putting(LowRank)(model, names, rank, alpha).requires_grad_(True)


def norms_train(model, names, rank, alpha):
    model = putting(LowRank)(model, names, rank, alpha)
    model.norm.requires_grad_(True)
    return model


def nothing_returned(model, names, rank, alpha):
    putting(LowRank)(model, names, rank, alpha)


class Functional(nn.Module):
    """Another right layer."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", linear.bias.detach())
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.down = nn.Parameter(torch.rand(rank, linear.in_features) - 0.5)
        self.factor = alpha / rank

    def forward(self, x):
        return F.linear(x, self.weight + self.factor * self.up @ self.down, self.bias)


RIGHT = {
    "put_lora": [putting(LowRank), putting(Functional), by_parametrization, by_the_library],
    "repaired": [LowRank, Functional],
}

WRONG = {
    "put_lora": {
        "the head is new and random, and here it is frozen": putting(LowRank, head=False),
        "a whole weight trains": base_trains,
        "norm.weight trains": norms_train,
        "no factor gets a gradient at the start": putting(BothZero),
        "the change has to start at zero": putting(BothRandom),
        "the scaling is left out": putting(Unscaled),
        "alpha is not divided by the rank": putting(NotDivided),
        "pass gradients on to the layers before it": putting(NoGradient),
        "two factors of rank": putting(OneMore),
        "is no multiple of the factors' product": putting(OfTheOutput),
        "which was named": putting(LowRank, lambda path, names: path.startswith("blocks.0")),
        "though it is neither a factor nor the head": putting(
            LowRank, lambda path, names: path.startswith("blocks")
        ),
        "return the model; your function returned NoneType": nothing_returned,
    },
    "repaired": {
        "the bug is still there": NoGradient,
        "the frozen weight must stay frozen": Unfrozen,
        "no longer starts at its base": BothRandom,
        "the output is no longer": Unscaled,
    },
}
