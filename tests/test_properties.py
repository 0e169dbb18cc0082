"""What holds for every shape, rank, scaling and dtype: checked on many drawn at random."""

import copy
import tempfile
from itertools import pairwise

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import same
from torch import nn

from lora_lib.adapters import load_adapter, save_adapter
from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
    unmerge_lora_weights,
)
from lora_lib.lora import LoRALinear, count_parameters, lora_layers

settings.register_profile(
    "quick",
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples every time: a failure can be seen again
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("quick")

WIDTHS = st.integers(1, 24)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
LAYER = dict(
    rank=st.integers(1, 30),
    alpha=st.floats(0.01, 100),
    dropout=st.sampled_from([0.0, 0.3]),
    use_rslora=st.booleans(),
)


@st.composite
def models(draw, dtypes=DTYPES):
    """A chain of linear layers, with others between them, nested at random."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    widths = draw(st.lists(WIDTHS, min_size=2, max_size=5))
    modules = []
    for d_in, d_out in pairwise(widths):
        linear = nn.Linear(d_in, d_out, bias=draw(st.booleans()))
        beside = draw(st.sampled_from([nn.Tanh, nn.Identity, lambda d=d_out: nn.LayerNorm(d)]))()
        modules += [nn.Sequential(linear, beside)] if draw(st.booleans()) else [linear, beside]
    model = nn.Sequential(*modules).to(draw(dtypes)).eval()
    return model.requires_grad_(draw(st.booleans()))


def width(model):
    return next(m.in_features for m in model.modules() if isinstance(m, nn.Linear | LoRALinear))


def inputs(model, rows=3):
    return torch.randn(rows, width(model)).to(next(model.parameters()).dtype)


def fill(model, size=0.3):
    """As training would: no factor stays zero."""
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_A.normal_(std=size)
            layer.lora_B.normal_(std=size)
    return model


def state(model):
    return copy.deepcopy(model.state_dict())


@given(models(), st.fixed_dictionaries(LAYER))
def test_a_new_adapter_changes_nothing(model, layer):
    x = inputs(model)
    before = model(x)
    add_lora_to_model(model, target_modules="all-linear", **layer)
    assert torch.equal(model.train()(x), before)
    assert torch.equal(model.eval()(x), before)


@given(models(st.just(torch.float64)), st.fixed_dictionaries(LAYER))
def test_merged_and_unmerged_compute_the_same(model, layer):
    x = inputs(model)
    fill(add_lora_to_model(model, target_modules="all-linear", **layer)[0])
    unmerged = model(x)
    assert not torch.equal(next(lora_layers(model))(x), next(lora_layers(model)).original(x))
    for fold in (merge_lora_weights, unload_lora):
        torch.testing.assert_close(fold(model)(x), unmerged, rtol=1e-8, atol=1e-8)


@given(models(), st.fixed_dictionaries(LAYER))
def test_the_change_has_rank_at_most_r_and_is_s_B_A(model, layer):
    fill(add_lora_to_model(model, target_modules="all-linear", **layer)[0])
    for m in lora_layers(model):
        s = layer["alpha"] / (layer["rank"] ** 0.5 if layer["use_rslora"] else layer["rank"])
        change = m.delta_weight().double()
        torch.testing.assert_close(
            change, s * m.lora_B.double() @ m.lora_A.double(), rtol=1e-4, atol=1e-4 * s
        )
        singular = torch.linalg.svdvals(change)
        assert (singular > 1e-5 * singular[0]).sum() <= layer["rank"]


@given(models(), st.fixed_dictionaries(LAYER), st.integers(1, 3))
def test_unmerging_restores_every_bit(model, layer, cycles):
    fill(add_lora_to_model(model, target_modules="all-linear", **layer)[0])
    before = state(model)
    for _ in range(cycles):
        merge_lora_weights(merge_lora_weights(model))
        assert not same(model.state_dict(), before)
        unmerge_lora_weights(model)
    assert same(model.state_dict(), before)


@given(models(), st.fixed_dictionaries(LAYER), st.booleans())
def test_unloading_without_merging_restores_every_bit_and_flag(model, layer, merged):
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    fill(add_lora_to_model(model, target_modules="all-linear", **layer)[0])
    freeze_non_lora_params(model)
    if merged:
        merge_lora_weights(model)
    unload_lora(model, merge=False)
    assert same(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == flags


@given(models(), st.fixed_dictionaries(LAYER))
def test_a_merge_is_the_sum_rounded_once(model, layer):
    fill(add_lora_to_model(model, target_modules="all-linear", **layer)[0])
    assume(all(torch.isfinite(m.merged_weight()).all() for m in lora_layers(model)))
    for m in lora_layers(model):
        W, A, B = (t.double() for t in (m.original.weight, m.lora_A, m.lora_B))
        size = W.abs() + m.scaling * B.abs() @ A.abs()  # what may be lost while adding
        eps = torch.finfo(m.original.weight.dtype).eps
        tiny = torch.finfo(m.original.weight.dtype).tiny
        error = (m.merged_weight().double() - (W + m.scaling * B @ A)).abs()
        assert (error <= 3e-7 * size + 0.5 * eps * m.merged_weight().abs().clamp(min=tiny)).all()


@given(models(), st.fixed_dictionaries(LAYER))
def test_counts_are_r_times_the_sum_of_the_widths(model, layer):
    before = count_parameters(model)
    shapes = [m.weight.shape for m in model.modules() if isinstance(m, nn.Linear)]
    _, layers = add_lora_to_model(model, target_modules="all-linear", **layer)
    freeze_non_lora_params(model)
    added = sum(layer["rank"] * (d_out + d_in) for d_out, d_in in shapes)
    assert count_parameters(model, only_trainable=True) == added
    assert count_parameters(model) == before + added
    assert sum(m.num_trainable_params for m in layers) == added


@given(models(), st.fixed_dictionaries(LAYER), st.booleans())
def test_saving_and_loading_gives_back_every_bit(model, layer, merged):
    x, fresh = inputs(model), copy.deepcopy(model)
    fill(add_lora_to_model(model, target_modules="all-linear", **layer)[0])
    output, before = model(x), state(model)
    if merged:
        merge_lora_weights(model)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_adapter(fresh, save_adapter(model, folder))
    assert same(loaded.state_dict(), before)
    assert torch.equal(loaded.eval()(x), output)


@given(models(), st.fixed_dictionaries(LAYER), st.lists(st.integers(0, 2), max_size=6))
def test_swapping_adapters_in_any_order_gives_what_each_gives_alone(model, layer, order):
    x, plain = inputs(model), state(model)
    outputs, base = [], model(x)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            one = add_lora_to_model(copy.deepcopy(model), target_modules="all-linear", **layer)[0]
            outputs.append(fill(one).eval()(x))
            save_adapter(one, f"{folder}/{number}")
        for number in order:
            load_adapter(model, f"{folder}/{number}")
            assert torch.equal(model(x), outputs[number])
    if order:
        unload_lora(model, merge=False)
    assert same(model.state_dict(), plain)
    assert torch.equal(model(x), base)
