"""What holds for every shape, rank, scaling and dtype: checked on many drawn at random."""

import copy
import tempfile
from collections import OrderedDict
from itertools import pairwise

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_models import fill, same
from torch import nn

from lora_lib import (
    LoRALinear,
    adapter_disabled,
    add_lora_to_model,
    count_parameters,
    freeze_non_lora_params,
    load_adapter,
    lora_layers,
    merge_lora_weights,
    save_adapter,
    unload_lora,
    unmerge_lora_weights,
)

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
SETTINGS = st.fixed_dictionaries(
    dict(
        rank=st.integers(1, 30),
        alpha=st.floats(0.01, 100),
        dropout=st.sampled_from([0.0, 0.3]),
        use_rslora=st.booleans(),
        modules_to_save=st.sampled_from([(), ("head",)]),
    )
)


@st.composite
def models(draw, dtypes=DTYPES):
    """A chain of linear layers, with others between them, nested at random; and a head."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    widths = draw(st.lists(WIDTHS, min_size=2, max_size=4))
    modules = []
    for d_in, d_out in pairwise(widths):
        linear = nn.Linear(d_in, d_out, bias=draw(st.booleans()))
        beside = draw(st.sampled_from([nn.Tanh, nn.Identity, lambda d=d_out: nn.LayerNorm(d)]))()
        modules += [nn.Sequential(linear, beside)] if draw(st.booleans()) else [linear, beside]
    head = nn.Linear(widths[-1], draw(WIDTHS))
    model = nn.Sequential(OrderedDict(body=nn.Sequential(*modules), head=head)).to(draw(dtypes))
    for parameter in model.parameters():
        parameter.requires_grad_(draw(st.booleans()))
    return model.eval()


def inputs(model, rows=3):
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    return torch.randn(rows, first.in_features).to(first.weight.dtype)


def adapt(model, layer):
    return add_lora_to_model(model, target_modules="all-linear", **layer)[0]


def train(model, layer, by=0.3):
    """As training would: no factor stays zero, and a head that is saved whole is another."""
    fill(model, by)
    if layer["modules_to_save"]:
        model.head.weight.data += by
    return model.eval()


def state(model):
    return copy.deepcopy(model.state_dict())


@given(models(), SETTINGS)
def test_a_new_adapter_changes_nothing_and_its_factors_are_float32_or_finer(model, layer):
    x = inputs(model)
    before = model(x)
    adapt(model, layer)
    assert torch.equal(model.train()(x), before)
    assert torch.equal(model.eval()(x), before)
    finer = torch.promote_types(x.dtype, torch.float32)
    assert {f.dtype for m in lora_layers(model) for f in (m.lora_A, m.lora_B)} == {finer}


@given(models(st.just(torch.float64)), SETTINGS)
def test_merged_and_unmerged_compute_the_same(model, layer):
    x = inputs(model)
    unmerged = train(adapt(model, layer), layer)(x)
    first = next(lora_layers(model))
    assert not torch.equal(first(x), first.original(x))
    for fold in (merge_lora_weights, unload_lora):
        with torch.no_grad():  # so it may run merged in training mode, too
            merged = fold(model).train()(x)
        torch.testing.assert_close(merged, unmerged, rtol=1e-8, atol=1e-8)


@given(models(), SETTINGS, st.integers(1, 3))
def test_unmerging_restores_every_bit_whatever_was_merged_in_between(model, layer, cycles):
    weights = {path: m.weight.clone() for path, m in model.named_modules() if hasattr(m, "weight")}
    adapt(model, layer)
    for cycle in range(cycles):
        before = state(train(model, layer, by=0.1 * (1 + cycle)))
        merge_lora_weights(merge_lora_weights(model))
        assert not same(model.state_dict(), before)
        unmerge_lora_weights(model)
        assert same(model.state_dict(), before)
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            assert torch.equal(module.original.weight, weights[path])


@given(models(), SETTINGS, st.booleans(), st.booleans())
def test_unloading_gives_back_the_modules_and_flags_and_without_merging_every_bit(
    model, layer, merged, merge
):
    modules, before = dict(model.named_modules()), state(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    train(adapt(model, layer), layer)
    head = state(model.head) if layer["modules_to_save"] else None
    freeze_non_lora_params(model)
    if merged:
        merge_lora_weights(model)
    assert unload_lora(model, merge=merge) is model
    assert dict(model.named_modules()) == modules and "_lora_injection" not in vars(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert same(model.state_dict(), before) == (not merge)
    if merge and head:
        assert same(model.head.state_dict(), head)


@given(models(), SETTINGS, st.booleans(), st.booleans())
def test_a_merge_is_the_sum_rounded_once_under_autocast_and_of_cast_factors_too(
    model, layer, autocast, cast
):
    train(adapt(model, layer), layer)
    if cast:
        model.bfloat16()
    assume(all(torch.isfinite(m.merged_weight()).all() for m in lora_layers(model)))
    s = layer["alpha"] / (layer["rank"] ** 0.5 if layer["use_rslora"] else layer["rank"])
    for m in lora_layers(model):
        W, A, B = (t.double() for t in (m.original.weight, m.lora_A, m.lora_B))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total = m.merged_weight().double()
        size = W.abs() + s * B.abs() @ A.abs()  # what may be lost while adding
        of_dtype = torch.finfo(m.original.weight.dtype)
        rounding = 0.5 * of_dtype.eps * total.abs().clamp(min=of_dtype.tiny)
        assert ((total - (W + s * B @ A)).abs() <= 3e-7 * size + rounding).all()


@given(models(), SETTINGS)
def test_counts_are_r_times_the_sum_of_the_widths(model, layer):
    before, head = count_parameters(model), count_parameters(model.head)
    _, layers = add_lora_to_model(model, target_modules="all-linear", **layer)
    freeze_non_lora_params(model)
    added = sum(layer["rank"] * (m.in_features + m.out_features) for m in layers)
    saved = head if layer["modules_to_save"] else 0
    assert count_parameters(model, only_trainable=True) == added + saved
    assert count_parameters(model) == before + added
    assert sum(m.num_trainable_params for m in layers) == added


@given(models(), SETTINGS, st.booleans(), st.booleans())
def test_saving_and_loading_gives_back_every_bit_and_trains_where_asked(
    model, layer, merged, trainable
):
    x, fresh = inputs(model), copy.deepcopy(model)
    train(adapt(model, layer), layer)
    freeze_non_lora_params(model)
    output, before = model(x), state(model)
    if merged:
        merge_lora_weights(model)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_adapter(fresh, save_adapter(model, folder), trainable=trainable)
    assert loaded is fresh and same(loaded.state_dict(), before)
    torch.testing.assert_close(loaded.eval()(x), output, rtol=0, atol=0, equal_nan=True)
    assert list(map(str, lora_layers(loaded))) == list(map(str, lora_layers(model)))  # all settings
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    trains = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trains == (trained if trainable else set())


@given(models(), SETTINGS, st.lists(st.integers(0, 2), min_size=1, max_size=5), st.booleans())
def test_adapters_are_swapped_and_switched_off_without_a_trace(model, layer, order, merged):
    x, plain = inputs(model), state(model)
    outputs, base = [], model(x)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            one = train(adapt(copy.deepcopy(model), layer), layer, by=0.1 * (1 + number))
            outputs.append(one(x))
            save_adapter(one, f"{folder}/{number}")
        for number in order:
            load_adapter(model, f"{folder}/{number}")
            assert torch.equal(model(x), outputs[number])
            with adapter_disabled(model):
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), outputs[number])
    if merged:
        merge_lora_weights(model)
        after = model(x)
        with adapter_disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), after)
    unload_lora(model, merge=False)
    assert same(model.state_dict(), plain)
    assert torch.equal(model(x), base)
