"""The same numbers as Hugging Face PEFT, and adapters that travel both ways."""

import json
import math
import re
import warnings

import pytest
import tiny_models
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
from safetensors.torch import load_file
from tiny_models import example, fill, run, same, small, tiny, with_lora
from torch import nn

from lora_lib import (
    SCRIPTS,
    LoRALinear,
    adapter_directory,
    add_lora_to_model,
    freeze_non_lora_params,
    load_adapter,
    load_pretrained,
    lora_layers,
    merge_lora_weights,
    save_adapter,
    unload_lora,
)
from lora_lib.adapters import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def in_peft(base, directory):
    """PEFT's model with the adapter in `directory`, as PEFT loads it, warnings being errors."""
    with warnings.catch_warnings(action="error"):
        # transformers speaks of its own future, whatever is loaded.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        model = PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False)
    return model.eval()


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
    "bert", "distilbert", "llama", "gpt2", "nested", "ambiguous", "convolutional",
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
    ("nested", dict(target_modules=("deep.0.0", "[0-9]"))),
    ("nested", dict(target_modules="all-linear")),
    ("ambiguous", dict(target_modules="all-linear")),
    ("ambiguous", dict(target_modules="all-linear", modules_to_save=("2.1",))),
    ("convolutional", dict(target_modules="all-linear", modules_to_save=("1", "2"))),
]  # fmt: skip


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
    x = example(model)
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
    model, x, _ = trained(name, settings, dtype)
    next(lora_layers(model)).scaling *= 2  # its own; paths of other layers may end as its does
    with torch.no_grad():  # PEFT holds the factors of a bf16 model in bf16
        for layer in lora_layers(model):
            layer.lora_A.copy_(layer.lora_A.to(dtype))
            layer.lora_B.copy_(layer.lora_B.to(dtype))
    output = run(model, x)
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


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shipped_adapter_gives_the_same_bits_in_peft(script, tokenizer):
    ids = torch.tensor([tokenizer.prompt("Tbilisi"), tokenizer.prompt("Kutaisi")])
    base = load_pretrained()[0]
    plain = base(ids)
    adapted = load_adapter(base, adapter_directory(script))(ids)
    assert (adapted - plain).abs().max() > 1
    assert torch.equal(in_peft(load_pretrained()[0], adapter_directory(script))(ids), adapted)


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


OTHERWISE = [  # and what the configuration says: in older files, or of what is not computed
    ("llama", dict(target_modules="all-linear"), {"target_modules": "all-linear"}),
    ("bert", dict(target_modules=["query"], task_type="SEQ_CLS"), {"modules_to_save": None}),
    ("ours", dict(target_modules=["W_q"]), {
        "loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-6, "corda_config": {"a": 1},
        "base_model_name_or_path": "mine", "task_type": "FEATURE_EXTRACTION"}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "settings", "said"), [*((*theirs, {}) for theirs in THEIRS), *OTHERWISE], ids=str
)
def test_what_peft_makes_loads_here_and_goes_back(name, settings, said, dtype, tmp_path):
    base = MODELS[name]().to(dtype)
    x = example(base)
    plain = run(base, x)
    theirs = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, **settings), autocast_adapter_dtype=False
    ).eval()
    factors = [m for path, m in theirs.named_modules() if path.endswith("default")]
    disturb(*factors)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text()) | said
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    loaded = load_adapter(MODELS[name]().to(dtype), tmp_path).eval()
    assert (run(theirs, x) - plain).abs().max() > 1e-3
    assert torch.equal(run(loaded, x), run(theirs, x))
    ours, base = save_adapter(loaded, tmp_path / "ours"), MODELS[name]().to(dtype)
    back = PeftModel.from_pretrained(base, str(ours), autocast_adapter_dtype=False).eval()
    assert torch.equal(run(back, x), run(theirs, x))


REFUSED = [  # what PEFT is told, on which model, and the word in the refusal
    (dict(target_modules=["W_q"], use_dora=True), small, "use_dora is True"),
    (dict(target_modules=["W_q"], bias="all"), small, "bias is 'all'"),
    (dict(target_modules=["linear1"], lora_bias=True), small, "lora_bias is True"),
    (dict(target_modules=["W_q"], init_lora_weights="pissa"), small, "weights is 'pissa'"),
    (dict(target_modules=["q_proj"], layers_to_transform=[0]), tiny_models.llama,
     r"layers_to_transform is \[0\]"),
    (dict(target_modules=["q_proj"], layers_to_transform=0), tiny_models.llama,
     "missing base_model.model.model.layers.1"),
    (dict(target_modules=["W_q"], trainable_token_indices={"token_embedding": [1]}), small,
     r"trainable_token_indices is {'token_embedding': \[1\]}"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "make", "word"), REFUSED, ids=[word for *_, word in REFUSED])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_feature_of_peft_that_is_lacking_here_is_refused(refuses, tmp_path, settings, make, word):
    get_peft_model(make(), LoraConfig(r=4, **settings)).save_pretrained(tmp_path)
    model = make()
    with refuses(model, ValueError, word):
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
    with refuses(model, ValueError, f"{key}.*was the vocabulary resized.*modules_to_save"):
        load_adapter(model, tmp_path)


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


# --- many architectures, on the usual targets and on all linear layers ---------------------------

QV, QUERY = ["q_proj", "v_proj"], ["query", "value"]
ARCHITECTURES = {name: USUAL[name] for name in (
    "bart", "bert", "bloom", "codegen", "deberta", "deberta-v2", "electra", "gemma", "gemma2",
    "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "llama", "mistral", "mpt", "mt5", "opt", "phi",
    "qwen2", "qwen3", "roberta", "rwkv", "stablelm", "t5", "xlm-roberta",
)} | dict(
    albert=QUERY, big_bird=QUERY, biogpt=QV, blenderbot=QV, camembert=QUERY, cohere2=QV,
    convbert=QUERY, distilbert=["q_lin", "v_lin"], ernie=QUERY, exaone4=QV, flaubert=["q_lin"],
    fnet=["dense"], gemma3_text=QV, glm4=QV, granite=QV, helium=QV, marian=QV, mbart=QV,
    mixtral=QV, mobilebert=QUERY, modernbert=["Wqkv"], nystromformer=QUERY, olmo2=QV, olmoe=QV,
    pegasus=QV, persimmon=["query_key_value"], phi3=["qkv_proj"], qwen3_moe=QV, smollm3=QV,
    starcoder2=QV, umt5=["q", "v"], whisper=QV, xglm=QV,
)  # fmt: skip
# On all linear layers PEFT is without effect on one whose weight is read, and turns those of
# experts into parameters of its own (see save_adapter).
OTHERWISE_IN_PEFT = ("mobilebert", "mixtral", "olmoe", "qwen3_moe")


def tiny_model(name):
    config = transformers.CONFIG_MAPPING[name]
    for head in ("CausalLM", "Seq2SeqLM", "MaskedLM"):
        kinds = getattr(transformers, f"AutoModelFor{head}")._model_mapping
        if config in kinds:
            return tiny(kinds[config])


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    two = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **two)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture(name, tmp_path):
    for targets in (ARCHITECTURES[name], "all-linear"):
        model = tiny_model(name)
        try:
            plain = logits(model)
        except NotImplementedError as error:  # of experts, in PyTorch 2.8 without a GPU
            pytest.skip(f"the model itself does not run here: {str(error).splitlines()[0]}")
        add_lora_to_model(model, 4, 8.0, targets)
        assert torch.equal(logits(model), plain)
        freeze_non_lora_params(fill(model, 0.2))
        output = logits(model)
        assert (output - plain).abs().max() > 1e-4

        if targets != "all-linear" or name not in OTHERWISE_IN_PEFT:
            directory = save_adapter(model, tmp_path / "ours")
            theirs = PeftModel.from_pretrained(tiny_model(name), directory).eval()
            assert torch.equal(logits(theirs), output), "PEFT reads ours"

            at_random = dict(target_modules=targets, init_lora_weights=False)
            settings = LoraConfig(r=4, lora_alpha=8, **at_random)
            theirs = get_peft_model(tiny_model(name), settings).eval()
            theirs.save_pretrained(tmp_path / "theirs")
            loaded = load_adapter(tiny_model(name), tmp_path / "theirs")
            assert torch.equal(logits(loaded), logits(theirs)), "we read PEFT's"

        tied = model.get_output_embeddings() in [layer for layer in lora_layers(model)]
        if not (tied and model.config.tie_word_embeddings):
            merge_lora_weights(model)
            torch.testing.assert_close(logits(model), output, atol=2e-4, rtol=1e-3)
        unload_lora(model, merge=False)
        assert torch.equal(logits(model), plain)
