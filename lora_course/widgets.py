"""To play with in JupyterLab: your town in every script, a start of A and B, the rank of ΔW, its
volume.

Each is a control or two, and under it what is written anew whenever a control moves. ipywidgets
sends the newest value only, once the kernel has answered the one before, so no queue builds up.
"""

import base64
import copy
import html
import io
from collections.abc import Callable, Iterable, Sequence

import torch
from ipywidgets import HTML, FloatSlider, IntSlider, Text, ValueWidget, VBox
from torch import Tensor, nn

from lora_course import figures
from lora_course.directions import linear_weights, lora_by_path
from lora_course.tables import names_html
from lora_lib.adapters import load_adapter
from lora_lib.injection import add_lora_to_model, unload_lora
from lora_lib.lora import LoRALinear
from lora_lib.model import SmallTransformer
from lora_lib.names import BASE_SCRIPT, is_latin
from lora_lib.pretrained import adapter_directory, adapter_names, load_pretrained
from lora_lib.rank import truncated, weight_changes
from lora_lib.scores import transliterate
from lora_lib.tokens import Tokenizer

_WIDE = {"width": "30em"}


def _answering(control: ValueWidget, answer: Callable[[object], str]) -> VBox:
    """`control` above the HTML that `answer` gives for its value, now and after every change."""
    page = HTML(answer(control.value), layout={"align_self": "flex-start"})
    page.add_class("jp-RenderedHTMLCommon")  # tables as everywhere else in JupyterLab

    def rewrite(change):
        page.value = answer(change["new"])

    control.observe(rewrite, names="value")
    return VBox([control, page])


# --- your town -----------------------------------------------------------------------------------


def type_your_town(town: str = "Batman") -> VBox:
    """A text box, and the name in it as the base and every shipped adapter write it.

    What cannot be written is answered in words.
    """
    model, tokenizer = one_adapter_per_row([None, *adapter_names()])
    names = [BASE_SCRIPT, *adapter_names()]
    labels = [f"{BASE_SCRIPT.capitalize()} (the base)", *map(str.capitalize, adapter_names())]

    def answer(typed: str) -> str:
        name = " ".join(typed.split())
        problem = _problem(name, tokenizer, model.max_len)
        if problem:
            return f"<p>{html.escape(problem)}</p>"
        # Prompts of one length stay one batch, in their order: row i meets adapter i.
        written = transliterate(model, tokenizer, [name] * len(labels))
        rows = {label: [spelling] for label, spelling in zip(labels, written, strict=True)}
        return names_html([name], rows, dict(zip(labels, names, strict=True)))

    return _answering(Text(town, description="your town", layout=_WIDE), answer)


def _problem(name: str, tokenizer: Tokenizer, max_len: int) -> str | None:
    """Why `name` cannot be written, and what to do."""
    strange = [
        character
        for character in dict.fromkeys(name)
        if not is_latin(character) or Tokenizer.UNK in tokenizer.encode(character)
    ]
    if strange:
        shown = ", ".join(f"“{character}”" for character in strange[:5])
        return (
            f"The adapters read names in Latin letters and cannot read {shown}. "
            "Try a name such as Yerevan or São Paulo."
        )
    if not any(map(str.isalpha, name)):
        return "Type the name of a town in Latin letters, such as Yerevan."
    length, room = len(tokenizer.encode(name)), max_len - len(tokenizer.prompt("")) - 1
    if length > room:
        return f"This name has {length} characters, and the model has room for {room}. Shorten it."
    return None


class AdapterPerRow(nn.Module):
    """A linear layer with n adapters: row i of a batch of n goes through adapter i, so that one
    pass through W serves all (as in Punica, Chen et al. 2023, arXiv 2310.18547)."""

    def __init__(self, layers: Sequence[LoRALinear]):
        super().__init__()
        self.original = layers[0].original
        self.A = torch.stack([layer.lora_A.mT for layer in layers])  # (n, d_in, r)
        self.B = torch.stack([layer.scaling * layer.lora_B.mT for layer in layers])  # (n, r, d_out)

    def forward(self, x: Tensor) -> Tensor:  # (n, T, d_in) -> (n, T, d_out)
        return self.original(x) + x @ self.A @ self.B


@torch.no_grad()
def one_adapter_per_row(scripts: Sequence[str | None]) -> tuple[SmallTransformer, Tokenizer]:
    """A base that answers row i of a batch with the adapter of scripts[i], or as itself where that
    is None; the tokenizer."""
    model, tokenizer = load_pretrained()
    add_lora_to_model(model, rank=8, target_modules="all-linear")  # B is zero: still the base
    adapted = [
        load_adapter(load_pretrained()[0], adapter_directory(script)) if script else model
        for script in scripts
    ]
    for path in lora_by_path(model):
        layers = [m.get_submodule(path) for m in adapted]
        model.set_submodule(path, AdapterPerRow(layers))
    return model, tokenizer


# --- a start of A and B ---------------------------------------------------------------------------

Descent = Callable[[float, float], list[tuple[float, float]]]


def start_sliders(descend: Descent, A: float = 0.0, B: float = 0.0) -> VBox:
    """Two sliders, and below them where `descend(A, B)`, all points of a path, leads."""
    sliders = [
        FloatSlider(value, min=-2, max=2, step=0.05, description=name, layout=_WIDE)
        for name, value in (("A", A), ("B", B))
    ]
    page = HTML()

    def draw(_=None):
        start = tuple(slider.value for slider in sliders)
        map_ = figures.landscape({"your start": descend(*start)})
        page.value = f'<img src="{_data_url(map_.fig)}" alt="{html.escape(map_.alt, quote=True)}">'

    for slider in sliders:
        slider.observe(draw, names="value")
    draw()
    return VBox([*sliders, page])


def _data_url(fig) -> str:
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png", dpi=80)
    return f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}"


# --- how much of ΔW ------------------------------------------------------------------------------


def rank_slider(
    before: SmallTransformer,
    after: SmallTransformer,
    tokenizer: Tokenizer,
    towns: Sequence[str],
    rank: int = 8,
    script: str = "georgian",
) -> VBox:
    """A slider that cuts the change of every nn.Linear weight to rank 0 to 32, and how the model
    then writes `towns`: `with_changes_cut`, with the SVDs computed once.

    `before` and `after` are plain models of one shape, and stay as they are.
    """
    model, weights = copy.deepcopy(after), linear_weights(before)
    svds = {
        path: torch.linalg.svd(change, full_matrices=False)
        for path, change in weight_changes(before, after).items()
    }
    strengths = [s for _, s, _ in svds.values()]
    full = max(map(len, strengths))
    energy = sum(s.square().sum() for s in strengths)

    def answer(rank: int) -> str:
        changes = ((path, truncated(svd, rank)) for path, svd in svds.items())
        _set_changes(model, weights, changes)
        share = (sum(s[:rank].square().sum() for s in strengths) / energy).item()
        caption = f"{rank} of {full} directions of every ΔW, with {share:.0%} of the energy"
        names = transliterate(model, tokenizer, towns)
        return names_html(towns, {rank: names}, script, caption, "rank kept")

    return _answering(IntSlider(rank, 0, 32, description="rank", layout=_WIDE), answer)


def volume_knob(
    adapted: nn.Module,
    tokenizer: Tokenizer,
    towns: Sequence[str],
    volume: float = 1.0,
    script: str = "georgian",
) -> VBox:
    """A slider for λ from 0 to 2, and how the model with weights W + λ ΔW writes `towns`.

    `adapted` has LoRA layers, and stays as it is. Raises ValueError if it has none.
    """
    model = unload_lora(copy.deepcopy(adapted), merge=False)
    weights = linear_weights(model)
    deltas = {p: layer.delta_weight().detach() for p, layer in lora_by_path(adapted).items()}

    def answer(volume: float) -> str:
        _set_changes(model, weights, ((path, volume * delta) for path, delta in deltas.items()))
        names = transliterate(model, tokenizer, towns)
        return names_html(towns, {f"{volume:g}": names}, script, first="λ")

    return _answering(
        FloatSlider(volume, min=0, max=2, step=0.05, description="λ", layout=_WIDE), answer
    )


@torch.no_grad()
def _set_changes(
    model: nn.Module, weights: dict[str, Tensor], changes: Iterable[tuple[str, Tensor]]
) -> None:
    """Give the layer at every path the weight W + its change, both (d_out, d_in)."""
    for path, change in changes:
        model.get_submodule(path).weight.copy_(weights[path] + change)
