"""The layer, what of it trains, and what a merged model may do."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import fill, small, with_lora
from torch import nn

from lora_lib import (
    LoRALinear,
    add_lora_to_model,
    count_parameters,
    freeze_non_lora_params,
    merge_lora_weights,
    unmerge_lora_weights,
)


@pytest.fixture
def x():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


# --- the layer -----------------------------------------------------------------------------------


def test_A_receives_no_gradient_on_the_very_first_step_and_W_never(x):
    layer = LoRALinear(nn.Linear(12, 7))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    assert layer.lora_B.grad.any() and not layer.lora_A.grad.any()
    optimizer.step()
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.any()
    assert layer.original.weight.grad is layer.original.bias.grad is None


def test_weight_is_that_which_the_layer_computes_with_and_bias_the_originals(x):
    layer = fill(LoRALinear(nn.Linear(12, 7)))
    assert torch.equal(layer(input=x), layer(x))
    torch.testing.assert_close(layer.weight, layer.original.weight + layer.delta_weight())
    assert torch.equal(layer.weight, layer.merged_weight())
    layer.eval().merge()
    assert layer.weight is layer.original.weight and layer.bias is layer.original.bias
    assert torch.equal(layer(x), layer.original(x))
    assert LoRALinear(nn.Linear(12, 7, bias=False)).bias is None


def test_numbers_of_other_libraries_become_pythons():
    layer = LoRALinear(nn.Linear(12, 7), np.int64(4), Fraction(12), np.float32(0.5))
    assert (type(layer.rank), type(layer.alpha), type(layer.dropout.p)) == (int, float, float)
    assert layer.scaling == 3.0


# --- injection and freezing ----------------------------------------------------------------------


def test_layers_are_in_the_mode_of_the_layer_they_replace():
    model = tiny_models.nested().train()
    model.parts["deep"].eval()
    _, layers = add_lora_to_model(model, target_modules="all-linear", dropout=0.1)
    assert [layer.training for layer in layers] == [True, False]
    assert [layer.dropout.training for layer in layers] == [True, False]


def test_after_freezing_exactly_the_factors_and_what_is_saved_whole_train():
    """By PEFT's rule a name in modules_to_save is an end, dot or not."""
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("x", "y", "head", "subhead")})
    add_lora_to_model(model, target_modules=["x", "y"], modules_to_save=["head"])
    model.requires_grad_(True)
    freeze_non_lora_params(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        *("x.lora_A", "x.lora_B", "y.lora_A", "y.lora_B"),
        *("head.weight", "head.bias", "subhead.weight", "subhead.bias"),
    }


def test_a_tied_parameter_is_counted_once():
    model = small()
    before = count_parameters(model)
    model.classifier = nn.Linear(24, 20, bias=False)
    model.classifier.weight = model.token_embedding.weight
    assert count_parameters(model) == before - (24 * 3 + 3)


# --- merging -------------------------------------------------------------------------------------


@pytest.fixture
def adapted():
    return with_lora(small(), "all-linear")


def test_a_merged_layer_may_run_in_training_mode_without_gradients(adapted, ids):
    assert merge_lora_weights(adapted) is adapted
    with torch.no_grad():
        assert adapted.train()(ids).isfinite().all()
    assert unmerge_lora_weights(adapted) is adapted
    adapted(ids)


def test_a_merged_state_dict_does_not_load_into_an_unmerged_model(adapted):
    unmerged = copy.deepcopy(adapted)
    state = merge_lora_weights(adapted).state_dict()
    with pytest.raises(RuntimeError, match="_weight_before_merge"):
        unmerged.load_state_dict(state)
    merged = merge_lora_weights(copy.deepcopy(unmerge_lora_weights(unmerged)))
    merged.load_state_dict(state)
