"""Small random models of the shapes people have: transformers' own classes, and plain PyTorch.

Every function gives the same weights each time, in eval mode. `run(model)` feeds a model an input
of its kind and returns one tensor.
"""

from functools import partial

import torch
import transformers
from torch import Tensor, nn

from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import lora_layers
from lora_lib.model import SmallTransformer

transformers.logging.set_verbosity_error()

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


def tiny(kind: type, **settings) -> nn.Module:
    """A model of one of transformers' classes."""
    known = kind.config_class()
    sizes = {k: v for k, v in SIZES.items() if hasattr(known, k) or k in known.attribute_map}
    return seeded(lambda: kind(kind.config_class(**sizes | settings)))


bert = partial(tiny, transformers.BertForSequenceClassification)
distilbert = partial(tiny, transformers.DistilBertForSequenceClassification)
llama = partial(tiny, transformers.LlamaForCausalLM)
gpt2 = partial(tiny, transformers.GPT2LMHeadModel)


def small(width: int = 24) -> SmallTransformer:
    """The course's own, as a classifier of two blocks."""
    return seeded(lambda: SmallTransformer(20, width, 2, 2, num_classes=3, max_len=8))


class Nested(nn.Module):
    """Lists and dicts in one another. The names mean something in a regular expression, and "c++"
    is the end of another path."""

    def __init__(self):
        super().__init__()
        deep = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8)])])
        self.parts = nn.ModuleDict({"c++": nn.ReLU(), "[0-9]": nn.Linear(6, 8), "deep": deep})
        self.add_module("c++", nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts["c++"](self.parts["[0-9]"](x))
        return getattr(self, "c++")(self.parts["deep"][0][0](x))


def nested() -> nn.Module:
    return seeded(Nested)


def ambiguous() -> nn.Module:
    """ "0" is an nn.Linear; by the rule for names it is also "1.0", one too, and "2.0", none."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8)),
                              nn.Sequential(nn.ReLU(), nn.Linear(8, 3)))
    )  # fmt: skip


def convolutional() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2),
                              nn.Flatten(), nn.Linear(8, 3))
    )  # fmt: skip


def seeded(build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def with_lora(
    model: nn.Module, target_modules=("W_q", "W_v"), *, size: float = 0.1, **settings
) -> nn.Module:
    """`model` itself with LoRA as if trained: all else frozen, and no factor zero."""
    settings = {"rank": 4, "alpha": 8.0} | settings
    add_lora_to_model(model, target_modules=target_modules, **settings)
    freeze_non_lora_params(model)
    return fill(model, size)


@torch.no_grad()
def fill(model: nn.Module, size: float = 0.1) -> nn.Module:
    """Gives every LoRA factor random values, the same each time."""
    generator = torch.Generator().manual_seed(0)
    for layer in lora_layers(model):
        for factor in (layer.lora_A, layer.lora_B):
            factor.copy_(size * torch.randn(factor.shape, generator=generator))
    return model


def example(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if getattr(model, "main_input_name", None) == "input_values":  # sound
        return torch.randn(2, 400, generator=generator)
    if isinstance(model, SmallTransformer | transformers.PreTrainedModel):
        return torch.randint(20, (2, 8), generator=generator)
    *_, bias = model.parameters()  # the first weight may be of integers
    return torch.randn(5, 6, generator=generator).to(bias.dtype)


def run(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal in every key and every bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
