import copy
from fractions import Fraction

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import small
from torch import nn

from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
    unmerge_lora_weights,
)
from lora_lib.lora import LoRALinear, count_parameters


@pytest.fixture
def model():
    return small()


@pytest.fixture
def x():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def layer_with(set_factors, dtype=torch.float32, **settings):
    return set_factors(LoRALinear(nn.Linear(12, 7, dtype=dtype), **settings))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


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


def test_weight_is_that_which_the_layer_computes_with_and_bias_the_originals(set_factors, x):
    layer = layer_with(set_factors)
    assert torch.equal(layer(input=x), layer(x))
    torch.testing.assert_close(layer.weight, layer.original.weight + layer.delta_weight())
    assert torch.equal(layer.weight, layer.merged_weight())
    layer.eval().merge()
    assert layer.weight is layer.original.weight and layer.bias is layer.original.bias
    assert torch.equal(layer(x), layer.original(x))
    assert LoRALinear(nn.Linear(12, 7, bias=False)).bias is None


def test_printing_a_layer_shows_its_settings():
    assert "rank=4, alpha=12.0, scaling=3" in repr(LoRALinear(nn.Linear(12, 7), 4, 12.0))


@pytest.mark.parametrize(
    ("dtype", "of_the_factors"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_the_factors_are_float32_or_finer_and_the_output_is_as_the_layers(
    set_factors, x, dtype, of_the_factors
):
    layer = layer_with(set_factors, dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == of_the_factors
    assert layer(x.to(dtype)).dtype == dtype


def test_numbers_of_other_libraries_become_pythons():
    layer = LoRALinear(nn.Linear(12, 7), np.int64(4), Fraction(12), np.float32(0.5))
    assert (type(layer.rank), type(layer.alpha), type(layer.dropout.p)) == (int, float, float)
    assert layer.scaling == 3.0


# --- injection and freezing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "saved", "count"),
    [
        (["W_q"], (), 2),
        (["blocks.0.attention.W_q"], (), 1),
        (["attention.W_q", "linear1"], (), 4),
        (["classifier"], (), 1),
        (["W_q", "classifier"], ["classifier"], 2),
        ("all-linear", (), 13),
        ("all-linear", ["classifier"], 12),
        ("all-linear", ["blocks.0"], 7),
    ],
)
def test_targets_are_paths_or_their_ends_and_what_is_saved_whole_is_none(
    model, targets, saved, count
):
    _, layers = add_lora_to_model(model, target_modules=targets, modules_to_save=saved)
    assert len(layers) == count


def test_layers_are_in_the_mode_of_the_layer_they_replace():
    model = tiny_models.nested().train()
    model.parts["deep"].eval()
    _, layers = add_lora_to_model(model, target_modules="all-linear", dropout=0.1)
    assert [layer.training for layer in layers] == [True, False]
    assert [layer.dropout.training for layer in layers] == [True, False]


def test_what_is_saved_is_what_trains_and_by_pefts_rule_a_name_is_an_end():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("x", "head", "subhead")})
    add_lora_to_model(model, target_modules=["x"], modules_to_save=["head"])
    freeze_non_lora_params(model)
    assert trainable(model) == {
        *("x.lora_A", "x.lora_B", "head.weight", "head.bias", "subhead.weight", "subhead.bias")
    }


def test_after_freezing_exactly_the_factors_and_the_saved_modules_train(model):
    add_lora_to_model(model, modules_to_save=["classifier"])
    model.requires_grad_(True)
    freeze_non_lora_params(model)
    assert trainable(model) == {
        f"blocks.{i}.attention.{w}.lora_{f}" for i in (0, 1) for w in ("W_q", "W_v") for f in "AB"
    } | {"classifier.weight", "classifier.bias"}


def test_a_tied_parameter_is_counted_once(model):
    before = count_parameters(model)
    model.classifier = nn.Linear(24, 20, bias=False)
    model.classifier.weight = model.token_embedding.weight
    assert count_parameters(model) == before - (24 * 3 + 3)


# --- merging -------------------------------------------------------------------------------------


@pytest.fixture
def adapted(model, set_factors):
    """The model with LoRA everywhere, as if trained."""
    return set_factors(add_lora_to_model(model, 4, 12.0, "all-linear")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_cycles_with_changing_adapters_lose_not_one_bit(set_factors, dtype):
    layer = layer_with(set_factors, dtype, rank=4, alpha=12.0)
    before, B = layer.original.weight.clone(), layer.lora_B.detach().clone()
    subtracted = before
    for cycle in range(1000):
        layer.lora_B.data = B * (1, -2, 3)[cycle % 3]
        layer.merge()
        assert not torch.equal(layer.original.weight, before)
        layer.unmerge()
        change = layer.delta_weight().detach()
        subtracted = ((subtracted + change).to(dtype) - change).to(dtype)
    assert torch.equal(layer.original.weight, before)
    assert not torch.equal(subtracted, before)  # the other way does lose some


def test_a_merge_is_as_exact_under_autocast_or_when_the_factors_were_cast(set_factors):
    layer = layer_with(set_factors)
    expected = layer.merged_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.merged_weight(), expected)
    layer.bfloat16()
    W, A, B = layer.original.weight, layer.lora_A, layer.lora_B
    exact = (W.double() + layer.scaling * B.double() @ A.double()).bfloat16()
    assert torch.equal(layer.merged_weight(), exact)
    assert not torch.equal((W + layer.scaling * B @ A).bfloat16(), exact)  # rounded twice


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


# --- unloading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_gives_back_the_very_same_modules_and_requires_grad(model, merge):
    model.blocks[0].requires_grad_(False)
    modules = dict(model.named_modules())
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    add_lora_to_model(model, 4, 12.0, "all-linear")
    model.late = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)])
    assert unload_lora(model, merge=merge) is model
    assert [p.requires_grad for p in model.late.parameters()] == [True, True, False, False]
    del model.late
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert "_lora_injection" not in vars(model)


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_keeps_saved_modules_as_trained_or_brings_those_of_before_back(model, merge):
    before = model.classifier.bias.clone()
    add_lora_to_model(model, modules_to_save=["classifier"])
    nn.init.ones_(model.classifier.bias)
    unload_lora(model, merge=merge)
    assert torch.equal(model.classifier.bias, torch.ones(3) if merge else before)
