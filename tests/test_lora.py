import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
    unmerge_lora_weights,
)
from lora_lib.lora import LoRALinear, count_parameters, lora_layers
from lora_lib.model import SmallTransformer


@pytest.fixture
def model():
    """A classifier of 24-wide layers, without dropout."""
    torch.manual_seed(0)
    return SmallTransformer(20, 24, 2, 2, num_classes=3, max_len=8, dropout=0.0).eval()


@pytest.fixture
def ids():
    return torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def layer_with(set_factors, dtype=torch.float32, **settings):
    layer = LoRALinear(nn.Linear(12, 7, dtype=dtype), **settings)
    return set_factors(layer)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# --- the layer -----------------------------------------------------------------------------------


def test_a_768_wide_layer_of_rank_8_trains_12288_parameters_instead_of_589824():
    original = nn.Linear(768, 768, bias=False)
    layer = LoRALinear(original, rank=8, alpha=16.0)
    assert original.weight.numel() == 589_824
    assert layer.num_trainable_params == 12_288
    assert layer.num_total_params == 589_824 + 12_288
    assert f"{1 - 12_288 / 589_824:.2%}" == "97.92%"


@pytest.mark.parametrize("bias", [True, False])
def test_a_new_layer_changes_the_output_by_exactly_nothing(bias):
    original, x = nn.Linear(768, 768, bias=bias), torch.randn(3, 768)
    before = original(x)
    assert (LoRALinear(original)(x) - before).abs().max() == 0


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        (dict(rank=4, alpha=12.0), 3.0),
        (dict(rank=8, alpha=2.0), 0.25),
        (dict(rank=4, alpha=12.0, use_rslora=True), 6.0),
        (dict(rank=2, alpha=3, use_rslora=True), 3 / math.sqrt(2)),
    ],
)
def test_the_output_is_that_of_W_plus_s_B_A(set_factors, x, settings, scaling):
    layer = layer_with(set_factors, **settings)
    change = scaling * layer.lora_B @ layer.lora_A
    assert layer.scaling == pytest.approx(scaling)
    torch.testing.assert_close(layer.delta_weight(), change)
    expected = F.linear(x, layer.original.weight + change, layer.original.bias)
    torch.testing.assert_close(layer(x), expected)
    assert (layer(x) - layer.original(x)).abs().max() > 0.01


def test_leading_dimensions_of_the_input_are_kept(set_factors, x):
    layer = layer_with(set_factors)
    torch.testing.assert_close(layer(x.view(1, 5, 12))[0], layer(x))
    torch.testing.assert_close(layer(x[2]), layer(x)[2])


def test_A_starts_uniform_within_one_over_the_root_of_d_in_and_B_zero():
    layer = LoRALinear(nn.Linear(400, 10), rank=16)
    assert not layer.lora_B.any()
    assert 0.95 / 20 < layer.lora_A.abs().max() <= 1 / 20
    assert layer.lora_A.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


def test_A_receives_no_gradient_on_the_very_first_step(x):
    layer = LoRALinear(nn.Linear(12, 7))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().sum().backward()
    assert not layer.lora_A.grad.any()
    assert layer.lora_B.grad.any()
    optimizer.step()
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.any()


def test_with_both_factors_zero_training_is_stuck_for_ever(x):
    layer = LoRALinear(nn.Linear(12, 7))
    nn.init.zeros_(layer.lora_A)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):
        layer(x).square().sum().backward()
        optimizer.step()
    assert not layer.lora_A.any()
    assert not layer.lora_B.any()


def test_the_gradients_are_those_of_the_explicit_product(set_factors, x):
    layer = layer_with(set_factors, rank=4, alpha=12.0)
    factors = (layer.lora_A, layer.lora_B)
    explicit = F.linear(x, layer.original.weight + 3.0 * layer.lora_B @ layer.lora_A, layer.bias)
    expected = torch.autograd.grad(explicit.square().sum(), factors)
    torch.testing.assert_close(torch.autograd.grad(layer(x).square().sum(), factors), expected)


def test_the_wrapped_layer_is_frozen_and_gets_no_gradient(x):
    layer = LoRALinear(nn.Linear(12, 7))
    layer(x).sum().backward()
    assert trainable(layer) == {"lora_A", "lora_B"}
    assert layer.original.weight.grad is layer.original.bias.grad is None


def test_the_input_gets_the_gradient_of_both_paths(set_factors, x):
    layer = layer_with(set_factors)
    (gradient,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
    total = layer.original.weight + layer.delta_weight()
    torch.testing.assert_close(gradient, total.sum(dim=0).expand(5, 12))


def test_dropout_acts_on_the_low_rank_path_only_and_in_training_only(set_factors, x):
    layer = layer_with(set_factors, dropout=0.5)
    without = layer_with(set_factors)
    without.original.load_state_dict(layer.original.state_dict())
    assert torch.equal(layer.eval()(x), without(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.original(x))


def test_dropout_leaves_the_expected_output_unchanged(set_factors, x):
    torch.manual_seed(0)
    layer = layer_with(set_factors, dropout=0.3).eval()
    expected = layer(x)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(2000)]).mean(dim=0)
    torch.testing.assert_close(mean, expected, atol=0.02, rtol=0)


def test_weight_is_that_which_the_layer_computes_with_and_bias_the_originals(set_factors, x):
    layer = layer_with(set_factors)
    total = layer.original.weight + layer.delta_weight()
    torch.testing.assert_close(layer.weight, total)
    for weight in (layer.weight, total):
        gradients = torch.autograd.grad(weight.square().sum(), (layer.lora_A, layer.lora_B))
        assert all(g.any() for g in gradients)
    assert torch.equal(layer.weight, layer.merged_weight())
    layer.eval().merge()
    assert layer.weight is layer.original.weight and layer.bias is layer.original.bias
    assert LoRALinear(nn.Linear(12, 7, bias=False)).bias is None


def test_printing_a_layer_shows_its_settings():
    assert "rank=4, alpha=12.0, scaling=3" in repr(LoRALinear(nn.Linear(12, 7), 4, 12.0))


def test_the_factors_of_a_bfloat16_layer_are_float32_and_the_output_is_bfloat16(set_factors, x):
    layer = layer_with(set_factors, torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_the_factors_of_a_float64_layer_are_float64(set_factors, x):
    layer = layer_with(set_factors, torch.float64)
    assert layer.lora_A.dtype == layer(x.double()).dtype == torch.float64


def test_a_layer_copies_deeply(set_factors, x):
    layer = layer_with(set_factors)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    twin.merge()
    assert not layer.merged


# --- injection -----------------------------------------------------------------------------------


def test_the_lessons_model_gets_8_layers_and_32768_parameters():
    model, layers = add_lora_to_model(SmallTransformer(1000, 256, 4, 4, 2))
    freeze_non_lora_params(model)
    assert len(layers) == 8
    assert count_parameters(model) == 3_477_506
    assert count_parameters(model, only_trainable=True) == 32_768


def test_injection_is_in_place_and_changes_no_output(model, ids):
    before = model(ids)
    same, layers = add_lora_to_model(model, target_modules="all-linear")
    assert same is model
    assert layers == list(lora_layers(model))
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["W_q"], 2),
        (["blocks.0.attention.W_q"], 1),
        (["attention.W_q", "linear1"], 4),
        (["classifier"], 1),
        ("all-linear", 13),
    ],
)
def test_targets_are_paths_or_their_ends_after_a_dot(model, targets, count):
    _, layers = add_lora_to_model(model, target_modules=targets)
    assert len(layers) == count


def test_a_target_does_not_match_a_part_of_a_name():
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "subhead": nn.Linear(2, 2)})
    add_lora_to_model(model, target_modules=["head"])
    assert type(model["head"]) is LoRALinear
    assert type(model["subhead"]) is nn.Linear


def test_all_linear_leaves_out_the_modules_to_save():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2))})
    add_lora_to_model(model, target_modules="all-linear", modules_to_save=["head"])
    assert type(model["body"]) is LoRALinear
    assert type(model["head"][0]) is nn.Linear


def test_it_works_on_any_module(x):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(1, 3, 1)
            self.out = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            return self.out(self.conv(x[:, None]).mean(dim=1))

    net = Net()
    before = net(x)
    add_lora_to_model(net, target_modules=["out.0", "2"])
    assert [type(module) for module in net.out] == [LoRALinear, nn.ReLU, LoRALinear]
    assert torch.equal(net(x), before)


def test_the_settings_reach_every_layer(model):
    add_lora_to_model(model, 4, 12, ["W_q"], dropout=0.2, use_rslora=True)
    assert {(m.rank, m.alpha, m.scaling, m.dropout.p) for m in lora_layers(model)} == {
        (4, 12, 6.0, 0.2)
    }


@pytest.mark.parametrize("training", [True, False])
def test_new_layers_are_in_the_mode_of_the_model(model, training):
    model.train(training)
    _, layers = add_lora_to_model(model, dropout=0.1)
    assert {module.training for layer in layers for module in layer.modules()} == {training}


def test_what_is_saved_whole_is_not_adapted_as_well(model, refuses):
    with refuses(model, ValueError, "('classifier',)", "nothing outside modules_to_save"):
        add_lora_to_model(model, target_modules=["classifier"], modules_to_save=["classifier"])
    add_lora_to_model(model, target_modules=["W_q", "classifier"], modules_to_save=["classifier"])
    assert type(model.classifier) is nn.Linear


def test_what_is_saved_is_what_trains_and_by_pefts_rule_a_name_is_an_end():
    model = nn.ModuleDict(
        {"x": nn.Linear(2, 2), "head": nn.Linear(2, 2), "subhead": nn.Linear(2, 2)}
    )
    add_lora_to_model(model, target_modules=["x"], modules_to_save=["head"])
    freeze_non_lora_params(model)
    assert trainable(model) == {
        *("x.lora_A", "x.lora_B", "head.weight", "head.bias", "subhead.weight", "subhead.bias")
    }


# --- freezing and counting -----------------------------------------------------------------------


def test_after_freezing_exactly_the_factors_and_the_saved_modules_train(model):
    add_lora_to_model(model, modules_to_save=["classifier"])
    model.requires_grad_(True)
    freeze_non_lora_params(model)
    assert trainable(model) == {
        f"blocks.{i}.attention.{w}.lora_{f}" for i in (0, 1) for w in ("W_q", "W_v") for f in "AB"
    } | {"classifier.weight", "classifier.bias"}


def test_a_tied_parameter_is_counted_once(model):
    before = count_parameters(model)
    model.position_embedding.weight = nn.Parameter(model.token_embedding.weight[:8].clone())
    assert count_parameters(model) == before
    model.classifier = nn.Linear(24, 20, bias=False)
    model.classifier.weight = model.token_embedding.weight
    assert count_parameters(model) == before - (24 * 3 + 3)


def test_only_trainable_parameters_are_counted_when_asked(model):
    model.requires_grad_(False).classifier.requires_grad_()
    assert count_parameters(model, only_trainable=True) == 24 * 3 + 3


# --- merging -------------------------------------------------------------------------------------


@pytest.fixture
def adapted(model, set_factors):
    """The model with LoRA everywhere, as if trained."""
    model.classifier.requires_grad_(False)
    return set_factors(add_lora_to_model(model, 4, 12.0, "all-linear")[0])


def test_a_merged_model_gives_the_same_outputs(adapted, model, ids):
    before = adapted(ids)
    assert merge_lora_weights(adapted) is adapted
    assert all(layer.merged for layer in lora_layers(adapted))
    torch.testing.assert_close(adapted(ids), before, atol=5e-6, rtol=0)


def test_a_merged_layer_computes_only_its_original(set_factors, x):
    layer = layer_with(set_factors)
    layer.eval().merge()
    assert torch.equal(layer(x), layer.original(x))


def test_merging_twice_adds_the_change_once(adapted):
    merge_lora_weights(adapted)
    weights = [layer.weight.clone() for layer in lora_layers(adapted)]
    merge_lora_weights(adapted)
    assert all(
        torch.equal(layer.weight, w) for layer, w in zip(lora_layers(adapted), weights, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_and_unmerging_gives_back_every_bit(model, set_factors, ids, dtype):
    model.to(dtype)
    set_factors(add_lora_to_model(model, 4, 12.0, "all-linear")[0])
    before, outputs = copy.deepcopy(model.state_dict()), model(ids)
    for _ in range(3):
        merge_lora_weights(model)
        assert not torch.equal(model.classifier.weight, before["classifier.original.weight"])
        assert unmerge_lora_weights(model) is model
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(ids), outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_cycles_with_changing_adapters_lose_not_one_bit(set_factors, dtype):
    model = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 3)).to(dtype)
    set_factors(add_lora_to_model(model, 4, 12.0, "all-linear")[0])
    before = copy.deepcopy(model.state_dict())
    adapters = [[f * scale for f in (m.lora_A, m.lora_B)] for scale in (1, -2, 3)
                for m in lora_layers(model)]  # fmt: skip
    subtracted = model[0].original.weight.clone()
    for cycle in range(1000):
        layer, (A, B) = model[cycle % 2], adapters[cycle % 6]
        layer.lora_A.data, layer.lora_B.data = A.data, B.data
        merge_lora_weights(model)
        unmerge_lora_weights(model)
        if layer is model[0]:
            change = layer.delta_weight().detach()
            subtracted = ((subtracted + change).to(dtype) - change).to(dtype)
    assert torch.equal(model[0].original.weight, before["0.original.weight"])
    assert torch.equal(model[1].original.weight, before["1.original.weight"])
    assert not torch.equal(subtracted, before["0.original.weight"])  # the other way does lose some


def test_a_bfloat16_merge_rounds_only_once(set_factors):
    layer = layer_with(set_factors, torch.bfloat16)
    expected = (layer.original.weight.float() + layer.delta_weight()).bfloat16()
    assert torch.equal(layer.merged_weight(), expected)
    assert not torch.equal(layer.original.weight + layer.delta_weight().bfloat16(), expected)


def test_a_merge_is_as_exact_under_autocast_or_when_the_factors_were_cast(set_factors):
    layer = layer_with(set_factors, torch.float32)
    expected = layer.merged_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.merged_weight(), expected)
    layer.bfloat16()
    exact = (
        layer.original.weight.double()
        + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    )
    rounded_twice = (layer.original.weight + layer.scaling * layer.lora_B @ layer.lora_A).bfloat16()
    assert torch.equal(layer.merged_weight(), exact.bfloat16())
    assert not torch.equal(rounded_twice, exact.bfloat16())


def test_numbers_of_other_libraries_become_pythons(x):
    layer = LoRALinear(nn.Linear(12, 7), np.int64(4), Fraction(12), np.float32(0.5))
    assert (type(layer.rank), type(layer.alpha)) == (int, float)
    assert layer.scaling == 3.0 and type(layer.dropout.p) is float
    assert layer(x).shape == (*x.shape[:-1], 7)


def test_a_merged_layer_refuses_to_train(adapted, ids):
    merge_lora_weights(adapted).train()
    with pytest.raises(RuntimeError, match=r"merged.*unmerge_lora_weights\(model\)"):
        adapted(ids)
    unmerge_lora_weights(adapted)(ids)


def test_a_merged_layer_may_run_in_training_mode_without_gradients(adapted, ids):
    merge_lora_weights(adapted).train()
    with torch.no_grad():
        assert adapted(ids).isfinite().all()


def test_a_merged_model_moves_to_another_dtype_with_the_weight_of_before(adapted, ids):
    merge_lora_weights(adapted).double()
    unmerge_lora_weights(adapted)
    assert {layer.weight.dtype for layer in lora_layers(adapted)} == {torch.float64}
    assert adapted(ids).dtype == torch.float64


def test_a_merge_that_is_not_finite_is_refused_before_any_layer_is_merged(adapted, refuses):
    *_, last = lora_layers(adapted)
    with torch.no_grad():
        last.lora_A[0, 0] = torch.inf
    with refuses(adapted, FloatingPointError, "nothing was merged", "largest entries inf"):
        merge_lora_weights(adapted)
    assert not any(layer.merged for layer in lora_layers(adapted))


def test_a_merged_state_dict_does_not_load_into_an_unmerged_model(adapted, model):
    unmerged = copy.deepcopy(adapted)
    state = merge_lora_weights(adapted).state_dict()
    with pytest.raises(RuntimeError, match="_weight_before_merge"):
        unmerged.load_state_dict(state)
    merged = merge_lora_weights(copy.deepcopy(unmerge_lora_weights(unmerged)))
    merged.load_state_dict(state)


def test_merging_a_weight_that_is_tied_is_refused(refuses, set_factors):
    model = SmallTransformer(20, 24, 2, 1, num_classes=20, language_model=True)
    model.classifier.weight = model.token_embedding.weight
    set_factors(add_lora_to_model(model, target_modules=["W_q", "classifier"])[0])
    with refuses(model, ValueError, "tied to another module", "untie"):
        merge_lora_weights(model)
    with refuses(model, ValueError, "tied to another module"):
        unload_lora(model)


# --- unloading -----------------------------------------------------------------------------------


@pytest.fixture
def plain_and_adapted(model, set_factors):
    """(the linear layers by path, requires_grad by name) of before, and the adapted model."""
    model.blocks[0].requires_grad_(False)
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    set_factors(add_lora_to_model(model, 4, 12.0, "all-linear")[0])
    freeze_non_lora_params(model)
    return linear, grads, model


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_gives_back_the_very_same_modules_and_requires_grad(plain_and_adapted, merge):
    linear, grads, model = plain_and_adapted
    assert unload_lora(model, merge=merge) is model
    assert not any(lora_layers(model))
    assert all(model.get_submodule(path) is module for path, module in linear.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert "_lora_injection" not in vars(model)


def test_unloading_keeps_what_was_learned(adapted, ids):
    before = adapted(ids)
    torch.testing.assert_close(unload_lora(adapted)(ids), before, atol=5e-6, rtol=0)


def test_unloading_a_merged_model_adds_the_change_only_once(adapted, ids):
    before = adapted(ids)
    unload_lora(merge_lora_weights(adapted))
    torch.testing.assert_close(adapted(ids), before, atol=5e-6, rtol=0)


@pytest.mark.parametrize("merged", [True, False])
def test_unloading_without_merging_gives_back_the_base_bit_for_bit(model, ids, set_factors, merged):
    outputs, state = model(ids), copy.deepcopy(model.state_dict())
    set_factors(add_lora_to_model(model, 4, 12.0, "all-linear")[0])
    if merged:
        merge_lora_weights(model)
    unload_lora(model, merge=False)
    assert torch.equal(model(ids), outputs)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("merge", [True, False])
def test_unloading_keeps_saved_modules_as_trained_or_brings_those_of_before_back(model, merge):
    before = model.classifier.bias.clone()
    add_lora_to_model(model, modules_to_save=["classifier"])
    nn.init.ones_(model.classifier.bias)
    unload_lora(model, merge=merge)
    assert torch.equal(model.classifier.bias, torch.ones(3) if merge else before)


def test_a_module_added_after_the_injection_keeps_its_requires_grad(adapted):
    adapted.late = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)])
    unload_lora(adapted)
    assert [p.requires_grad for p in adapted.late.parameters()] == [True, True, False, False]


def test_an_unloaded_model_takes_lora_anew(adapted, ids):
    before = unload_lora(adapted)(ids)
    add_lora_to_model(adapted, target_modules=["W_o"])
    assert torch.equal(adapted(ids), before)
