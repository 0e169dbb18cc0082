"""Checks for notebook 03: injection by name, freezing, and two questions."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Choice, Exercise, Wrong
from lora_lib.injection import add_lora_to_model
from lora_lib.lora import LoRALinear

# --- a model full of names that are easily confused ----------------------------------------------

_WIDTH = 6


class _Part(nn.Module):
    """q, beside names that contain it, start with it, or end in it without a dot."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(_WIDTH, _WIDTH)
        self.q_norm = nn.Linear(_WIDTH, _WIDTH)
        self.seq = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.q(x) + self.q_norm(x) * self.seq(x))


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = _Part()
        self.memory = _Part()
        self.norm = nn.LayerNorm(_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.memory(self.attention(x)))


class _Model(nn.Module):
    """A q at the top as well; a head, a header, and "lora" inside the name of a base module."""

    def __init__(self):
        super().__init__()
        self.flora = nn.Embedding(9, _WIDTH)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.q = nn.Linear(_WIDTH, _WIDTH)
        self.header = nn.Linear(_WIDTH, _WIDTH)
        self.head = nn.Linear(_WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.flora(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.header(self.q(x)))


# --- injection by name ---------------------------------------------------------------------------


def _test_inject(answer: Callable) -> None:
    whole = {"q"} | {f"blocks.{i}.{part}.q" for i in range(2) for part in ("attention", "memory")}
    _check_injection(answer, "q", whole)
    _check_injection(answer, "attention.q", {f"blocks.{i}.attention.q" for i in range(2)})


def _check_injection(answer: Callable, target: str, expected: set[str]) -> None:
    model = _Model()
    plain = copy.deepcopy(model)
    original = dict(model.named_modules())
    ids = torch.randint(9, (4, 5))
    rank, alpha = 3, 7.0
    returned = answer(model, target, rank, alpha)
    found = {p: m for p, m in model.named_modules() if isinstance(m, LoRALinear)}
    _diagnose_paths(target, found.keys(), expected, returned)
    for path, layer in found.items():
        if layer.original is not original[path]:
            raise Wrong(
                f"{path} holds a LoRALinear around another nn.Linear than the one that was there; "
                "wrap the very module, so that its pretrained weight stays"
            )
        if (layer.rank, layer.alpha) != (rank, alpha):
            raise Wrong(
                f"{path} has rank {layer.rank} and alpha {layer.alpha}, but your function got "
                f"rank {rank} and alpha {alpha}; pass them on to LoRALinear"
            )
        if layer.original.weight.requires_grad:
            raise Wrong(f"the wrapped weight of {path} is trainable; LoRALinear had frozen it")
    with torch.no_grad():
        difference = (model(ids) - plain(ids)).abs().max().item()
    if difference > 1e-5:
        raise Wrong(
            f"the model's output moved by {difference:.3g}; with B at zero an injection changes "
            "nothing, so some weight must have changed"
        )


def _diagnose_paths(target: str, found, expected: set[str], returned) -> None:
    nested = [path for path in found if path.endswith(".original")]
    if nested:
        raise Wrong(f"{nested[0]!r} is LoRA inside LoRA; each layer is to be wrapped once")
    extra, missing = sorted(set(found) - expected), sorted(expected - set(found))
    if not found:
        if isinstance(returned, nn.Module) and any(
            isinstance(m, LoRALinear) for m in returned.modules()
        ):
            raise Wrong("you changed a copy; replace the layers in the model that was passed")
        if "." in target:
            raise Wrong(
                f"the target {target!r} matched nothing; a target may have several pieces, so "
                "compare it with the end of the whole path, not with the last piece"
            )
        raise Wrong(
            "no layer of the model was replaced; a LoRALinear that is only made changes nothing: "
            "put it into the model with model.set_submodule(path, layer)"
        )
    if any(path.endswith("head") for path in extra):
        raise Wrong(f"{extra[-1]!r} was replaced too: compare each path with the target first")
    if extra and all(path.endswith(target) for path in extra):
        raise Wrong(
            f"{extra[0]!r} was replaced, but its name only ends in the same letters as {target!r}; "
            "ask for a dot in front of the target"
        )
    if extra:
        raise Wrong(
            f"{extra[0]!r} was replaced, since it contains {target!r} somewhere; a target is the "
            "end of a path, after a dot, not any part of it"
        )
    if missing == [target]:
        raise Wrong(
            f"{target!r} at the top of the model was left out: its whole path is the target, with "
            "no dot before it; compare for equality as well"
        )
    if missing:
        raise Wrong(
            f"{missing[0]!r} was left out; model.named_modules() visits every depth, "
            "named_children() only the top"
        )


inject = Exercise(
    "03 inject",
    _test_inject,
    contract="inject(model, target, rank, alpha) replaces layers in the model and returns it.",
    why="Path equal to the target, or ending in a dot and the target: the rule of PEFT's lists, "
    "which the library follows; and nothing in the model's own code had to change.",
    hints=[
        "Go over list(model.named_modules()), which gives (path, module) for every depth, and "
        "keep what is an nn.Linear.",
        'A path matches if path == target or path.endswith("." + target).',
        "model.set_submodule(path, LoRALinear(module, rank, alpha)) puts the new layer in place.",
    ],
)


# --- what trains ---------------------------------------------------------------------------------


def _test_freeze(answer: Callable) -> None:
    _check_freeze(answer, ("head",), all_frozen=False)
    _check_freeze(answer, ("head",), all_frozen=True)
    _check_freeze(answer, (), all_frozen=False)


def _check_freeze(answer: Callable, saved: tuple[str, ...], all_frozen: bool) -> None:
    model, _ = add_lora_to_model(_Model(), rank=2, target_modules=["q"], modules_to_save=saved)
    if all_frozen:
        model.requires_grad_(False)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    answer(model, saved)
    if {name for name, _ in model.named_parameters()} != values.keys():
        raise Wrong("the model's parameters changed; only their requires_grad is to be set")
    factors = {name for name in values if name.endswith((".lora_A", ".lora_B"))}
    heads = {name for name in values if name.startswith("head.")} if saved else set()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    _diagnose_trainable(trainable, factors, heads, set(values), all_frozen)
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, values[name]):
            raise Wrong(f"{name} has another value now; freezing changes requires_grad alone")


def _diagnose_trainable(
    trainable: set[str], factors: set[str], heads: set[str], every: set[str], all_frozen: bool
) -> None:
    if not trainable and all_frozen:
        raise Wrong(
            "of a model in which everything was frozen before, as after load_adapter, nothing "
            "trains; switch the factors on explicitly, with requires_grad_(True)"
        )
    if not trainable:
        raise Wrong("nothing trains now; freeze everything, then switch the LoRA factors on again")
    if trainable >= every - {n for n in every if ".original." in n}:
        raise Wrong("nothing was frozen but what LoRALinear had frozen itself; the rest is base")
    if not factors & trainable:
        raise Wrong("the LoRA factors are frozen; they are named …lora_A and …lora_B")
    if factors - trainable:
        raise Wrong(f"{min(factors - trainable)} is frozen; both factors train")
    if any(".original." in name for name in trainable):
        raise Wrong(
            "a wrapped weight (…original.weight) trains again; that is the base, which stays frozen"
        )
    if any(name.startswith("header.") for name in trainable) and not any(
        name.startswith("blocks.0.norm") for name in trainable
    ):
        raise Wrong(
            '"header" trains, though "head" was named: match the whole path, or its end after a dot'
        )
    if any(name.startswith("flora.") for name in trainable) and not any(
        name.startswith("blocks.0.norm") for name in trainable
    ):
        raise Wrong(
            'the embedding named "flora" trains, since its name contains "lora"; ask for the '
            "module's type, isinstance(module, LoRALinear), or for the whole of lora_A and lora_B"
        )
    if not heads and any(name.startswith("head.") for name in trainable):
        raise Wrong("the head trains although modules_to_save was empty")
    extra = trainable - factors - heads
    if extra:
        raise Wrong(f"{min(extra)} still trains; freeze every parameter first, then switch on some")
    if heads and not heads & trainable:
        raise Wrong("the head, named in modules_to_save, is frozen; it is to train whole")
    if heads - trainable:
        raise Wrong(f"{min(heads - trainable)} is frozen; a saved module trains with all its parts")


freeze = Exercise(
    "03 freeze",
    _test_freeze,
    contract="freeze(model, saved) sets requires_grad of the parameters; saved holds names.",
    why="Freezing everything and then switching on what trains, by name, also works on a model "
    "that came in frozen; nothing new in the model can slip through.",
    hints=[
        "Start with model.requires_grad_(False).",
        "Then go over model.named_modules(): in every LoRALinear, lora_A and lora_B train.",
        "A module whose path is a name in modules_to_save, or ends in a dot and that name, trains "
        "whole: module.requires_grad_(True).",
    ],
)


# --- two questions -------------------------------------------------------------------------------

target_match = Choice(
    "03 target_match",
    "A model has, in each block, mlp.up, mlp.gate_up and mlp.up_norm, all nn.Linear. Which does "
    'target_modules=["up"] adapt?',
    {
        "a": "mlp.up and mlp.gate_up, which end in it",
        "b": "all three, which contain it",
        "c": "mlp.up of every block",
        "d": "none: the whole path, blocks.0.mlp.up, is needed",
    },
    right="c",
    why="A target is a whole path or its end after a dot, so one short name catches the same layer "
    "in every block, and no other.",
    misconceptions={
        "a": 'the end has to come after a dot: ".up" ends blocks.0.mlp.up, not …gate_up',
        "b": "a target is not searched for inside the path; it is compared with its end",
        "d": "the end of the path is enough; a whole path names one layer of one block only",
    },
)

frozen_head = Choice(
    "03 frozen_head",
    "You build a classifier on the base with classifier_from, adapt W_q and W_v with no "
    "modules_to_save, and training goes well. You save the adapter, and tomorrow you load it into "
    "a new classifier built the same way. Its predictions are",
    {
        "a": "the same: the adapter holds everything that was trained",
        "b": "those of another random head",
        "c": "the same: the head was frozen, so it cannot have changed",
        "d": "none: load_adapter raises, since the head does not fit",
    },
    right="b",
    why="The head was neither in the base's file nor in the adapter's; name it in modules_to_save, "
    "and it is trained and saved.",
    misconceptions={
        "a": "it does, and that is too little: the output also needs the head that the factors "
        "were trained against",
        "c": "it did not change while training, but classifier_from draws a new one at random "
        "every time it is called",
        "d": "every head of this shape fits, and an adapter without a head asks for none; nothing "
        "can be noticed",
    },
)
