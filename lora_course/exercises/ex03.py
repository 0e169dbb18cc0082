"""Exercises of notebook 03: injection by name, freezing, and two questions."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Choice, Exercise, describe
from lora_lib.lora import LoRALinear, lora_layers

# --- a model full of names that are easily confused ----------------------------------------------

WIDTH = 6


class Part(nn.Module):
    """q, beside names that contain it, start with it, or end in it without a dot."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.Linear(WIDTH, WIDTH)
        self.seq = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.q(x) + self.q_norm(x) * self.seq(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.memory = Part(), Part()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.memory(self.attention(x)))


class Model(nn.Module):
    """A q at the top, a q that is no nn.Linear, a head and a header, "lora" in a base's name."""

    def __init__(self):
        super().__init__()
        self.flora = nn.Embedding(9, WIDTH)
        self.blocks = nn.ModuleList([Block()])
        self.q = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.ModuleDict({"q": nn.LayerNorm(WIDTH)})
        self.header = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.flora(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.header(self.scale["q"](self.q(x))))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(9).view(3, 3))


# --- injection by name ---------------------------------------------------------------------------


def draw_inject() -> Iterator[tuple]:
    yield Model(), "q", 3, 7.0
    yield Model(), "attention.q", 2, 5.0


def observe_inject(inject: Callable, model: nn.Module, target: str, rank: int, alpha: float):
    """Which layers the forward passes, and what it gives, with B at zero and with B filled."""
    start, parameters = run(model), list(model.parameters())
    paths = {module: path for path, module in model.named_modules()}
    returned = inject(model, target, rank, alpha)
    another = "another model" if isinstance(returned, nn.Module) else describe(returned)
    layers, reached = list(lora_layers(model)), set()
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: reached.add(layer))
    kept, moved = {id(p) for p in model.parameters()}, not torch.allclose(run(model), start)
    trainable = {n for x in layers for n, p in x.named_parameters() if p.requires_grad}
    zero = not any(layer.lora_B.any() for layer in layers)
    for layer in layers:
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = torch.linspace(-1, 1, factor.numel()).view_as(factor)
    return {
        "what comes back": "the model" if returned is model else another,
        "pretrained parameters that are gone": sum(id(p) not in kept for p in parameters),
        "LoRA layers that the forward never reaches": len(layers) - len(reached),
        "layers with LoRA": {paths.get(layer.original, "LoRA in LoRA") for layer in reached},
        "B at the start": "zero" if zero else "not zero",
        "the output at the start": "moved" if moved else "as before",
        "the output once B is not zero": run(model),
        "what trains in the LoRA layers": trainable,
    }


def matches(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def injecting(chosen=matches, wrap=LoRALinear, put=nn.Module.set_submodule, kind=nn.Linear):
    """An injection: which paths, what takes the place of a layer, how it gets there."""

    def inject(model: nn.Module, target: str, rank: int, alpha: float) -> nn.Module:
        for path, module in list(model.named_modules()):
            if path and chosen(path, target) and isinstance(module, kind):
                put(model, path, wrap(module, rank, alpha))
        return model

    return inject


reference_inject = injecting()


def around_a_new_linear(module: nn.Linear, rank: int, alpha: float) -> nn.Module:
    return LoRALinear(nn.Linear(module.in_features, module.out_features), rank, alpha)


def with_filled_b(module: nn.Linear, rank: int, alpha: float) -> nn.Module:
    layer = LoRALinear(module, rank, alpha)
    layer.lora_B.data += 1
    return layer


def then(act: Callable[[nn.Module], object], *, first: Callable) -> Callable:
    """`first`, and something more that is done to the model."""

    def both(model: nn.Module, *others):
        returned = first(model, *others)
        act(model)
        return returned

    return both


def only_the_first(model: nn.Module, target: str, rank: int, alpha: float) -> nn.Module:
    for path, module in list(model.named_modules()):
        if matches(path, target) and isinstance(module, nn.Linear):
            model.set_submodule(path, LoRALinear(module, rank, alpha))
            return model


def twice(model: nn.Module, target: str, rank: int, alpha: float) -> nn.Module:
    reference_inject(model, target, rank, alpha)
    return reference_inject(model, target + ".original", rank, alpha)


inject = Exercise(
    "03 inject",
    reference_inject,
    draw_inject,
    observe=observe_inject,
    may_change=True,
    mistakes={
        "not all that matches can be wrapped; ask isinstance(module, nn.Linear) as well": (
            injecting(kind=nn.Module)
        ),
        "nothing comes back; return the changed model": lambda *given: (
            reference_inject(*given) and None
        ),
        "you changed a copy; replace the layers in the model that was passed": (
            lambda model, *others: reference_inject(copy.deepcopy(model), *others)
        ),
        "you wrapped a new nn.Linear; wrap the one that was there, with its pretrained weight": (
            injecting(wrap=around_a_new_linear)
        ),
        'a layer was stored under a name with dots, as setattr(model, "a.b", layer) does, where '
        "the forward never looks; use model.set_submodule(path, layer)": injecting(put=setattr),
        "no layer was replaced; put the new one in with model.set_submodule(path, layer)": (
            injecting(put=lambda *given: None)
        ),
        "every layer was replaced; compare paths with the target": injecting(lambda p, t: True),
        "a path that only contains the target was taken; a target is the end of a path, after a "
        "dot": injecting(lambda p, t: t in p),
        'a name that only ends in the same letters was taken too, as "seq" for "q"; ask for a dot '
        "before the target": injecting(str.endswith),
        "a layer at the top was left out: there the path is the target, with no dot before it": (
            injecting(lambda p, t: p.endswith("." + t))
        ),
        "a target of several pieces was left out; compare it with the end of the whole path": (
            injecting(lambda p, t: p.split(".")[-1] == t)
        ),
        "only the top of the model was searched; named_modules() visits every depth, and a target "
        "is the end of a path": injecting(lambda p, t: p == t),
        "only the first match was replaced; is the return inside the loop?": only_the_first,
        "there is LoRA inside LoRA; each layer is to be wrapped once": twice,
        "B does not start at zero, so the output moved at once": injecting(wrap=with_filled_b),
        "rank and alpha were not passed on to LoRALinear": (
            injecting(wrap=lambda module, rank, alpha: LoRALinear(module))
        ),
        "alpha was not passed on to LoRALinear": (
            injecting(wrap=lambda module, rank, alpha: LoRALinear(module, rank))
        ),
        "the wrapped weights train again; LoRALinear had frozen them": (
            then(lambda model: model.requires_grad_(True), first=reference_inject)
        ),
    },
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


def draw_freeze() -> Iterator[tuple]:
    """As it comes; with everything frozen, as after load_adapter; and with no module to save."""
    for saved, frozen in ((("head", "memory.seq"), False), (("norm",), True), ((), False)):
        model = reference_inject(Model(), "q", 2, 4.0)
        yield model.requires_grad_(False) if frozen else model, saved


def observe_freeze(freeze: Callable, model: nn.Module, saved: tuple[str, ...]) -> dict:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    freeze(model, saved)
    after = dict(model.named_parameters())
    return {
        "names of the parameters": set(after),
        "what trains": {name for name, p in after.items() if p.requires_grad},
        "changed values": {
            n for n in before.keys() & after.keys() if not torch.equal(before[n], after[n])
        },
    }


def is_factor(name: str) -> bool:
    return name.endswith(("lora_A", "lora_B"))


def is_saved(name: str, saved: tuple[str, ...], chosen: Callable = matches) -> bool:
    """Whether the parameter lies in a module whose path is chosen."""
    pieces = name.split(".")[:-1]
    paths = [".".join(pieces[:end]) for end in range(1, len(pieces) + 1)]
    return any(chosen(path, wanted) for path in paths for wanted in saved)


def training(wanted: Callable[[str, tuple[str, ...]], bool]) -> Callable:
    """A freezing that sets every parameter by `wanted(name, saved)`."""

    def freeze(model: nn.Module, saved: tuple[str, ...]) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted(name, saved))

    return freeze


def saving(chosen: Callable[[str, str], bool]) -> Callable:
    """A freezing that keeps the factors, and what lies in a module whose path is chosen."""
    return training(lambda name, saved: is_factor(name) or is_saved(name, saved, chosen))


def only_switches_off(model: nn.Module, saved: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        if not (is_factor(name) or is_saved(name, saved)):
            parameter.requires_grad_(False)


def zero_the_factors(model: nn.Module) -> None:
    for layer in lora_layers(model):
        nn.init.zeros_(layer.lora_A)


reference_freeze = saving(matches)

freeze = Exercise(
    "03 freeze",
    reference_freeze,
    draw_freeze,
    observe=observe_freeze,
    may_change=True,
    mistakes={
        "nothing trains now; switch the LoRA factors on again": training(lambda n, saved: False),
        "everything trains now, the base as well": training(lambda n, saved: True),
        "the LoRA factors are frozen; they are named …lora_A and …lora_B": training(is_saved),
        "A is frozen; both factors train": (
            training(lambda n, saved: n.endswith("lora_B") or is_saved(n, saved))
        ),
        "the wrapped weights, …original.weight, train again; they are the base": (
            training(lambda n, saved: is_factor(n) or ".original." in n or is_saved(n, saved))
        ),
        'an embedding named "flora" trains, since its name contains "lora"; ask for LoRALinear, or '
        "for the whole of lora_A": training(lambda n, saved: "lora" in n or is_saved(n, saved)),
        "of a model that came in frozen, as after load_adapter, nothing trains; switch on what "
        "trains, with requires_grad_(True)": only_switches_off,
        "the modules named in saved are frozen": training(lambda n, saved: is_factor(n)),
        "only the weights of the saved modules train; they train whole, with their biases": (
            training(lambda n, saved: is_factor(n) or (n.endswith("weight") and is_saved(n, saved)))
        ),
        "the head trains although saved is empty": (
            training(lambda n, saved: is_factor(n) or is_saved(n, (*saved, "head")))
        ),
        'a name was looked for anywhere, so "head" also finds "header"; match the whole path, or '
        "its end after a dot": saving(lambda p, name: name in p),
        'a path was compared with its beginning, so "head" also finds "header"': (
            saving(str.startswith)
        ),
        'a path that only ends in the same letters was taken too, as "q_norm" for "norm"; ask for '
        "a dot before the name": saving(str.endswith),
        "a name was compared with whole paths alone; the end after a dot counts too": (
            saving(str.__eq__)
        ),
        "a name of several pieces was left out; compare it with the end of the whole path": (
            saving(lambda p, name: p.split(".")[-1] == name)
        ),
        "a saved module at the top was left out: there the path is the name, with no dot": (
            saving(lambda p, name: p.endswith("." + name))
        ),
        "a factor has other values now; freezing changes requires_grad alone": (
            then(zero_the_factors, first=reference_freeze)
        ),
    },
    why="Freezing everything and then switching on what trains, by name, also works on a model "
    "that came in frozen; nothing new in the model can slip through.",
    hints=[
        "Start with model.requires_grad_(False).",
        "Then go over model.named_modules(): in every LoRALinear, lora_A and lora_B train.",
        "A module whose path is a name in saved, or ends in a dot and that name, trains whole: "
        "module.requires_grad_(True).",
    ],
)


# --- two questions -------------------------------------------------------------------------------

target_match = Choice(
    "03 target_match",
    "A model has, in each block, mlp.up, mlp.gate_up and mlp.up_norm, all nn.Linear. Which does "
    'target_modules=["up"] adapt?',
    {
        "mlp.up and mlp.gate_up, which end in it": 'the end has to come after a dot: ".up" ends '
        "blocks.0.mlp.up, not …gate_up",
        "all three, which contain it": "a target is not searched for inside the path; it is "
        "compared with its end",
        "mlp.up of every block": "A target is a whole path or its end after a dot, so one short "
        "name catches the same layer in every block, and no other.",
        "none: the whole path, blocks.0.mlp.up, is needed": "the end of the path is enough; a "
        "whole path names one layer of one block only",
    },
    right="c",
    hint="Write the three paths of block 0 one below the other, and look at what follows their "
    "last dot.",
)

frozen_head = Choice(
    "03 frozen_head",
    "You build a classifier on the base with classifier_from, adapt W_q and W_v with no "
    "modules_to_save, and training goes well. You save the adapter, and tomorrow you load it into "
    "a new classifier built the same way. Its predictions are",
    {
        "the same: the adapter holds everything that was trained": "it does, and that is too "
        "little: the output also needs the head that the factors were trained against",
        "those of another random head": "The head was neither in the base's file nor in the "
        "adapter's; name it in modules_to_save, and it is trained and saved.",
        "the same: the head was frozen, so it cannot have changed": "it did not change while "
        "training, but classifier_from draws a new one at random every time it is called",
        "none: load_adapter raises, since the head does not fit": "every head of this shape fits, "
        "and an adapter without a head asks for none; nothing can be noticed",
    },
    right="b",
    hint="Where does the head of tomorrow's classifier come from: the base's file, the adapter's, "
    "or neither?",
)
