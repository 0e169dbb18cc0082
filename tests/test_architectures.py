"""Tiny random models of many architectures: LoRA starts as a no-op, reaches the output, merges,
comes off, and travels to PEFT and back, on the usual targets and on all linear layers."""

import peft
import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
from transformers import CONFIG_MAPPING

from lora_lib import (
    add_lora_to_model,
    freeze_non_lora_params,
    load_adapter,
    lora_layers,
    merge_lora_weights,
    save_adapter,
    unload_lora,
)

QV, QUERY = ["q_proj", "v_proj"], ["query", "value"]
ARCHITECTURES = USUAL | dict(
    albert=QUERY, big_bird=QUERY, biogpt=QV, blenderbot=QV, camembert=QUERY, cohere2=QV,
    convbert=QUERY, distilbert=["q_lin", "v_lin"], ernie=QUERY, exaone4=QV, flaubert=["q_lin"],
    fnet=["dense"], gemma3_text=QV, glm4=QV, granite=QV, helium=QV, marian=QV, mbart=QV,
    mixtral=QV, mobilebert=QUERY, modernbert=["Wqkv"], nystromformer=QUERY, olmo2=QV, olmoe=QV,
    pegasus=QV, persimmon=["query_key_value"], phi3=["qkv_proj"], qwen3_moe=QV, smollm3=QV,
    starcoder2=QV, umt5=["q", "v"], whisper=QV, xglm=QV,
)  # fmt: skip
NAMES = [
    "albert", "bart", "bert", "big_bird", "biogpt", "blenderbot", "bloom", "camembert", "codegen",
    "cohere2", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "exaone4",
    "flaubert", "fnet", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_bigcode", "gpt_neox",
    "gptj", "granite", "helium", "llama", "marian", "mbart", "mistral", "mixtral", "mobilebert",
    "modernbert", "mpt", "mt5", "nystromformer", "olmo2", "olmoe", "opt", "pegasus", "persimmon",
    "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "roberta", "rwkv", "smollm3", "stablelm",
    "starcoder2", "t5", "umt5", "whisper", "xglm", "xlm-roberta"
]  # fmt: skip
# On all linear layers PEFT is without effect on one whose weight is read, and turns those of
# experts into parameters of its own (see save_adapter).
OTHERWISE_IN_PEFT = ("mobilebert", "mixtral", "olmoe", "qwen3_moe")

# What a configuration calls its sizes; each takes what it knows.
SIZES = dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 32) | dict.fromkeys(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    2) | dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
     "decoder_attention_heads", "num_experts", "num_local_experts", "rotary_dim",
     "relative_attention_num_buckets"), 4) | dict.fromkeys(
    ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim",
     "hidden_dim"), 48) | dict.fromkeys(
    ("max_position_embeddings", "n_positions"), 32) | dict(
    vocab_size=50, num_key_value_heads=2, d_kv=8, head_dim=8, word_embed_proj_dim=32,
    embedding_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    num_experts_per_tok=2, moe_intermediate_size=16, sliding_window=8)  # fmt: skip
KINDS = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForMaskedLM,
)

pytestmark = pytest.mark.filterwarnings("ignore")
transformers.logging.set_verbosity_error()


def tiny(name):
    known = CONFIG_MAPPING[name]()
    sizes = {k: v for k, v in SIZES.items() if hasattr(known, k) or k in known.attribute_map}
    config = CONFIG_MAPPING[name](**sizes)
    kind = next(kind for kind in KINDS if type(config) in kind._model_mapping)
    torch.manual_seed(0)
    return kind.from_config(config).eval()


@torch.no_grad()
def run(model):
    ids = torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(1))
    two = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **two)[0]


def disturb(model):
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_" in name:
                factor.copy_(0.2 * torch.randn(factor.shape))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_an_architecture(name, tmp_path):
    for targets in (ARCHITECTURES[name], "all-linear"):
        model = tiny(name)
        try:
            plain = run(model)
        except NotImplementedError as error:  # of experts, in PyTorch 2.8 without a GPU
            pytest.skip(f"the model itself does not run here: {str(error).splitlines()[0]}")
        add_lora_to_model(model, 4, 8.0, targets)
        assert torch.equal(run(model), plain)
        freeze_non_lora_params(disturb(model))
        output = run(model)
        assert (output - plain).abs().max() > 1e-4

        if targets != "all-linear" or name not in OTHERWISE_IN_PEFT:
            directory = save_adapter(model, tmp_path / "ours")
            theirs = peft.PeftModel.from_pretrained(tiny(name), directory).eval()
            assert torch.equal(run(theirs), output), "PEFT reads ours"

            settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
            theirs = disturb(peft.get_peft_model(tiny(name), settings)).eval()
            theirs.save_pretrained(tmp_path / "theirs")
            loaded = load_adapter(tiny(name), tmp_path / "theirs")
            assert torch.equal(run(loaded), run(theirs)), "we read PEFT's"

        tied = model.get_output_embeddings() in [layer for layer in lora_layers(model)]
        if not (tied and model.config.tie_word_embeddings):
            merge_lora_weights(model)
            torch.testing.assert_close(run(model), output, atol=2e-4, rtol=1e-3)
        unload_lora(model, merge=False)
        assert torch.equal(run(model), plain)
