"""LoRA on layers whose model reads their weights, or that compute in their own way.

`layer.weight` is W + ΔW for whoever reads it: so each of them starts as a no-op, is changed by the
adapter, trains every factor, computes the same merged, and comes back bit for bit.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import tiny_models
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tiny_models import example, fill, run, same, seeded, tiny, with_lora
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from lora_lib import (
    LoRALinear,
    adapter_disabled,
    add_lora_to_model,
    freeze_non_lora_params,
    load_adapter,
    lora_layers,
    merge_lora_weights,
    save_adapter,
    unload_lora,
    unmerge_lora_weights,
)

# --- layers of one's own -------------------------------------------------------------------------


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.tril(), self.bias)


class Bound(nn.Linear):
    """Computes with a method that it chose once."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.chosen = self.lower

    def lower(self, x):
        return F.linear(x, self.weight.tril(), self.bias)

    def forward(self, x):
        return self.chosen(x)


class Router(nn.Linear):
    """Returns two things, and notes one on itself."""

    def forward(self, hidden_states):
        logits = super().forward(hidden_states)
        self.seen = logits.detach()
        return logits.softmax(-1), logits


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router(6, 3)

    def forward(self, x):
        shares, logits = self.router(hidden_states=x)
        return shares + logits


class Autoencoder(nn.Module):
    """Decodes with the transpose of what it encodes with."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(6, 4)

    def forward(self, x):
        return F.linear(self.enc(x).tanh(), self.enc.weight.T)


# Its attention reads the weight of out_proj; its fast path, the weights of all its children.
Encoder = partial(nn.TransformerEncoderLayer, 6, 2, 8, batch_first=True)


class Shared(nn.Sequential):
    """What holds the layer is in two places, the layer in one."""

    def __init__(self):
        super().__init__(*2 * [nn.Sequential(nn.Linear(6, 6), nn.Tanh())])


def alone(layer):
    return lambda: seeded(lambda: nn.Sequential(layer(), nn.Tanh(), nn.Linear(6, 3)))


def hooked(register, hook):
    def layer():
        linear = nn.Linear(6, 6)
        getattr(linear, register)(hook)
        return linear

    return alone(layer)


AUDIO = dict(conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_conv_pos_embeddings=4,
             num_conv_pos_embedding_groups=2)  # fmt: skip
MAMBA = dict(state_size=4, time_step_rank=4)
KINDS = {  # name → (how the model is made, targets)
    "masked": (alone(lambda: Masked(6, 6)), "all-linear"),
    "bound": (alone(lambda: Bound(6, 6)), "all-linear"),
    "router": (partial(seeded, Routed), "all-linear"),
    "tied autoencoder": (partial(seeded, Autoencoder), "all-linear"),
    "encoder layer": (partial(seeded, Encoder), "all-linear"),
    "shared block": (partial(seeded, Shared), "all-linear"),
    "input hook": (hooked("register_forward_pre_hook", lambda m, x: (x[0].sin(),)), "all-linear"),
    "output hook": (hooked("register_forward_hook", lambda m, x, y: y.relu()), "all-linear"),
    # Traced, without a compiler.
    "compiled": (lambda: torch.compile(tiny_models.nested(), backend="eager"), "all-linear"),
    "GPT-2": (tiny_models.gpt2, ["c_attn", "c_proj", "c_fc"]),
    "WavLM": (partial(tiny, transformers.WavLMForSequenceClassification, **AUDIO),
              ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "Wav2Vec2 x-vector": (
        partial(tiny, transformers.Wav2Vec2ForXVector, **AUDIO, tdnn_dim=(16, 16),
                tdnn_kernel=(2, 1), tdnn_dilation=(1, 1), xvector_output_dim=8),
        ["kernel", "q_proj"]),
    "Mamba": (partial(tiny, transformers.MambaForCausalLM, **MAMBA),
              ["in_proj", "x_proj", "dt_proj", "out_proj"]),
    "FalconMamba": (partial(tiny, transformers.FalconMambaForCausalLM, **MAMBA),
                    ["dt_proj", "x_proj"]),
    "Llama 4": (partial(tiny, transformers.Llama4ForCausalLM, intermediate_size_mlp=48),
                ["router", "q_proj", "o_proj"]),
    **{name: (getattr(tiny_models, name), "all-linear") for name in (
        "nested", "ambiguous", "convolutional")},
}  # fmt: skip


def make(name):
    model, targets = KINDS[name][0](), KINDS[name][1]
    return model, example(model), targets


def trained(name):
    model, x, targets = make(name)
    return with_lora(model, targets), x


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_of_any_kind_computes_with_the_sum_and_travels(name, tmp_path):
    torch._dynamo.reset()
    model, x, targets = make(name)
    state, modules = copy.deepcopy(model.state_dict()), list(model.named_modules())
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        plain = run(model, x)
        returned, layers = add_lora_to_model(model, 4, 8.0, targets)
        assert returned is model and torch.equal(run(model, x), plain)
    assert targets != "all-linear" or [layer.original for layer in layers] == linear
    freeze_non_lora_params(fill(model, 0.2))
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    run(model, x).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []
    with torch.no_grad():
        output = run(model, x)
        assert (output - plain).abs().max() > 1e-4
        loaded = load_adapter(make(name)[0], save_adapter(model, tmp_path))
        assert torch.equal(run(loaded, x), output)
        merge_lora_weights(model)
        torch.testing.assert_close(run(model, x), output, atol=2e-5, rtol=1e-4)
        with adapter_disabled(model):
            assert torch.equal(run(model, x), plain)
        unmerge_lora_weights(model)
        assert torch.equal(run(model, x), output)
        unload_lora(model, merge=False)
        assert torch.equal(run(model, x), plain)
    assert same(model.state_dict(), state) and list(model.named_modules()) == modules


@pytest.mark.parametrize("name", ["masked", "router", "tied autoencoder", "GPT-2", "encoder layer"])
def test_in_bfloat16_and_under_autocast_they_differ_by_rounding_only(name):
    for autocast in (True, False):
        model, x, targets = make(name)
        if not autocast:
            x = example(model.bfloat16())
        with_lora(model, targets)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = run(model, x)
            torch.testing.assert_close(
                run(merge_lora_weights(model), x), output, atol=0.05, rtol=0.05
            )


WAYS = {  # how a training step may be run
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "reentrant": lambda model, x: checkpoint(model, x.requires_grad_(), use_reentrant=True),
    "compiled": lambda model, x: torch.compile(model, backend="eager")(x),
    "compiled layer": lambda model, x: (model[0].compile(backend="eager"), model(x))[1],
    "compiled original": lambda model, x: (model[0].original.compile(backend="eager"), model(x))[1],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["masked", "bound", "input hook"])
def test_gradients_are_those_of_a_plain_step(name, way):
    torch._dynamo.reset()
    found = []
    for step in (lambda model, x: model(x), WAYS[way]):
        model, x = trained(name)
        step(model, x).square().mean().backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["masked", "tied autoencoder", "encoder layer", "input hook"])
def test_a_sharded_model_trains_as_a_whole_one(name):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole, x = trained(name)
        model = fully_shard(trained(name)[0], mesh=init_device_mesh("cpu", (1,)))
        for one in (whole, model):
            run(one, x).square().mean().backward()
        torch.testing.assert_close([g.full_tensor() for g in gradients(model)], gradients(whole))
        with pytest.raises(TypeError, match="sharded weight"):
            merge_lora_weights(model)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["masked", "router"])
def test_many_threads_read_one_layer(name):
    model, x = trained(name)
    state, expected = copy.deepcopy(model.state_dict()), run(model, x)
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda _: run(model, x), range(100)))
    assert all(torch.equal(output, expected) for output in outputs)
    assert same(model.state_dict(), state)


def test_replicas_and_exports_compute_with_the_sum():
    model, x = trained("masked")
    with torch.no_grad():
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))
        layer = model[0].original._replicate_for_data_parallel()
        layer._former_parameters = dict(model[0].original._parameters)
        for name, parameter in layer._former_parameters.items():
            setattr(layer, name, parameter.data)
        expected, model[0].original = model(x), layer
        torch.testing.assert_close(model(x), expected)


def test_weight_is_that_which_the_layer_computes_with_and_bias_the_originals():
    layer, x = fill(LoRALinear(nn.Linear(12, 7))), torch.ones(5, 12)
    assert torch.equal(layer(input=x), layer(x))
    torch.testing.assert_close(layer.weight, layer.original.weight + layer.delta_weight())
    assert torch.equal(layer.weight, layer.merged_weight())
    layer.eval().merge()
    assert layer.weight is layer.original.weight and layer.bias is layer.original.bias
    assert torch.equal(layer(x), layer.original(x))
    assert not layer.bias.requires_grad and not layer.weight.requires_grad


def test_numbers_of_other_libraries_become_pythons():
    layer = LoRALinear(nn.Linear(12, 7), np.int64(4), Fraction(12), np.float32(0.5))
    assert (type(layer.rank), type(layer.alpha), type(layer.dropout.p)) == (int, float, float)
    assert layer.scaling == 3.0


def test_layers_are_in_the_mode_of_the_layer_they_replace():
    model = tiny_models.nested().train()
    model.parts["deep"].eval()
    _, layers = add_lora_to_model(model, target_modules="all-linear", dropout=0.1)
    assert [layer.training for layer in layers] == [True, False, True]
    assert [layer.dropout.training for layer in layers] == [True, False, True]


def test_other_attributes_of_a_layer_are_read_through():
    model, x, targets = make("router")
    model.router.top_k = 2
    with_lora(model, targets)
    assert model.router.top_k == 2 and model.router.bias is model.router.original.bias
    with pytest.raises(AttributeError, match="top_q"):
        _ = model.router.top_q
    _, logits = model.router(x)
    assert torch.equal(model.router.original.seen, logits)  # what a forward notes is found there


# --- what takes no sum, and what is refused ------------------------------------------------------


class Int8(nn.Linear):
    """As quantising libraries make them: an nn.Linear by name, integers inside."""

    def __init__(self, *shape):
        super().__init__(*shape)
        self.scale = self.weight.detach().abs().max() / 127
        integers = (self.weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


class Packed(torch.Tensor):
    """A weight of a class of its own, as torchao and DTensor have them."""


class Property(nn.Linear):
    """Whose weight is a property of its class."""

    weight = property(lambda self: self._parameters["weight"].tril())


def a_property():
    linear = nn.Linear(6, 6)
    linear.__class__ = Property
    return linear


def packed():
    linear = nn.Linear(6, 6)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Packed))
    return linear


NO_SUM = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "pruned": lambda: prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5),
    "integers": lambda: Int8(6, 6),
    "a property": a_property,
    "a tensor of its own class": packed,
}


@pytest.mark.parametrize("name", NO_SUM)
def test_a_weight_that_takes_no_sum_is_adapted_but_not_merged(name, refuses):
    model = alone(NO_SUM[name])()
    x = example(model)
    before = model(x)
    add_lora_to_model(model, 4, 8.0, "all-linear")
    torch.testing.assert_close(model(x), before, atol=0, rtol=0)
    freeze_non_lora_params(fill(model))
    model(x).square().mean().backward()
    assert model[0].lora_A.grad.any() and model[0].lora_B.grad.any()
    assert not torch.equal(model(x), before)
    with refuses(model, TypeError, "cannot be merged with ΔW"):
        merge_lora_weights(model)
    with pytest.raises(TypeError, match=r"computed from other|quantised, packed or"):
        _ = model[0].weight


def test_dropout_says_where_it_has_no_effect():
    with pytest.warns(UserWarning, match="Masked computes in its own way.*dropout has no place"):
        LoRALinear(Masked(3, 3), dropout=0.1)


def test_a_weight_changed_since_the_merge_is_not_thrown_away():
    def trained(layer):
        layer.original.weight.data.sub_(1e-3)

    def replaced(layer):
        layer.original.weight = nn.Parameter(torch.ones(6, 6))

    changes = {
        "trained": trained,
        "replaced": replaced,
        "pruned": lambda layer: prune.l1_unstructured(layer.original, "weight", 0.5),
        "reparametrised": lambda layer: parametrizations.weight_norm(layer.original),
    }
    for dtype in (torch.float32, torch.bfloat16):
        for change in changes.values():
            model = with_lora(alone(lambda: nn.Linear(6, 6))().to(dtype), ["0"])
            merge_lora_weights(model)
            change(model[0])
            for function in (
                unmerge_lora_weights,
                lambda m: unload_lora(m, merge=False),
                lambda m: m[0].unmerge(),
            ):
                with pytest.raises(RuntimeError, match="changed since the merge"):
                    function(model)
            assert model[0].merged
            assert isinstance(unload_lora(model)[0], nn.Linear)


@pytest.mark.parametrize("move", [torch.float16, torch.bfloat16, torch.float64, "deepcopy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_model_that_was_only_moved_unmerges(move, dtype):
    model, _, targets = make("GPT-2")
    model = merge_lora_weights(with_lora(model.to(dtype), targets, size=0.5))
    model = copy.deepcopy(model) if move == "deepcopy" else model.to(move)
    unmerge_lora_weights(model)
    moved = dtype if move == "deepcopy" else move
    assert all(not m.merged and m.original.weight.dtype == moved for m in lora_layers(model))
