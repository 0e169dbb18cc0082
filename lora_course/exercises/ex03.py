"""Exercises of notebook 03: injection by name, freezing, and two questions."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Choice, Exercise, describe
from lora_course.exercises.factors import is_factor
from lora_lib.lora import LoRALinear, lora_layers
from lora_lib.targets import is_named

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
    start, paths = run(model), {module: path for path, module in model.named_modules()}
    returned = inject(model, target, rank, alpha)
    another = "another model" if isinstance(returned, nn.Module) else describe(returned)
    layers, reached = list(lora_layers(model)), set()
    for layer in layers:
        layer.register_forward_hook(lambda layer, *_: reached.add(layer))
    moved = not torch.allclose(run(model), start)
    trainable = {n for x in layers for n, p in x.named_parameters() if p.requires_grad}
    for layer in layers:
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = torch.linspace(-1, 1, factor.numel()).view_as(factor)
    return {
        "what comes back": "the model" if returned is model else another,
        "LoRA layers that the forward never reaches": len(layers) - len(reached),
        "layers with LoRA": {paths.get(layer.original, "a layer of yours") for layer in reached},
        "the output at the start": "moved" if moved else "as before",
        "the output once B is not zero": run(model),
        "what trains in the LoRA layers": trainable,
    }


def matches(path: str, name: str) -> bool:
    return is_named(path, [name])


def injecting(chosen=matches, wrap=LoRALinear, put=nn.Module.set_submodule, kind=nn.Linear):
    """An injection: which paths, what takes the place of a layer, how it gets there."""

    def inject(model: nn.Module, target: str, rank: int, alpha: float) -> nn.Module:
        for path, module in list(model.named_modules()):
            if path and chosen(path, target) and isinstance(module, kind):
                put(model, path, wrap(module, rank, alpha))
        return model

    return inject


def around_a_new_linear(module: nn.Linear, rank: int, alpha: float) -> nn.Module:
    return LoRALinear(nn.Linear(module.in_features, module.out_features), rank, alpha)


def first_match(model: nn.Module, target: str) -> str:
    return next(p for p, m in model.named_modules() if matches(p, target) and type(m) is nn.Linear)


inject = Exercise(
    "03 inject",
    injecting(),
    draw_inject,
    observe=observe_inject,
    may_change=True,
    mistakes={
        "not all that matches can be wrapped; ask isinstance(module, nn.Linear) as well": (
            injecting(kind=nn.Module)
        ),
        "nothing comes back; return the changed model": lambda *given: injecting()(*given) and None,
        "you wrapped a new nn.Linear; wrap the one that was there, with its pretrained weight": (
            injecting(wrap=around_a_new_linear)
        ),
        'a layer was stored under a name with dots, as setattr(model, "a.b", layer) does, where '
        "the forward never looks; use model.set_submodule(path, layer)": injecting(put=setattr),
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
        "rank and alpha were not passed on to LoRALinear": (
            injecting(wrap=lambda module, rank, alpha: LoRALinear(module))
        ),
        "LoRALinear divides alpha by the rank itself; pass alpha as it is": (
            injecting(wrap=lambda module, rank, alpha: LoRALinear(module, rank, alpha / rank))
        ),
        "only the first layer that matches was replaced; go on after it": (
            lambda model, target, rank, alpha: injecting(
                chosen=lambda path, target: path == first_match(model, target)
            )(model, target, rank, alpha)
        ),
        "only layers at the top were looked at; model.named_modules() goes into every block": (
            injecting(chosen=lambda p, t: "." not in p and matches(p, t))
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
        model = injecting()(Model(), "q", 2, 4.0)
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


freeze = Exercise(
    "03 freeze",
    saving(matches),
    draw_freeze,
    observe=observe_freeze,
    may_change=True,
    mistakes={
        "the LoRA factors are frozen; they are named …lora_A and …lora_B": training(is_saved),
        "the wrapped weights, …original.weight, train again; they are the base": (
            training(lambda n, saved: is_factor(n) or ".original." in n or is_saved(n, saved))
        ),
        'an embedding named "flora" trains, since its name contains "lora"; ask for LoRALinear, or '
        "for the whole of lora_A": training(lambda n, saved: "lora" in n or is_saved(n, saved)),
        "of a model that came in frozen, as after load_adapter, nothing trains; switch on what "
        "trains, with requires_grad_(True)": only_switches_off,
        "the modules named in saved are frozen": training(lambda n, saved: is_factor(n)),
        "of the factors only lora_B trains; A trains too": training(
            lambda n, saved: n.endswith("lora_B") or is_saved(n, saved)
        ),
        "of a saved module only the weight trains; its bias belongs to it": training(
            lambda n, saved: is_factor(n) or (n.endswith("weight") and is_saved(n, saved))
        ),
        "with nothing in saved, everything trains; the factors train, and nothing else": training(
            lambda n, saved: not saved or is_factor(n) or is_saved(n, saved)
        ),
        'a name was looked for anywhere, so "head" also finds "header"; match the whole path, or '
        "its end after a dot": saving(lambda p, name: name in p),
        'a path that only ends in the same letters was taken too, as "q_norm" for "norm"; ask for '
        "a dot before the name": saving(str.endswith),
        "a name was compared with whole paths alone; the end after a dot counts too": (
            saving(str.__eq__)
        ),
        "a saved module at the top was left out: there the path is the name, with no dot": (
            saving(lambda p, name: p.endswith("." + name))
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
