"""Exercises of notebook 03: freezing, injection by name, and what a name means."""

from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Exercise, describe, variants
from lora_course.exercises.choices import Choice
from lora_course.exercises.factors import contains_one_of, is_factor, is_one_of
from lora_course.tiny_lora import TinyLoRA
from lora_lib.targets import is_named

# --- a model full of names that are easily confused ----------------------------------------------

WIDTH = 6


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def part() -> nn.Module:
    """q, beside names that contain it, start with it, or end in it without a dot."""
    return nn.Sequential(OrderedDict(q=linear(), q_norm=linear(), seq=linear()))


class Block(nn.Module):
    """No nn.Sequential, which would run a layer that was stored under a name with dots."""

    def __init__(self):
        super().__init__()
        self.attention, self.memory, self.norm = part(), part(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.memory(self.attention(x)))


class Model(nn.Module):
    """A q at the top, a q that is no nn.Linear, a head and a header, "lora" in a base's name."""

    def __init__(self):
        super().__init__()
        self.flora = nn.Embedding(9, WIDTH)
        self.blocks, self.q = nn.Sequential(Block()), linear()
        self.scale = nn.ModuleDict({"q": nn.LayerNorm(WIDTH)})
        self.header = linear()
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.q(self.blocks(self.flora(ids)))
        return self.head(self.header(self.scale["q"](x)))


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(9).view(3, 3))


WRONG_PATHS = {
    "a path that only contains the name was taken too; match the whole path, or its end after a "
    "dot": contains_one_of,
    'a path that only ends in the same letters was taken too, as "seq" for "q"; ask for a dot '
    "before the name": str.endswith,
    "at the top nothing was found: there the path is the name, with no dot before it": (
        lambda path, names: path.endswith(tuple("." + name for name in names))
    ),
    "a name of several pieces was not found; compare it with the end of the whole path": (
        lambda path, names: path.split(".")[-1] in names
    ),
}

# --- injection by name ---------------------------------------------------------------------------


def draw_inject() -> Iterator[tuple]:
    yield Model(), "q", 3, 7.0
    yield Model(), "attention.q", 2, 5.0


def observe_inject(inject: Callable, model: nn.Module, target: str, rank: int, alpha: float):
    """Which layers the forward passes, and what it gives, with B at zero and with B filled."""
    start, paths = run(model), {module: path for path, module in model.named_modules()}
    returned = inject(model, target, rank, alpha)
    another = "another model" if isinstance(returned, nn.Module) else describe(returned)
    needed = ("original", "lora_A", "lora_B")  # of whatever class
    layers = [m for m in model.modules() if all(hasattr(m, name) for name in needed)]
    reached = set()
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
        "what trains in the LoRA layers": trainable,
        "the output once B is not zero": run(model),
    }


@variants
def injecting(
    model,
    target,
    rank,
    alpha,
    chosen=is_named,
    kind=nn.Linear,
    keep=list,
    wrap=TinyLoRA,
    put=nn.Module.set_submodule,
) -> nn.Module:
    """Which paths, of which kind; what takes the place of a layer, and how it gets there."""
    modules = [(p, m) for p, m in model.named_modules() if p and isinstance(m, kind)]
    for path, module in keep((p, m) for p, m in modules if chosen(p, (target,))):
        put(model, path, wrap(module, rank, alpha))
    return model


inject = Exercise(
    "03 inject",
    injecting(),
    draw_inject,
    observe=observe_inject,
    may_change=True,
    mistakes={message: injecting(chosen=chosen) for message, chosen in WRONG_PATHS.items()}
    | {
        "not all that matches can be wrapped; ask isinstance(module, nn.Linear) as well": (
            injecting(kind=nn.Module)
        ),
        "nothing comes back; return the changed model": lambda *given: injecting()(*given) and None,
        "only the first match was replaced; let the return stand behind the loop, not in it": (
            injecting(keep=lambda found: list(found)[:1])
        ),
        "only the top of the model was searched; named_modules() goes to every depth, and "
        "named_children() does not": injecting(
            keep=lambda found: [(p, m) for p, m in found if "." not in p]
        ),
        "you wrapped a new nn.Linear; wrap the one that was there, with its pretrained weight": (
            injecting(wrap=lambda m, *given: TinyLoRA(nn.Linear(WIDTH, WIDTH), *given))
        ),
        "the wrapped weights train; TinyLoRA freezes them, and requires_grad_(True) on the layer "
        "undoes it": injecting(wrap=lambda m, *given: TinyLoRA(m, *given).requires_grad_()),
        'a layer was stored under a name with dots, as setattr(model, "a.b", layer) does, where '
        "the forward never looks; use model.set_submodule(path, layer)": injecting(put=setattr),
        "rank and alpha were not passed on to TinyLoRA": (
            injecting(wrap=lambda m, rank, alpha: TinyLoRA(m))
        ),
        "TinyLoRA divides alpha by the rank itself; pass alpha as it is": (
            injecting(wrap=lambda m, rank, alpha: TinyLoRA(m, rank, alpha / rank))
        ),
    },
)


# --- what trains ---------------------------------------------------------------------------------


def draw_freeze() -> Iterator[tuple]:
    """As it comes; with everything frozen; and with no module to save."""
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


def is_saved(name: str, saved: tuple[str, ...], chosen: Callable = is_named) -> bool:
    """Whether the parameter lies in a module whose path is chosen."""
    pieces = name.split(".")[:-1]
    return any(chosen(".".join(pieces[:end]), saved) for end in range(1, len(pieces) + 1))


@variants
def training(model, saved, factor=is_factor, module=is_saved) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(factor(name) or module(name, saved))


def saving(chosen: Callable) -> Callable:
    """A freezing that takes a module for saved where its path is chosen."""
    return training(module=lambda name, saved: is_saved(name, saved, chosen))


def only_switches_off(model: nn.Module, saved: tuple[str, ...]) -> None:
    for name, parameter in model.named_parameters():
        if not (is_factor(name) or is_saved(name, saved)):
            parameter.requires_grad_(False)


freeze = Exercise(
    "03 freeze",
    training(),
    draw_freeze,
    observe=observe_freeze,
    may_change=True,
    mistakes={message: saving(chosen) for message, chosen in WRONG_PATHS.items()}
    | {
        "a name was compared with whole paths alone; the end after a dot counts too": (
            saving(is_one_of)
        ),
        "nothing trains: everything off comes first, then on what trains": (
            training(factor=lambda n: False, module=lambda n, saved: False)
        ),
        "the LoRA factors are frozen; they are the parameters named …lora_A and …lora_B": (
            training(factor=lambda n: False)
        ),
        "only one of the two factors trains; lora_A and lora_B both learn": (
            training(factor=lambda n: n.endswith("lora_B"))
        ),
        "the wrapped weights, …original.weight, train again; they are the base": (
            training(factor=lambda n: is_factor(n) or ".original." in n)
        ),
        'an embedding named "flora" trains, since its name contains "lora"; ask for the whole of '
        "lora_A": training(factor=lambda n: "lora" in n),
        "of a model that came in frozen, nothing trains; switch on what trains, with "
        "requires_grad_(True)": only_switches_off,
        "the modules named in saved are frozen": training(module=lambda n, saved: False),
        "with nothing in saved, everything trains; the factors train, and nothing else": (
            training(module=lambda n, saved: not saved or is_saved(n, saved))
        ),
        "of a saved module only the weight trains; its bias belongs to it": (
            training(module=lambda n, saved: is_saved(n, saved) and n.endswith("weight"))
        ),
    },
)


# --- a question ----------------------------------------------------------------------------------

target_match = Choice("03 target_match")
