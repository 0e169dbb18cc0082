"""Weights in few bits: levels and bytes as bitsandbytes has them, LoRA beside them, merging, and
the recorded runs."""

from itertools import islice

import pytest
import torch
from tiny_models import with_lora
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lora_course.experiments.quantised_runs import PRECISIONS, TARGETS
from lora_course.experiments.real_runs import job_of, make_trainable
from lora_course.four_bits import (
    FORMATS,
    Format,
    Linear16,
    QuantisedLinear,
    count_bytes,
    dequantise,
    even_levels,
    in_floats,
    merged,
    normal_levels,
    quantise,
    quantise_blocks,
)
from lora_course.recorded_bits import adapted
from lora_course.results import load_table
from lora_lib.adapters import load_adapter, save_adapter
from lora_lib.injection import merge_lora_weights, unload_lora
from lora_lib.lora import LoRALinear
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained
from lora_lib.tokens import batches_by_length, pair_examples
from lora_lib.training import fit

# `get_4bit_type("nf4")` of bitsandbytes 0.50.2, which has them as constants.
# fmt: off
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
       -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
       0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
# fmt: on

# `quantize_4bit(FIXED, quant_type="nf4", blocksize=64)` of the same version: the bytes in hex.
FIXED = torch.tensor([((7 * i * i + 3 * i) % 201 - 100) / 100 for i in range(128)])
FIXED_BYTES = (
    "0014af4d4fa42100138e2b1d51fdccdf15d1b2e83100124af4d4fa41000127d1"
    "a1b40ecaabd03a080c51feee016d191c51fddde028e3e50d843347bf3c1c40da"
)
IDS = torch.arange(3, 23).view(2, 10)


def model_with_lora(form: Format | None) -> nn.Module:
    """The base, quantised, with factors that do something."""
    return with_lora(quantise_blocks(load_pretrained()[0], form), "all-linear", size=0.05)


# --- levels and bytes ----------------------------------------------------------------------------


def test_levels_go_from_minus_one_to_one_and_sixteen_are_those_of_bitsandbytes():
    torch.testing.assert_close(normal_levels(4), torch.tensor(NF4), atol=3e-7, rtol=0)
    for bits in (2, 3, 4, 8):
        for levels in (normal_levels(bits), even_levels(bits)):
            assert len(levels) == 2**bits and levels.diff().min() > 0
            assert levels[0] == -1 and levels[-1] == 1
        assert 0 in normal_levels(bits) and 0 not in even_levels(bits)


def test_bytes_are_those_of_bitsandbytes():
    packed, absmax = quantise(FIXED, 4, "normal", 64)
    assert bytes(packed.tolist()).hex() == FIXED_BYTES
    assert absmax.tolist() == [FIXED[:64].abs().max(), FIXED[64:].abs().max()]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_each_number_becomes_the_nearest_level(form):
    torch.manual_seed(0)
    values = torch.randn(7, 30)  # 210 numbers: the last block is not full
    packed, absmax = quantise(values, form.bits, form.kind, 64)
    back = dequantise(packed, absmax, form.bits, form.kind)[:210]
    levels = even_levels(form.bits) if form.kind == "even" else normal_levels(form.bits)
    possible = absmax.repeat_interleave(64)[:210, None] * levels
    best = (possible - values.flatten()[:, None]).abs().amin(dim=1)
    torch.testing.assert_close((back - values.flatten()).abs(), best)


def test_zeros_stay_zeros_and_what_is_not_finite_is_refused():
    packed, absmax = quantise(torch.zeros(64), 4, "normal", 64)
    assert not dequantise(packed, absmax, 4, "normal").any()
    with pytest.raises(ValueError, match="not finite"):
        quantise(torch.tensor([1.0, torch.inf]), 4, "normal", 64)


def test_double_quantisation_takes_4_127_bits_a_number_and_costs_next_to_nothing():
    """As the paper has it (§3): 4 + 8/64 + 32/(64 · 256)."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 1024, bias=False)
    nn.init.normal_(linear.weight)
    W, errors = linear.weight, {}
    for double in (False, True):
        layer = QuantisedLinear(linear, Format(4, "normal", 64, double))
        errors[double] = ((layer.dequantise() - W).norm() / W.norm()).item()
        bits = 8 * count_bytes(layer) / W.numel()
        mean = 32 / W.numel() if double else 0
        assert bits == pytest.approx((4 + 8 / 64 + 32 / 64 / 256 if double else 4.5) + mean)
    assert errors[True] < 1.002 * errors[False] < 0.1


# --- layers, and LoRA beside them ----------------------------------------------------------------


def test_no_weight_in_floats_is_kept_for_the_backward_pass():
    layer = QuantisedLinear(nn.Linear(256, 256, bias=False), FORMATS["NF4"])
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(2, 256, requires_grad=True)).sum().backward()
    assert sum(kept) < 256 * 256


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_lora_on_codes_is_lora_on_the_floats_they_stand_for(form):
    coded = model_with_lora(form)
    floats = in_floats(coded)
    assert not any(isinstance(m, QuantisedLinear) for m in floats.modules())
    gradients = []
    for model in (coded, floats):
        with torch.inference_mode():
            model(IDS)  # a model that was used so can be trained afterwards
        model(IDS).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(coded(IDS), floats(IDS))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_merging_is_refused_the_adapter_travels_and_the_base_comes_back(tmp_path, base):
    model = model_with_lora(FORMATS["NF4"])
    fresh = quantise_blocks(base, FORMATS["NF4"])
    before = fresh(IDS)
    with pytest.raises(TypeError, match="quantised"):
        merge_lora_weights(model)
    assert torch.equal(load_adapter(fresh, save_adapter(model, tmp_path))(IDS), model(IDS))
    assert torch.equal(unload_lora(model, merge=False)(IDS), before)


def test_merged_in_floats_computes_as_beside_and_16_bits_or_codes_nearly():
    model = model_with_lora(FORMATS["NF4"])
    beside = model(IDS)
    whole = merged(model, lambda linear: linear)
    assert not any(isinstance(m, LoRALinear | QuantisedLinear) for m in whole.modules())
    torch.testing.assert_close(whole(IDS), beside, rtol=1e-3, atol=1e-3)
    far = {
        name: (merged(model, make)(IDS) - beside).norm() / beside.norm()
        for name, make in {
            "16 bits": Linear16,
            "again": lambda linear: QuantisedLinear(linear, FORMATS["NF4"]),
        }.items()
    }
    assert 0 < far["16 bits"] < 0.02 < far["again"]


def test_with_the_originals_it_is_the_plain_merge(base):
    whole = merged(model_with_lora(FORMATS["NF4"]), lambda linear: linear, base)
    plain = unload_lora(model_with_lora(None))  # the same factors
    torch.testing.assert_close(whole(IDS), plain(IDS))


# --- what is recorded ----------------------------------------------------------------------------


def test_recorded_bytes_are_counted_anew():
    table = load_table("bits")
    table = table[table.method.eq("base")].set_index("task")
    for name, form in PRECISIONS.items():
        size = count_bytes(quantise_blocks(load_pretrained()[0], form))
        assert table.bytes_beside[name] == size


def test_the_first_steps_of_a_recorded_run_come_out_again():
    """Up to the dropout, which another device draws otherwise."""
    [run] = adapted(load_table("bits")).query("task == 'NF4' and seed == 0").to_dict("records")
    model, tokenizer = load_pretrained(dropout=0.1)
    model = make_trainable(quantise_blocks(model, FORMATS["NF4"]), job_of(run), TARGETS)
    examples = pair_examples(load_pairs("georgian", "train"), tokenizer)
    losses = fit(model, islice(batches_by_length(examples, 64, 0), 25), run["steps"], run["lr"])
    assert sum(losses) / 25 == pytest.approx(float(run["losses"].split()[0]), abs=0.1)


def test_quantising_seven_billion_saves_what_its_bytes_say():
    """6.476 billion weights of the blocks, from 16 bits to 4.127; and both kernels agree."""
    table = load_table("bits_7b")
    stays = table.groupby("base").stays_gb.min()
    saved = 6.476 * (16 - 4.127) / 8
    for kind in ("NF4, bitsandbytes", "NF4, ours"):
        assert stays["bfloat16"] - stays[kind] == pytest.approx(saved, rel=0.02)
    losses = table.pivot(index=["rows", "mode"], columns="base", values="loss")
    theirs, ours = (list(losses[kind]) for kind in ("NF4, bitsandbytes", "NF4, ours"))
    assert ours == pytest.approx(theirs, rel=2e-3)
