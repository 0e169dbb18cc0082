"""SmallTransformer: a causal transformer small enough to train on a laptop.

Reading order: attention, feed-forward, block, model. Shapes in comments: B sequences, T positions,
d = d_model, h heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValueCache = dict["MultiHeadAttention", tuple[Tensor, Tensor]]


class MultiHeadAttention(nn.Module):
    """Causal self-attention with separate projections W_q, W_k, W_v, W_o, none with a bias.

    Raises ValueError unless n_heads is positive and divides d_model.
    """

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.1):
        super().__init__()
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"d_model {d_model} is not divisible by n_heads {n_heads}; choose a positive "
                "number that divides it"
            )
        self.n_heads = n_heads
        self.dropout = dropout
        self.W_q = nn.Linear(d_model, d_model, bias=False)
        self.W_k = nn.Linear(d_model, d_model, bias=False)
        self.W_v = nn.Linear(d_model, d_model, bias=False)
        self.W_o = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        def split(y: Tensor) -> Tensor:  # (B, T, d) -> (B, h, T, d/h)
            return y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

        q, k, v = split(self.W_q(x)), split(self.W_k(x)), split(self.W_v(x))
        first_call = cache is None or self not in cache
        if cache is not None:
            if not first_call:
                k, v = (torch.cat(both, dim=2) for both in zip(cache[self], (k, v), strict=True))
            cache[self] = k, v
        # With a filled cache the one new position may look at everything before it.
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=first_call)
        return self.W_o(y.transpose(1, 2).flatten(-2))  # (B, T, d)


class FeedForward(nn.Module):
    """linear1 (d → d_ff, 4d if None), GELU, linear2 (d_ff → d), at each position."""

    def __init__(self, d_model: int, d_ff: int | None = None, dropout: float = 0.1):
        super().__init__()
        d_ff = d_ff or 4 * d_model
        self.linear1 = nn.Linear(d_model, d_ff)
        self.linear2 = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.gelu(self.linear1(x))))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each behind a LayerNorm and added to its input (pre-norm)."""

    def __init__(self, d_model: int, n_heads: int, dropout: float = 0.1):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, n_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x), cache))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class SmallTransformer(nn.Module):
    """Token and position embeddings, pre-norm causal blocks, and one output layer, `classifier`.

    A classifier, which reads the last token: logits (B, num_classes). With `language_model`, which
    scores the next token at every position: logits (B, T, vocab_size).

    Raises ValueError as MultiHeadAttention, and for a language model with other than vocab_size
    classes.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        n_layers: int,
        num_classes: int,
        max_len: int = 128,
        dropout: float = 0.1,
        *,
        language_model: bool = False,
    ):
        super().__init__()
        if language_model and num_classes != vocab_size:
            raise ValueError(
                f"num_classes is {num_classes}; a language model needs one for each of its "
                f"{vocab_size} tokens, and a classifier is built without language_model=True"
            )
        self.max_len = max_len
        self.is_language_model = language_model
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_len, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, dropout) for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model)
        self.classifier = nn.Linear(d_model, num_classes)
        for embedding in (self.token_embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits for `input_ids` (B, T), padded on the right if at all.

        `attention_mask` (B, T) is 1 on tokens and 0 on padding; the classifier reads the last 1.
        No mask is needed inside: attention is causal, so no token sees the padding behind it.
        `cache`, an empty dict at first, keeps keys and values while text is generated one token
        at a time.

        Raises ValueError if a sequence is longer than max_len, or for several tokens with a filled
        cache.
        """
        past = next(iter(cache.values()))[0].shape[2] if cache else 0
        new = input_ids.shape[1]
        if past and new > 1:  # the first of them would see those after it
            raise ValueError(f"with a filled cache give one token at a time; {new} were given")
        length = past + new
        if length > self.max_len:
            raise ValueError(
                f"a sequence of {length} tokens was given, but this model has {self.max_len} "
                "positions (max_len): shorten the input or build the model with a larger max_len"
            )
        positions = torch.arange(past, length, device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        x = self.dropout(x)  # (B, T, d)
        for block in self.blocks:
            x = block(x, cache)
        if not self.is_language_model:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            last = mask.long().sum(dim=1) - 1
            x = x[torch.arange(len(x), device=x.device), last]  # (B, d)
        return self.classifier(self.final_norm(x))


def classifier_from(base: SmallTransformer, num_classes: int) -> SmallTransformer:
    """Turn `base` itself into a classifier: its body stays, the output layer is new and random."""
    head = nn.Linear(base.classifier.in_features, num_classes)
    base.classifier = head.to(base.classifier.weight).train(base.training)  # its device and dtype
    base.is_language_model = False
    return base


def default_device() -> torch.device:
    """The best device at hand: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
