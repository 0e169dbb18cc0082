"""Where a model looks while it writes a name."""

import math

import torch
from torch import Tensor

from lora_lib.model import SmallTransformer
from lora_lib.scores import transliterate
from lora_lib.tokens import Tokenizer


@torch.no_grad()
def writing_attention(
    model: SmallTransformer, tokenizer: Tokenizer, name: str, block: int, head: int
) -> tuple[Tensor, str]:
    """The weights of one head, a row for each letter written and a column for BOS, each Latin
    letter and SEP; and what is written. Letters already written have no column."""
    [written] = transliterate(model, tokenizer, [name])
    attention, kept = model.blocks[block].attention, {}
    hooks = [
        getattr(attention, layer).register_forward_hook(
            lambda _module, _input, output, layer=layer: kept.update({layer: output[0]})
        )
        for layer in ("W_q", "W_k")
    ]
    model(torch.tensor([tokenizer.pair(name, written)]))
    for hook in hooks:
        hook.remove()
    q, k = (kept[layer].unflatten(-1, (attention.n_heads, -1))[:, head] for layer in kept)
    scores = q @ k.T / math.sqrt(q.shape[-1])  # (T, T)
    future = torch.ones_like(scores).triu(1).bool()
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    width = len(name) + 2
    return weights[width - 1 : width - 1 + len(written), :width], written


def near_the_diagonal(weights: Tensor) -> float:
    """The mean share of a row's weight from one letter before its own place to two behind it."""
    return sum(weights[i, i : i + 4].sum().item() for i in range(len(weights))) / len(weights)
