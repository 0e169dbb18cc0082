"""LoRA on models that this course did not make."""

import copy
import re

import pytest
import tiny_models
import torch
from tiny_models import example, run

from lora_lib.adapters import load_adapter, save_adapter
from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
    unmerge_lora_weights,
)
from lora_lib.lora import LoRALinear, lora_layers

# model → how many nn.Linear it has
LAYERS = {"bert": 14, "distilbert": 14, "llama": 15, "tied_llama": 15, "vit": 13, "nested": 2,
          "parent": 1, "ambiguous": 2, "odd_names": 2, "convolutional": 1,
          "shared_block": 1}  # fmt: skip
TIED = ("tied_llama",)

every_model = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def model(name):
    return getattr(tiny_models, name)()


def state(model):
    return copy.deepcopy(model.state_dict())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- what works ----------------------------------------------------------------------------------


@every_model
def test_every_linear_layer_gets_lora_and_the_output_stays(name, model):
    x = example(model)
    before = run(model, x)
    _, layers = add_lora_to_model(model, target_modules="all-linear")
    assert len(layers) == LAYERS[name]
    assert torch.equal(run(model, x), before)


@every_model
def test_training_changes_the_factors_and_the_output_and_nothing_else(name, model):
    x = example(model)
    output = run(model, x).detach()
    add_lora_to_model(model, 4, 8.0, "all-linear")
    freeze_non_lora_params(model)
    before = state(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):  # the first moves B alone
        optimizer.zero_grad()
        run(model, x).square().mean().backward()
        optimizer.step()
    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert changed == {key for key in before if "lora_" in key}
    assert not torch.equal(run(model, x), output)


@every_model
def test_merging_keeps_the_output_and_unmerging_restores_every_bit(name, model, set_factors):
    x = example(model)
    plain = run(model, x)
    set_factors(add_lora_to_model(model, 4, 8.0, "all-linear")[0])
    output, before = run(model, x), state(model)
    assert (output - plain).abs().max() > 1e-3
    if name in TIED:
        with pytest.raises(ValueError, match="tied to another module"):
            merge_lora_weights(model)
        assert same(model.state_dict(), before)
        return
    merge_lora_weights(model)
    torch.testing.assert_close(run(model, x), output, atol=1e-5, rtol=1e-4)
    unmerge_lora_weights(model)
    assert same(model.state_dict(), before)


@every_model
@pytest.mark.parametrize("merge", [True, False])
def test_unloading_leaves_a_plain_model(name, model, set_factors, merge):
    x = example(model)
    plain, modules = run(model, x), [(p, type(m)) for p, m in model.named_modules()]
    before, grads = state(model), [p.requires_grad for p in model.parameters()]
    set_factors(add_lora_to_model(model, 4, 8.0, "all-linear")[0])
    freeze_non_lora_params(model)
    expected = run(model, x) if merge else plain
    unload_lora(model, merge=merge and name not in TIED)
    assert [(p, type(m)) for p, m in model.named_modules()] == modules
    assert [p.requires_grad for p in model.parameters()] == grads
    assert merge or same(model.state_dict(), before)
    if name not in TIED:
        torch.testing.assert_close(run(model, x), expected, atol=1e-5, rtol=1e-4)


@every_model
def test_an_adapter_is_saved_and_loaded_bit_for_bit(name, model, set_factors, tmp_path):
    x = example(model)
    set_factors(add_lora_to_model(model, 3, 5.0, "all-linear")[0])
    loaded = load_adapter(getattr(tiny_models, name)(), save_adapter(model, tmp_path))
    assert torch.equal(run(loaded, x), run(model, x))
    assert [p for p, m in loaded.named_modules() if isinstance(m, LoRALinear)] == [
        p for p, m in model.named_modules() if isinstance(m, LoRALinear)
    ]


def test_layers_keep_the_mode_of_the_layer_they_replace():
    model = tiny_models.nested().train()
    model.parts["deep"].eval()
    _, layers = add_lora_to_model(model, target_modules="all-linear", dropout=0.1)
    assert [layer.dropout.training for layer in layers] == [True, False]


def test_a_pattern_names_what_a_list_cannot():
    model = tiny_models.ambiguous()
    _, layers = add_lora_to_model(model, target_modules=re.compile("0"))
    assert [path for path, m in model.named_modules() if m in layers] == ["0"]


def test_a_block_in_two_places_is_merged_once(set_factors):
    model = tiny_models.shared_block()
    set_factors(add_lora_to_model(model, target_modules="all-linear")[0])
    x = example(model)
    output = model(x)
    assert isinstance(model[0][0], LoRALinear) and model[0] is model[1]
    torch.testing.assert_close(merge_lora_weights(model)(x), output)


def test_a_norm_and_a_convolution_are_saved_whole_with_their_buffers(tmp_path):
    model = tiny_models.convolutional()
    add_lora_to_model(model, target_modules="all-linear", modules_to_save=["1", "2"])
    model.train()(torch.randn(8, 6))
    assert model[2].running_mean.any()
    loaded = load_adapter(tiny_models.convolutional(), save_adapter(model.eval(), tmp_path))
    assert torch.equal(loaded[2].running_mean, model[2].running_mean)
    assert loaded[2].num_batches_tracked == 1


# --- torch.compile -------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")  # traced and guarded as always, without a compiler


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_takes_lora_merges_saves_and_unloads(set_factors, tmp_path, fresh_dynamo):
    model = compiled(tiny_models.nested())
    x = example(model)
    plain = model(x)
    same_model, layers = add_lora_to_model(model, 4, 8.0, "all-linear")
    assert same_model is model
    assert len(layers) == 2
    assert torch.equal(model(x), plain)
    output = set_factors(model)(x)
    assert not torch.equal(output, plain)
    torch.testing.assert_close(merge_lora_weights(model)(x), output)
    assert torch.equal(unmerge_lora_weights(model)(x), output)
    directory = save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(tiny_models.nested(), directory)(x), output)
    assert torch.equal(unload_lora(model, merge=False)(x), plain)
    assert torch.equal(load_adapter(model, directory)(x), output)


def test_a_model_compiled_after_the_injection_trains_as_without(set_factors, fresh_dynamo):
    plain, model = (
        set_factors(add_lora_to_model(tiny_models.nested(), 4, 8.0, "all-linear")[0])
        for _ in range(2)
    )
    wrapped = compiled(model)
    freeze_non_lora_params(wrapped)
    x = example(model)
    for trained in (plain, wrapped):
        trained(x).square().mean().backward()
    for a, b in zip(lora_layers(plain), lora_layers(model), strict=True):
        torch.testing.assert_close(a.lora_A.grad, b.lora_A.grad)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_unloading_after_compiling_restores_what_was_trainable(fresh_dynamo):
    model = tiny_models.nested()
    add_lora_to_model(model, target_modules="all-linear")
    freeze_non_lora_params(model)
    unload_lora(compiled(model))
    assert all(p.requires_grad for p in model.parameters())


# --- what is refused -----------------------------------------------------------------------------


def test_a_layer_in_two_places_is_refused(refuses):
    model = tiny_models.shared_layer()
    with refuses(model, ValueError, "'0' is one module in several places"):
        add_lora_to_model(model, target_modules="all-linear")


def test_a_tied_module_is_not_saved_whole(refuses):
    model = tiny_models.tied_llama()
    with refuses(model, ValueError, "'lm_head'", "tied to another module", "untie"):
        add_lora_to_model(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
