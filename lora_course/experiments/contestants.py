"""Who is compared in the benchmark, and on what: models, contestants, and that they agree.

Every contestant adapts the same layers of the same model; the frozen weights are shared between
them, so that many fit into memory side by side.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_course.experiments.fused import share_inputs
from lora_lib.injection import (
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
)
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained
from lora_lib.tokens import batches_by_length, pair_examples
from lora_lib.training import language_model_loss


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


# --- the models and what they are run on ---------------------------------------------------------

TARGETS = {
    "projections": ("q_proj", "k_proj", "v_proj"),
    "decoder": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "course": ("W_q", "W_k", "W_v", "W_o", "linear1", "linear2"),
}


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
        intermediate_size=case.width * 11008 // 4096,
        num_hidden_layers=case.depth,
        num_attention_heads=max(1, case.width // 128),
        vocab_size=case.vocabulary or 1,
        pad_token_id=None,
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
        tokenizer = load_pretrained()[1]
        examples = pair_examples(load_pairs("georgian", "train"), tokenizer)
        batch = next(batches_by_length(examples, case.batch, seed=0)).to(device)
        return lambda model: (language_model_loss(model, batch), None)
    if case.vocabulary:
        ids = torch.randint(case.vocabulary, (case.batch, case.length), device=device)
        return lambda model: (model(input_ids=ids, labels=ids).loss, None)
    shape = case.batch, case.length, case.width
    x, gradient = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))

    def run(model: nn.Module) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        if case.model == "projections":
            return model(leaf), gradient
        return model(inputs_embeds=leaf).last_hidden_state, gradient

    return run


# --- the contestants -----------------------------------------------------------------------------


def _full(model: nn.Module, case: Case) -> nn.Module:
    return copy.deepcopy(model).requires_grad_()


def _frozen(model: nn.Module, case: Case) -> nn.Module:
    return model


def _lora_lib(model: nn.Module, case: Case) -> nn.Module:
    add_lora_to_model(model, case.rank, 2.0 * case.rank, TARGETS[case.model], case.dropout)
    freeze_non_lora_params(model)
    return model


def _in_half(model: nn.Module, case: Case) -> nn.Module:
    """With the factors in the base's dtype, as loralib and PEFT without casts have them."""
    model = _lora_lib(model, case)
    for A, B in factors(model).values():
        A.data, B.data = (factor.data.to(getattr(torch, case.dtype)) for factor in (A, B))
    return model


def _fused(model: nn.Module, case: Case) -> nn.Module:
    return share_inputs(_lora_lib(model, case))


def _peft(model: nn.Module, case: Case, **settings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=case.rank,
        lora_alpha=2 * case.rank,
        lora_dropout=case.dropout,
        target_modules=list(TARGETS[case.model]),
    )
    return get_peft_model(model, config, **settings)


def _peft_without_casts(model: nn.Module, case: Case) -> nn.Module:
    return _peft(model, case, autocast_adapter_dtype=False)


def _loralib(model: nn.Module, case: Case) -> nn.Module:
    import loralib

    for path, linear in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS[case.model]:
            layer = loralib.Linear(
                linear.in_features,
                linear.out_features,
                r=case.rank,
                lora_alpha=2 * case.rank,
                lora_dropout=case.dropout,
                merge_weights=False,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            layer.weight, layer.bias = linear.weight, linear.bias
            model.set_submodule(path, layer)
    loralib.mark_only_lora_as_trainable(model)
    return model


def _merged(model: nn.Module, case: Case) -> nn.Module:
    return merge_lora_weights(set_factors(_lora_lib(copy.deepcopy(model), case)))


def _unloaded(model: nn.Module, case: Case) -> nn.Module:
    return unload_lora(_merged(model, case))


LORA, FLOOR, CEILING = "lora_lib", "frozen", "full"
MAKE = {
    LORA: _lora_lib,
    FLOOR: _frozen,
    CEILING: _full,
    "PEFT": _peft,
    "PEFT without casts": _peft_without_casts,
    "loralib": _loralib,
    "lora_lib without casts": _in_half,
    "lora_lib, fused": _fused,
    "lora_lib, merged": _merged,
    "lora_lib, unloaded": _unloaded,
}


def entrants(case: Case) -> list[str]:
    """Who takes part. `frozen` is the floor (no weight gets a gradient, the input does), `full` the
    ceiling. On a half precision base `lora_lib` and PEFT keep float32 factors, and PEFT casts x;
    loralib's factors, and everybody's "without casts", have the base's dtype.
    """
    if case.mode == "inference":
        return [LORA, FLOOR, "lora_lib, merged", "lora_lib, unloaded"]
    names = [LORA, FLOOR, CEILING, "PEFT", "loralib", "lora_lib, fused"]
    names += [f"{name} without casts" for name in (LORA, "PEFT")]
    without = set()
    if case.dtype == "float32":
        without |= {"lora_lib without casts", "PEFT without casts"}  # nothing to cast
    if case.dropout or case.model == "course" or case.mode == "compiled":
        without |= {"lora_lib, fused"}
    if case.mode == "compiled":
        without |= {f"{name} without casts" for name in (LORA, "PEFT")} | {
            "loralib"
        }  # it takes time
    if case.vocabulary:
        without |= {CEILING, "loralib", "lora_lib, fused"}
    return [name for name in names if name not in without]


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


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
            values = size * torch.randn(factor.shape, generator=generator)
            factor.copy_(values.bfloat16())
    return model


def make(name: str, base: nn.Module, case: Case) -> nn.Module:
    """The model of a contestant on the weights of `base`, which stays as it is."""
    model = set_factors(MAKE[name](sharing_weights(base), case))
    if case.mode == "compiled":
        torch._dynamo.config.recompile_limit = 64  # the blocks of all contestants share their code
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                module.compile()
    return model


class Contestant:
    """A model with its optimizer; `step` is one whole training step (or one forward pass)."""

    def __init__(self, model: nn.Module, case: Case, run: Pass):
        self.model, self.case, self.run = model, case, run
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = None
        if self.parameters and case.mode != "inference":
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)

    def step(self) -> None:
        if self.case.mode == "inference":
            with torch.inference_mode():
                self.run(self.model)
            return
        self.clear_gradients()
        torch.autograd.backward(*self.run(self.model))
        if self.optimizer:
            self.optimizer.step()

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def outputs_and_gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the gradient of every factor; without dropout."""
        self.clear_gradients()
        # Checkpointing works in train mode only; compiled code would be compiled once more.
        self.model.train(self.case.mode in ("checkpointed", "compiled"))
        output, gradient = self.run(self.model)
        torch.autograd.backward(output, gradient)
        gradients = {
            f"{path}.{name}": factor.grad
            for path, both in factors(self.model).items()
            for name, factor in zip("AB", both, strict=True)
        }
        self.clear_gradients()
        self.model.train()
        return output.detach(), gradients


# --- agreement -----------------------------------------------------------------------------------

# Rounding only: a scaling that is wrong by a factor of 2 gives 0.5 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


def relative_difference(values: list[Tensor], references: list[Tensor]) -> float:
    """‖value − reference‖ / ‖reference‖ over all tensors together, in float32."""
    difference = sum(
        (v.float() - r.float()).square().sum() for v, r in zip(values, references, strict=True)
    )
    return (difference / sum(r.float().square().sum() for r in references)).sqrt().item()


class Disagreement(AssertionError):
    """Two contestants do not compute the same, so their times are not to be compared."""


def differences(contestant: Contestant, reference: tuple[Tensor, dict]) -> dict[str, float]:
    """How far the output, and the gradients of all factors, are from the reference's.

    Raises Disagreement if that is more than rounding.
    """
    output, gradients = contestant.outputs_and_gradients()
    if gradients.keys() != reference[1].keys():
        raise Disagreement(f"other layers are adapted: {gradients.keys() ^ reference[1].keys()}")
    found = {
        "output": relative_difference([output], [reference[0]]),
        "gradients": relative_difference(
            [gradients[name] for name in reference[1]], list(reference[1].values())
        ),
    }
    limit = TOLERANCE[contestant.case.dtype]
    if any(value > limit for value in found.values()):
        raise Disagreement(f"{found}, at most {limit} is rounding: {contestant.case}")
    return found
