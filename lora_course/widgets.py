"""To play with in JupyterLab: your town in every script, a start of A and B, the rank of ΔW, its
volume.

Each is a control or two, and under it what is written anew whenever a control moves. ipywidgets
sends the newest value only, once the kernel has answered the one before, so no queue builds up.
"""

import base64
import copy
import html
from collections.abc import Callable, Sequence

import torch
from ipywidgets import HTML, FloatSlider, IntSlider, Text, ValueWidget, VBox
from torch import Tensor, nn

from lora_course import figures
from lora_course.directions import lora_by_path
from lora_course.tables import names_html
from lora_lib.adapters import load_adapter
from lora_lib.injection import add_lora_to_model, unmerge_lora_weights
from lora_lib.lora import LoRALinear, lora_layers
from lora_lib.model import SmallTransformer
from lora_lib.names import BASE_SCRIPT, is_latin
from lora_lib.pretrained import adapter_directory, adapter_names, load_pretrained
from lora_lib.rank import singular_values, weight_changes, with_changes_cut
from lora_lib.scores import transliterate
from lora_lib.tokens import Tokenizer

_WIDE = {"width": "30em"}


def _answering(answer: Callable[..., str], *controls: ValueWidget) -> VBox:
    """`controls` above the HTML that `answer` gives for their values, now and after a change."""
    page = HTML(layout={"align_self": "flex-start"})
    page.add_class("jp-RenderedHTMLCommon")  # tables as everywhere else in JupyterLab

    def write(_=None):
        page.value = answer(*(control.value for control in controls))

    for control in controls:
        control.observe(write, names="value")
    write()
    return VBox([*controls, page])


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

    return _answering(answer, Text(town, description="your town", layout=_WIDE))


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


def start_sliders(descend: Descent) -> VBox:
    """Two sliders, and below them where `descend(A, B)`, all points of a path, leads."""
    sliders = [
        FloatSlider(0, min=-2, max=2, step=0.05, description=name, layout=_WIDE) for name in "AB"
    ]

    def answer(A: float, B: float) -> str:
        picture = figures.landscape({"your start": descend(A, B)})
        data = base64.b64encode(picture.png(dpi=80)).decode()  # small, so that dragging is quick
        alt = html.escape(picture.alt)
        return f'<img src="data:image/png;base64,{data}" alt="{alt}">'

    return _answering(answer, *sliders)


# --- how much of ΔW ------------------------------------------------------------------------------


def rank_slider(
    before: SmallTransformer, after: SmallTransformer, tokenizer: Tokenizer, towns: Sequence[str]
) -> VBox:
    """A slider that cuts the change of every nn.Linear weight to rank 0 to 32, as
    `with_changes_cut` does, and how the model then writes `towns` in Georgian.

    `before` and `after` are plain models of one shape, and stay as they are.
    """
    strengths = [singular_values(change) for change in weight_changes(before, after).values()]
    full = max(map(len, strengths))
    energy = sum(s.square().sum() for s in strengths)

    def answer(rank: int) -> str:
        share = (sum(s[:rank].square().sum() for s in strengths) / energy).item()
        caption = f"{rank} of {full} directions of every ΔW, with {share:.0%} of the energy"
        names = transliterate(with_changes_cut(before, after, rank), tokenizer, towns)
        return names_html(towns, {rank: names}, caption=caption, first="rank kept")

    return _answering(answer, IntSlider(8, 0, 32, description="rank", layout=_WIDE))


def volume_knob(adapted: nn.Module, tokenizer: Tokenizer, towns: Sequence[str]) -> VBox:
    """A slider for λ from 0 to 2, and how the model with weights W + λ ΔW writes `towns` in
    Georgian.

    `adapted` has LoRA layers, and stays as it is. Raises ValueError if it has none.
    """
    model = unmerge_lora_weights(copy.deepcopy(adapted))
    scalings = {layer: layer.scaling for layer in lora_layers(model)}

    def answer(volume: float) -> str:
        for layer, scaling in scalings.items():
            layer.scaling = volume * scaling
        names = transliterate(model, tokenizer, towns)
        return names_html(towns, {f"{volume:g}": names}, first="λ")

    slider = FloatSlider(1, min=0, max=2, step=0.05, description="λ", layout=_WIDE)
    return _answering(answer, slider)
