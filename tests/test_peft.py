"""The same numbers as Hugging Face PEFT, and adapters that travel both ways."""

import json
import math
import re
import warnings

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import example, run, same, small, with_lora
from torch import nn

from lora_lib import (
    SCRIPTS,
    LoRALinear,
    adapter_directory,
    load_adapter,
    load_pretrained,
    lora_layers,
    save_adapter,
)
from lora_lib.adapters import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def in_peft(base, directory, **how):
    """PEFT's model with the adapter in `directory`, as PEFT loads it, warnings being errors."""
    with warnings.catch_warnings(action="error"):
        # transformers speaks of its own future, whatever is loaded.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        how["autocast_adapter_dtype"] = False
        return PeftModel.from_pretrained(base, str(directory), **how).eval()


# --- one layer: outputs and gradients ------------------------------------------------------------

SHAPES = [(1, 1, 1), (12, 7, 4), (7, 12, 3), (64, 48, 8), (33, 129, 16), (16, 16, 40)]
SCALINGS = [  # alpha / rank, use_rslora, and whether the scaling is a power of two
    (1, False, True), (0.5, False, True), (4, False, True),
    (3, False, False), (0.7, False, False), (2, True, False),
]  # fmt: skip


def trio(d_in, d_out, rank, alpha, use_rslora=False, dtype=torch.float32, dropout=0.0):
    """Our layer and PEFT's on the same weight and factors; and an input."""
    torch.manual_seed(0)
    linear = nn.Linear(d_in, d_out, dtype=dtype)
    twin = nn.Linear(d_in, d_out, dtype=dtype)
    twin.load_state_dict(linear.state_dict())
    ours = LoRALinear(linear, rank, alpha, dropout, use_rslora)
    settings = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=use_rslora, lora_dropout=dropout,
                          target_modules=["0"])  # fmt: skip
    theirs = get_peft_model(nn.Sequential(twin), settings, autocast_adapter_dtype=False)
    theirs = theirs.base_model.model[0]
    with torch.no_grad():
        for factor, layer in ((ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)):
            values = torch.randn(factor.shape).to(dtype)  # PEFT holds them in the base's dtype
            factor.copy_(values)
            layer["default"].weight.copy_(values)
    return ours, theirs, torch.randn(5, d_in).to(dtype)


def outputs_and_gradients(layer, x, A, B):
    """The output, and the gradients of the input and of the factors, in float32."""
    x = x.clone().requires_grad_()
    output = layer(x)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    gradients = torch.autograd.grad((output.float() * weights).sum(), (x, A, B))
    return [output.detach(), *(g.float() for g in gradients)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("scaling", "use_rslora", "exact"), SCALINGS)
@pytest.mark.parametrize(("d_in", "d_out", "rank"), SHAPES)
def test_a_layer_computes_what_pefts_does(d_in, d_out, rank, scaling, use_rslora, exact, dtype):
    ours, theirs, x = trio(d_in, d_out, rank, scaling * rank, use_rslora, dtype)
    assert ours.scaling == theirs.scaling["default"]
    mine = outputs_and_gradients(ours, x, ours.lora_A, ours.lora_B)
    peft = outputs_and_gradients(
        theirs, x, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    )
    assert (mine[0] - ours.original(x)).abs().max() > 0.01
    for a, b in zip(mine, peft, strict=True):
        if exact:
            assert torch.equal(a, b)
        else:
            unit = torch.finfo(dtype).eps * b.abs().max().item()
            torch.testing.assert_close(a, b, atol=4 * unit, rtol=0)


def test_the_same_seed_draws_the_same_dropout_as_peft_and_autocast_gives_the_same_bits():
    ours, theirs, x = trio(12, 7, 4, 8.0, dropout=0.5)
    outputs = []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(layer.train()(x))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], ours.eval()(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
        assert ours(x).dtype == torch.bfloat16


def test_a_new_layer_draws_A_from_the_same_distribution_as_peft():
    ours = LoRALinear(nn.Linear(400, 10), rank=64)
    theirs = get_peft_model(
        nn.Sequential(nn.Linear(400, 10)), LoraConfig(r=64, target_modules=["0"])
    ).base_model.model[0]
    for statistic in (torch.std, torch.max, torch.min):
        a, b = statistic(ours.lora_A), statistic(theirs.lora_A["default"].weight)
        torch.testing.assert_close(a, b, rtol=0.03, atol=0)
    assert not theirs.lora_B["default"].weight.any() and not ours.lora_B.any()


# --- whole models: from here to PEFT, and back ---------------------------------------------------


MODELS = {"ours": small, **{name: getattr(tiny_models, name) for name in (
    "bert", "distilbert", "llama", "gpt2", "nested", "ambiguous", "odd_names", "convolutional",
)}}  # fmt: skip
CASES = [
    ("ours", dict(target_modules=("W_q", "W_v"))),
    ("ours", dict(target_modules=("blocks.0.attention.W_k", "blocks.1.feed_forward.linear1"))),
    ("ours", dict(target_modules=re.compile(r"blocks\.1\..*W_[qv]"))),
    ("ours", dict(target_modules=("W_q",), rank=3, alpha=5.0, use_rslora=True)),
    ("ours", dict(target_modules=("W_q",), dropout=0.1)),
    ("ours", dict(target_modules="all-linear", modules_to_save=("classifier", "final_norm"))),
    ("bert", dict(target_modules="all-linear", modules_to_save=("classifier",))),
    ("distilbert", dict(target_modules=("q_lin", "v_lin"),
                        modules_to_save=("classifier", "pre_classifier"))),
    ("llama", dict(target_modules="all-linear", modules_to_save=("lm_head",))),
    ("llama", dict(target_modules=("q_proj",), modules_to_save=("layers.1.mlp", "model.norm"))),
    ("nested", dict(target_modules=("deep.0.0", "in"))),
    ("ambiguous", dict(target_modules="all-linear")),
    ("odd_names", dict(target_modules="all-linear")),
    ("ambiguous", dict(target_modules="all-linear", modules_to_save=("1.1",))),
    ("convolutional", dict(target_modules="all-linear", modules_to_save=("1", "2"))),
]  # fmt: skip


def input_of(name, model):
    return torch.arange(16).view(2, 8) if name == "ours" else example(model)


def disturb(*modules):
    """As if trained: random factors are set elsewhere, this is for what is saved whole."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in modules:
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor += 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
                else:
                    tensor += 1  # the batches that a norm has seen


def trained(name, settings, dtype=torch.float32):
    """(the model as if trained, an input, its output); the adapter has changed the output."""
    model = MODELS[name]().to(dtype)
    x = input_of(name, model)
    x = x.to(dtype) if x.is_floating_point() else x
    plain = run(model, x)
    with_lora(model, size=0.5, **settings).eval()
    output = run(model, x)
    assert (output - plain).abs().max() > 1e-3 * plain.abs().max()
    saved = settings.get("modules_to_save", ())
    disturb(*(m for path, m in model.named_modules() if path.endswith(saved)))
    assert not saved or not torch.equal(run(model, x), output)
    return model, x, run(model, x)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_loads_what_is_saved_here_and_what_it_saves_of_it_loads_here_again(
    name, settings, dtype, tmp_path
):
    model, x, output = trained(name, settings, dtype)
    with torch.no_grad():  # PEFT holds the factors of a bf16 model in bf16
        for layer in lora_layers(model):
            layer.lora_A.copy_(layer.lora_A.to(dtype))
            layer.lora_B.copy_(layer.lora_B.to(dtype))
    peft_model = in_peft(MODELS[name]().to(dtype), save_adapter(model, tmp_path / "a"))
    if math.frexp(next(lora_layers(model)).scaling)[0] == 0.5:  # a power of two
        assert torch.equal(run(peft_model, x), output)
    else:
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(run(peft_model, x), output, atol=16 * eps, rtol=16 * eps)
    peft_model.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    again = load_adapter(MODELS[name]().to(dtype), tmp_path / "b")
    assert torch.equal(run(again, x), run(model, x)) and same(
        again.state_dict(), model.state_dict()
    )


def test_peft_trains_on_from_what_is_saved_here(tmp_path):
    model, x, _ = trained("ours", dict(modules_to_save=("classifier",)))
    peft_model = in_peft(small(), save_adapter(model, tmp_path / "a"), is_trainable=True)
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=0.1)
    peft_model(x).square().mean().backward()
    optimizer.step()
    peft_model.save_pretrained(tmp_path / "b")
    load_adapter(model, tmp_path / "b")
    assert torch.equal(model(x), peft_model(x))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shipped_adapter_gives_the_same_bits_in_peft(script, tokenizer):
    ids = torch.tensor([tokenizer.prompt("Tbilisi"), tokenizer.prompt("Kutaisi")])
    base = load_pretrained()[0]
    plain = base(ids)
    adapted = load_adapter(base, adapter_directory(script))(ids)
    assert (adapted - plain).abs().max() > 1
    assert torch.equal(in_peft(load_pretrained()[0], adapter_directory(script))(ids), adapted)


def test_a_directory_that_still_says_all_linear_loads(tmp_path):
    model, x, output = trained("ours", dict(target_modules="all-linear"))
    in_peft(small(), save_adapter(model, tmp_path / "new")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | {"target_modules": "all-linear"}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert torch.equal(load_adapter(small(), tmp_path)(x), output)


# --- whole models: what PEFT makes ---------------------------------------------------------------

THEIRS = [
    ("ours", dict(target_modules=r".*\.W_[qv]")),
    ("ours", dict(target_modules=["W_v"], modules_to_save=["classifier"], lora_dropout=0.1)),
    ("ours", dict(target_modules=["W_q"], use_rslora=True)),
    ("ours", dict(target_modules=["W_q"], init_lora_weights="gaussian")),
    ("ours", dict(target_modules=["W_q", "W_v", "W_x"], rank_pattern={"0.attention.W_q": 2},
                  alpha_pattern={"W_v": 2, r"blocks\..*": 16})),
    ("ours", dict(target_modules=["W_q"], exclude_modules=["blocks.0.attention.W_q"])),
    ("ours", dict(target_modules=["W_q", "W_v"], exclude_modules=r".*0\.attention\.W_q")),
    ("gpt2", dict(target_modules=["c_attn", "lm_head"])),
    ("gpt2", dict(target_modules="all-linear", fan_in_fan_out=True)),
    ("llama", dict(target_modules=["lm_head", "q_proj"])),  # PEFT saves the base's lm_head too
    ("bert", dict(target_modules=["query", "dense"], task_type="SEQ_CLS")),
    ("distilbert", dict(target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS")),
    ("llama", dict(target_modules=["q_proj"], modules_to_save=["lm_head"],
                   task_type="CAUSAL_LM")),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "settings"), THEIRS, ids=str)
def test_what_peft_makes_loads_here_and_goes_back(name, settings, dtype, tmp_path):
    base = MODELS[name]().to(dtype)
    x = input_of(name, base)
    plain = run(base, x)
    theirs = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, **settings), autocast_adapter_dtype=False
    ).eval()
    factors = [m for path, m in theirs.named_modules() if path.endswith("default")]
    disturb(*factors)
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(MODELS[name]().to(dtype), tmp_path).eval()
    assert (run(theirs, x) - plain).abs().max() > 1e-3
    assert torch.equal(run(loaded, x), run(theirs, x))
    ours, base = save_adapter(loaded, tmp_path / "ours"), MODELS[name]().to(dtype)
    back = PeftModel.from_pretrained(base, str(ours), autocast_adapter_dtype=False).eval()
    assert torch.equal(run(back, x), run(theirs, x))


class WithConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.embed, self.out = nn.Conv1d(1, 2, 1), nn.Embedding(3, 2), nn.Linear(2, 2)


REFUSED = [  # what PEFT is told, on which model, and the word in the refusal
    (dict(target_modules=["W_q"], use_dora=True), small, "use_dora is True"),
    (dict(target_modules=["W_q"], bias="all"), small, "bias is 'all'"),
    (dict(target_modules=["linear1"], lora_bias=True), small, "lora_bias is True"),
    (dict(target_modules=["W_q"], init_lora_weights="pissa"), small, "weights is 'pissa'"),
    (dict(target_modules=["q_proj"], layers_to_transform=[0]), tiny_models.llama,
     "layers_to_transform is [0]"),
    (dict(target_modules=["q_proj"], layers_to_transform=0), tiny_models.llama,
     "missing base_model.model.model.layers.1"),
    (dict(target_modules=["W_q"], trainable_token_indices={"token_embedding": [1]}), small,
     "trainable_token_indices is {'token_embedding': [1]}"),
    (dict(target_modules=["embed"]), WithConvolution, "'embed' is a Embedding"),
    (dict(target_modules=["conv"]), WithConvolution, "'conv' is a Conv1d"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "make", "word"), REFUSED, ids=[word for *_, word in REFUSED])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_feature_of_peft_that_is_lacking_here_is_refused(refuses, tmp_path, settings, make, word):
    get_peft_model(make(), LoraConfig(r=4, **settings)).save_pretrained(tmp_path)
    model = make()
    with refuses(model, ValueError, str(tmp_path), word):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("resized", [False, True])
def test_base_weights_that_peft_saved_along_say_which_base_they_are_of(refuses, tmp_path, resized):
    base = tiny_models.llama()
    if resized:
        base.resize_token_embeddings(53)
    settings = LoraConfig(target_modules=["q_proj"] if resized else ["lm_head"])
    with warnings.catch_warnings(action="ignore"):
        get_peft_model(base, settings).save_pretrained(
            tmp_path, save_embedding_layers=True if resized else "auto"
        )
    model = tiny_models.llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    key = f"unexpected base_model.model.lm_head.{'' if resized else 'base_layer.'}weight"
    with refuses(model, ValueError, key, "was the vocabulary resized?", "modules_to_save"):
        load_adapter(model, tmp_path)


def test_a_head_that_an_old_file_holds_without_saying_so_is_loaded(tmp_path):
    theirs = get_peft_model(
        tiny_models.bert(), LoraConfig(target_modules=["query"], task_type="SEQ_CLS")
    ).eval()
    nn.init.ones_(theirs.base_model.model.classifier.modules_to_save["default"].bias)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["modules_to_save"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"modules_to_save": None}))
    loaded, x = load_adapter(tiny_models.bert(), tmp_path), example(tiny_models.bert())
    assert torch.equal(run(loaded, x), run(theirs, x))
    assert save_adapter(loaded, tmp_path / "again")
    assert torch.equal(run(load_adapter(tiny_models.bert(), tmp_path / "again"), x), run(loaded, x))


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


def test_a_pickled_file_is_read_and_code_in_it_never_runs(refuses, tmp_path):
    model, x, output = trained("ours", {})
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    (tmp_path / WEIGHTS_FILE).unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    assert torch.equal(load_adapter(small(), tmp_path)(x), output)
    torch.save(tensors | {"evil": Evil()}, tmp_path / "adapter_model.bin")
    fresh = small()
    with refuses(fresh, ValueError, "holds more than tensors, and was not run"):
        load_adapter(fresh, tmp_path)
    assert not Evil.ran
