"""Weights in four bits, as QLoRA keeps them (Dettmers et al. 2023, arXiv 2305.14314), and in fewer.

A matrix is cut into blocks of 64 numbers. Of each block its largest size is kept, as its scale, and
for every number the nearest of 2^bits levels between −1 and 1, as a code. The scales are kept in
the same way, in 8 bits (double quantisation, §3). Nothing here is tuned for speed: bitsandbytes has
the kernels for that.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_course.directions import lora_by_path

# --- levels --------------------------------------------------------------------------------------


def normal_levels(bits: int) -> Tensor:
    """2^bits levels for weights that are normally distributed, from −1 to 1, one of them 0.

    They are quantiles, evenly far apart in probability: with four bits 9 from the middle up and 8
    from the middle down. δ of the probability lies outside the outermost, which is half a step,
    the mean of both sides' (QLoRA, appendix E; `create_normal_map` of bitsandbytes has 1 − δ as
    0.9677083). The largest of 64 normal numbers lies further out than that, so that the middle
    levels are used most (Yoshida 2023, arXiv 2306.06965).
    """
    half = 2 ** (bits - 1)
    delta = (1 / (4 * half) + 1 / (4 * half - 2)) / 2

    def quantiles(number: int) -> Tensor:
        p = torch.linspace(0.5, 1 - delta, number, dtype=torch.float64)
        return torch.special.ndtri(p)  # the inverse of the normal distribution

    below, above = -quantiles(half).flip(0), quantiles(half + 1)[1:]  # 0 once
    levels = torch.cat((below, above))
    return (levels / levels.max()).float()


def even_levels(bits: int) -> Tensor:
    """2^bits levels from −1 to 1, evenly spaced."""
    return torch.linspace(-1, 1, 2**bits)


@cache  # constants: one copy of them serves every layer
def levels_on(device: torch.device, kind: str, bits: int) -> Tensor:
    return {"normal": normal_levels, "even": even_levels}[kind](bits).to(device)


# --- numbers to codes and back -------------------------------------------------------------------


class Format(NamedTuple):
    """How a matrix is kept: `bits` a number, levels "normal" or "even", a scale for every `block`
    numbers (None: every row), the scales in 8 bits if `double`."""

    bits: int
    kind: str
    block: int | None = 64
    double: bool = True


FORMATS = {
    "int8": Format(8, "even", block=None, double=False),
    "NF4": Format(4, "normal"),
    "4 bits, even": Format(4, "even"),
    "NF3": Format(3, "normal"),
    "3 bits, even": Format(3, "even"),
    "2 bits, even": Format(2, "even"),
}


def quantise(values: Tensor, bits: int, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """`values`, of any shape, as bytes of packed codes and a float32 scale for every block.

    The last block is filled up with zeros. Raises ValueError for numbers that are not finite.
    """
    flat = values.detach().float().flatten()
    if not torch.isfinite(flat).all():
        raise ValueError("there are numbers that are not finite; they have no nearest level")
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)  # (blocks,)
    levels = levels_on(flat.device, kind, bits)
    between = (levels[1:] + levels[:-1]) / 2
    relative = blocks * (1 / absmax.clamp(min=1e-38))[:, None]  # from −1 to 1
    codes = torch.bucketize(relative, between).to(torch.uint8)
    return regroup(codes.flatten(), bits, 8), absmax


def dequantise(packed: Tensor, absmax: Tensor, bits: int, kind: str) -> Tensor:
    """The numbers that the codes stand for, (n,), in float32, the zeros of the end included."""
    codes = regroup(packed, 8, bits).int()
    values = levels_on(packed.device, kind, bits).index_select(0, codes)
    return (values.view(len(absmax), -1) * absmax[:, None]).flatten()


def regroup(numbers: Tensor, have: int, want: int) -> Tensor:
    """Numbers of `have` bits as a stream of bits, cut anew into numbers of `want` bits, all uint8.

    High bits come first, so of two codes of four bits in a byte the first has the higher half.
    `want` numbers at a time become `have` numbers, through a word of have · want ≤ 32 bits.
    """
    if have == want:
        return numbers
    device = numbers.device
    words = numbers.view(-1, want).int() << _shifts(have, want, device)
    words = words.sum(dim=1, keepdim=True, dtype=torch.int32)
    return (words >> _shifts(want, have, device) & 2**want - 1).to(torch.uint8).flatten()


@cache
def _shifts(bits: int, number: int, device: torch.device) -> Tensor:
    return bits * torch.arange(number - 1, -1, -1, dtype=torch.int32, device=device)


# --- a layer, and a model ------------------------------------------------------------------------


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is kept as codes. `weight` holds their bytes, so nothing
    can be added to it: LoRA adds outputs."""

    def __init__(self, linear: nn.Linear, form: Format):
        nn.Module.__init__(self)  # nn.Linear's would make a matrix of floats
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.kind, self.block, self.double = self.form = form
        weight = linear.weight
        packed, absmax = quantise(weight, self.bits, self.kind, self.block or weight.shape[1])
        if self.double:
            self.register_buffer("mean", absmax.mean())
            absmax, outer = quantise(absmax - self.mean, 8, "even", 256)
            self.register_buffer("outer_absmax", outer)
        self.register_buffer("absmax", absmax)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (…, d_in) → (…, d_out)."""
        y = _TimesWeight.apply(x, self)
        return y if self.bias is None else y + self.bias

    def dequantise(self) -> Tensor:
        """The weight that it computes with, (d_out, d_in), in float32."""
        absmax = self.absmax
        if self.double:
            absmax = self.mean + dequantise(absmax, self.outer_absmax, 8, "even")
        size = self.out_features * self.in_features
        absmax = absmax[: -(-size // (self.block or self.in_features))]
        values = dequantise(self.weight, absmax, self.bits, self.kind)
        return values[:size].view(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.form}"


class _TimesWeight(torch.autograd.Function):
    """x Wᵀ. W is made anew for each direction: kept for the backward pass, as autograd would, the
    floats of every layer would be in memory at once."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantise().to(x.dtype).T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantise().to(gradient.dtype), None


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The frozen linear layer with this weight, (d_out, d_in)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Put make(linear) in the place of every nn.Linear below `model`, in place."""
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    for path, linear in linears:
        model.set_submodule(path, make(linear).train(linear.training))
    return model


def quantise_blocks(model: nn.Module, form: Format | None) -> nn.Module:
    """Quantise the linear layers of every block of a SmallTransformer, in place; None: none.

    Embeddings, norms and the output layer stay, as in QLoRA.
    """
    if form is not None:
        replace_linears(model.blocks, lambda linear: QuantisedLinear(linear, form))
    return model


def block_weights(model: nn.Module) -> Tensor:
    """All that the linear layers of the blocks compute with, in one row, codes as floats."""
    linears = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    weights = [m.dequantise() if isinstance(m, QuantisedLinear) else m.weight for m in linears]
    return torch.cat([weight.detach().flatten() for weight in weights])


def in_floats(model: nn.Module) -> nn.Module:
    """A copy that computes the same with its weights as floats: quicker, where memory is no matter,
    because nothing is looked up in it."""

    def make(linear: nn.Linear) -> nn.Linear:
        coded = isinstance(linear, QuantisedLinear)
        return linear_of(linear.dequantise(), linear.bias) if coded else linear

    return replace_linears(copy.deepcopy(model), make)


def count_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(t.nbytes for t in tensors)


# --- merging -------------------------------------------------------------------------------------


class Linear16(nn.Linear):
    """A linear layer that keeps its weight in bfloat16 and computes as its input is."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().bfloat16(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


@torch.no_grad()
def merged(
    model: nn.Module, make: Callable[[nn.Linear], nn.Module], originals: nn.Module | None = None
) -> nn.Module:
    """A copy of `model` without LoRA: every LoRA layer of its blocks becomes make(a linear layer
    with W + ΔW), that of the output layer, which is not quantised, that linear layer itself.

    W is what the layer computes with, or, given the model before it was quantised as `originals`,
    what it was.
    """
    copied = copy.deepcopy(model)
    for path, layer in lora_by_path(copied).items():
        base = layer.original if originals is None else originals.get_submodule(path)
        W = base.dequantise() if isinstance(base, QuantisedLinear) else base.weight
        linear = linear_of(W + layer.delta_weight(), layer.original.bias)
        copied.set_submodule(path, make(linear) if path.startswith("blocks.") else linear)
    return copied.train(model.training)
