"""What `lora_course.experiments.timing` times: models, their inputs, and methods to train them.

All methods of a case adapt the same layers of one model and share its frozen weights, so that many
fit into memory side by side.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
)
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained
from lora_lib.scores import language_model_loss
from lora_lib.tokens import batches_by_length, pair_examples


@dataclass(frozen=True)
class Case:
    """One model, one input, one way to run it.

    `model`: "projections" (`depth` times q, k and v of one input, summed, and nothing else),
    "decoder" (Llama-shaped, `depth` blocks, heads of 128; with a vocabulary also embedding, output
    layer and loss) or "course" (the course's base, on a batch of its pairs).
    `mode`: "train", "compiled" (block by block), "checkpointed" (activations of a block are
    computed again in the backward pass), or "inference" (no gradients).
    """

    model: str
    width: int = 128
    depth: int = 4
    batch: int = 1
    length: int = 512
    vocabulary: int = 0
    dtype: str = "float32"
    rank: int = 16
    dropout: float = 0.0
    mode: str = "train"

    @property
    def inner_width(self) -> int:
        """Of the decoder's feed-forward layers, as much wider as Llama's."""
        return self.width * 11008 // 4096


TARGETS = {
    "projections": ("q_proj", "k_proj", "v_proj"),
    "decoder": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "course": ("W_q", "W_k", "W_v", "W_o", "linear1", "linear2"),
}

SEVEN_B = Case("decoder", 4096, 32, batch=16, vocabulary=32000, dtype="bfloat16")  # Llama-2-7B's

# --- the models and what they are run on ---------------------------------------------------------


class Projections(nn.Module):
    """q, k and v of one input, summed, `depth` times: all that is saved, the linear layers save."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})
            for names in [TARGETS["projections"]] * depth
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer["q_proj"](x) + layer["k_proj"](x) + layer["v_proj"](x)
        return x


def build(case: Case, device: torch.device) -> nn.Module:
    """The base model of a case, frozen, with random weights (the course's base: its own)."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(0)
    if case.model == "course":
        model = load_pretrained()[0].to(device, dtype)
        _let_gradients_reach(model.token_embedding)
    elif case.model == "projections":
        model = Projections(case.width, case.depth).to(device, dtype)
    else:
        model = _decoder(case, device, dtype)
        if case.vocabulary:
            _let_gradients_reach(model.get_input_embeddings())
    return model.requires_grad_(False).train(case.mode != "inference")


def _decoder(case: Case, device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=case.width,
        intermediate_size=case.inner_width,
        num_hidden_layers=case.depth,
        num_attention_heads=case.width // 128,
        vocab_size=case.vocabulary or 1,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    kind = AutoModelForCausalLM if case.vocabulary else AutoModel
    with device:
        model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if case.mode == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _let_gradients_reach(embedding: nn.Embedding) -> None:
    """As in the middle of a model: also a frozen one computes the gradient of its input."""
    embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


Pass = Callable[[nn.Module], tuple[Tensor, Tensor | None]]


def forward_pass(case: Case, device: torch.device) -> Pass:
    """model → (output, its gradient): a loss and None, or an output and a fixed random gradient."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(1)
    if case.model == "course":
        examples = pair_examples(load_pairs("georgian", "train"), load_pretrained()[1])
        batch = next(batches_by_length(examples, case.batch, seed=0)).to(device)
        return lambda model: (language_model_loss(model, batch), None)
    if case.vocabulary:
        ids = torch.randint(case.vocabulary, (case.batch, case.length), device=device)
        mixed = dtype == torch.float32  # full fine-tuning with 16 bytes a parameter

        def loss(model: nn.Module) -> tuple[Tensor, None]:
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                return model(input_ids=ids, labels=ids).loss, None

        return loss
    shape = case.batch, case.length, case.width
    x, gradient = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))

    def output(model: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        if case.model == "projections":
            return model(leaf), gradient
        return model(inputs_embeds=leaf).last_hidden_state, gradient

    return output


# --- the methods ---------------------------------------------------------------------------------


def _lora_lib(model: nn.Module, case: Case) -> nn.Module:
    add_lora_to_model(model, case.rank, 2.0 * case.rank, TARGETS[case.model], case.dropout)
    freeze_non_lora_params(model)
    return model


def _lora_lib_without_casts(model: nn.Module, case: Case) -> nn.Module:
    for A, B in factors(_lora_lib(model, case)).values():
        A.data, B.data = (factor.data.to(getattr(torch, case.dtype)) for factor in (A, B))
    return model


def _peft(model: nn.Module, case: Case, **settings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=case.dropout,
        target_modules=list(TARGETS[case.model]),
    )
    return get_peft_model(model, config, **settings)


def _loralib(model: nn.Module, case: Case) -> nn.Module:
    import loralib

    lora = dict(r=case.rank, lora_alpha=2 * case.rank, lora_dropout=case.dropout)
    for path, linear in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS[case.model]:
            like = dict(device=linear.weight.device, dtype=linear.weight.dtype)
            shape = linear.in_features, linear.out_features
            layer = loralib.Linear(*shape, merge_weights=False, **lora, **like)
            layer.weight, layer.bias = linear.weight, linear.bias
            model.set_submodule(path, layer)
    loralib.mark_only_lora_as_trainable(model)
    return model


def _merged(model: nn.Module, case: Case) -> nn.Module:
    return merge_lora_weights(set_factors(_lora_lib(copy.deepcopy(model), case)))


# How full fine-tuning may keep weights, gradients and Adam's two means: in float32, or in bfloat16.
# Products are computed in bfloat16 either way.
FULL = ("full, 16 bytes a parameter", "full, 8 bytes a parameter")
METHODS = {
    "lora_lib": _lora_lib,
    "frozen": lambda model, case: model,
    "full": lambda model, case: copy.deepcopy(model).requires_grad_(),
    "PEFT": _peft,
    "loralib": _loralib,
    "lora_lib without casts": _lora_lib_without_casts,
    "PEFT without casts": partial(_peft, autocast_adapter_dtype=False),
    "lora_lib, merged": _merged,
    "lora_lib, unloaded": lambda model, case: unload_lora(_merged(model, case)),
    **dict.fromkeys(FULL, lambda model, case: model.requires_grad_()),  # alone: no copy is made
}


def methods(case: Case) -> list[str]:
    """What is compared. `frozen` is the floor (no weight gets a gradient, the input does), `full`
    the ceiling. On a base in 16 bits `lora_lib` and PEFT keep float32 factors, and PEFT casts x;
    loralib's factors, and those "without casts", have the base's dtype.
    """
    merged, left_out = ["lora_lib, merged", "lora_lib, unloaded"], list(FULL)
    if case.mode == "inference":
        return ["lora_lib", "frozen", *merged]
    if case.mode == "compiled":  # it takes a minute each
        return ["lora_lib", "frozen", "full", "PEFT"]
    left_out += merged
    if case.dtype == "float32":
        left_out += ["lora_lib without casts", "PEFT without casts"]  # nothing to cast
    if case.vocabulary:
        left_out += ["loralib", "full"]
    return [name for name in METHODS if name not in left_out]


_CHECKPOINTED = replace(SEVEN_B, mode="checkpointed")
SEVEN_B_CASES = (  # what is too large to stand beside others is timed alone
    (SEVEN_B, methods(SEVEN_B)),
    (_CHECKPOINTED, methods(_CHECKPOINTED)),
    (replace(_CHECKPOINTED, depth=23, dtype="float32"), FULL[:1]),  # the deepest that 80 GB hold
    (_CHECKPOINTED, FULL[1:]),
)


def make(method: str, base: nn.Module, case: Case) -> nn.Module:
    """The model of a method on the weights of `base`, which stays as it is."""
    sharing_weights = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model = set_factors(METHODS[method](sharing_weights, case))
    if case.mode == "compiled":
        torch._dynamo.config.recompile_limit = 64  # the blocks of all methods share their code
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                module.compile()
    return model


def factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Path of every adapted layer → its A (r, d_in) and B (d_out, r), whichever library made it."""
    found = {}
    for path, module in model.named_modules():
        A, B = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if isinstance(A, nn.Parameter):
            found[path] = A, B
        elif isinstance(A, nn.ModuleDict):  # PEFT
            found[path.removeprefix("base_model.model.")] = A["default"].weight, B["default"].weight
    return found


@torch.no_grad()
def set_factors(model: nn.Module) -> nn.Module:
    """The same random values for every library, exact in bfloat16; ΔW x is about as large as W x,
    so that an error in the low-rank path shows."""
    generator = torch.Generator().manual_seed(2)
    for A, B in factors(model).values():
        rank, width = A.shape
        for factor, size in ((A, width**-0.5), (B, (12 * rank) ** -0.5)):
            factor.copy_((size * torch.randn(factor.shape, generator=generator)).bfloat16())
    return model
