"""The transfer task: its data and base, and LoRA of other makes in it."""

import re
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from lora_course.exercises import checker, transfer
from lora_lib import add_lora_to_model, freeze_non_lora_params

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def test_towns_are_letters_and_countries():
    letters, countries = transfer.load_towns(("GR", "JP"), 40)
    assert letters.shape == (80, transfer.LENGTH) and countries.bincount().tolist() == [40, 40]
    assert letters.min() == 0 and letters.max() <= len(transfer.LETTERS)
    assert letters[:, 0].min() > 0  # no empty name
    assert countries[:10].unique().numel() == 2  # shuffled


def test_the_base_knows_something_and_every_copy_is_its_own():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    base = transfer.pretrained_mixer()
    assert torch.equal(torch.rand(1), expected)
    letters, countries = transfer.load_towns(transfer.OLD, 100)
    assert (base(letters).argmax(dim=1) == countries).float().mean() > 2 / len(transfer.OLD)
    nn.init.zeros_(base.norm.weight)
    assert transfer.pretrained_mixer().norm.weight.any()


def test_it_is_solved_without_the_library():
    for path in (NOTEBOOKS / "transfer.ipynb", NOTEBOOKS / "solutions" / "transfer_solution.ipynb"):
        source = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
        imported = set(re.findall(r"^from (lora_\S*)", source, re.MULTILINE))
        assert imported <= {"lora_course.exercises", "lora_course.claims", "lora_course.tables"}
        assert "lora_lib" not in source


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
    add_lora_to_model(model, rank, alpha, names, modules_to_save=("head",))
    freeze_non_lora_params(model)
    return model


@pytest.mark.parametrize("seed", range(2))
def test_a_right_answer_passes_however_it_is_written(seed, monkeypatch):
    monkeypatch.setattr(checker, "new_seed", lambda: seed)
    for answer in (transfer.put(layer=Functional), by_parametrization, by_the_library):
        assert transfer.put_lora.judge(answer) is None, answer
    assert transfer.repaired.judge(Functional) is None


def test_what_no_mistake_matches_is_told_what_came():
    nothing = transfer.put_lora.judge(lambda *given: by_the_library(*given) and None)
    assert nothing == "what comes back: expected 'the model it was given', and 'None' came"
    tanh = transfer.low_rank(total=lambda W, BA, s, r: W + (s * BA).tanh())
    said = transfer.put_lora.judge(transfer.put(layer=tanh))
    assert "the output once the factors are set" in said
    assert "'a model', and 'a tensor' came" in transfer.repaired.judge(lambda *_: torch.ones(2))
