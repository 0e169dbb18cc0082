"""Figures of notebook 03: the transformer."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lora_course.figures.style import *
from lora_course.georgian import reads
from lora_lib.lora import count_parameters

FROZEN, ADAPTED, TRAINING = "frozen", "LoRA: only A and B train", "all of it trains"
_LOOKS = {FROZEN: (PALE, ""), ADAPTED: (LORA, ""), TRAINING: (ORANGE, "//")}


def model_map(model: nn.Module) -> Picture:
    """The linear layers of a SmallTransformer as boxes, and how each of them trains."""
    from matplotlib.patches import Patch

    fig, ax = figure(height=4)
    states = {}
    for b, block in enumerate(model.blocks):
        layers = dict(block.attention.named_children()) | dict(block.feed_forward.named_children())
        layers = {name: x for name, x in layers.items() if _is_linear(x)}
        for row, (name, layer) in enumerate(layers.items()):
            states[b, row] = name, _state(layer)
    states[len(model.blocks), 2.5] = "classifier", _state(model.classifier)
    inside = {p for m in model.modules() if _is_linear(m) for p in m.parameters()}
    others = [p for p in model.parameters() if p not in inside]
    rest = TRAINING if any(p.requires_grad for p in others) else FROZEN
    for (x, row), (name, state) in states.items():
        _box(ax, x, row, 0.9, name, state)
    _box(ax, 0, 6.2, len(model.blocks) + 0.9, "embeddings and norms", rest)
    for b in range(len(model.blocks)):
        ax.text(b + 0.45, -0.25, f"block {b}", ha="center")
    trained = count_parameters(model, only_trainable=True)
    total = count_parameters(model)
    share = f", {100 * trained / total:.1f} %" if trained < total else ""
    ax.set_title(f"{trained:,} of {total:,} parameters train{share}")
    ax.set(xlim=(-0.05, len(model.blocks) + 1), ylim=(8.3, -0.7))
    ax.axis("off")
    legend = [Patch(facecolor=c, hatch=h, label=s) for s, (c, h) in _LOOKS.items()]
    ax.legend(handles=legend, loc="lower center", ncols=3)
    counts = {s: sum(state == s for _, state in states.values()) for s in _LOOKS}
    told = "; ".join(f"{count} {state}" for state, count in counts.items())
    return Picture(
        fig,
        "03_model_map",
        "Grey is frozen; in blue only A and B train; orange trains whole.",
        f"A map of the model: {len(model.blocks)} blocks of six linear layers, a classifier. Of "
        f"{len(states)} boxes: {told}. "
        f"Embeddings and norms: {rest}. {trained:,} of {total:,} parameters train.",
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "lora_A")


def _state(layer: nn.Module) -> str:
    if hasattr(layer, "lora_A"):
        return ADAPTED
    return TRAINING if any(p.requires_grad for p in layer.parameters()) else FROZEN


def _box(ax, x: float, row: float, width: float, name: str, state: str) -> None:
    from matplotlib.patches import Rectangle

    color, hatch = _LOOKS[state]
    ax.add_patch(Rectangle((x, row), width, 0.85, facecolor=color, hatch=hatch, edgecolor="white"))
    dark = state != ADAPTED
    style = dict(facecolor=color, edgecolor="none", pad=1)
    place = x + width / 2, row + 0.44
    words = dict(ha="center", va="center", color="black" if dark else "white", bbox=style)
    ax.text(*place, name if dark else f"{name} + B A", weight="normal" if dark else "bold", **words)


def attention_maps(maps: Mapping[str, tuple[Tensor, str]], columns: Sequence[str]) -> Picture:
    """One head's attention while it writes: a panel for each (weights, what was written)."""
    fig, axes = figure(len(maps), height=4.5)
    for ax, (title, (weights, written)) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(columns)), columns)
        for label in ax.get_xticklabels():
            if len(label.get_text()) > 1:  # BOS and SEP are wider than a column
                label.set_rotation(90)
        latin = [x if reads(x) == x else f"{x} {reads(x)}" for x in written]
        ax.set_yticks(range(len(written)), latin)
        ax.set_title(title, weight="normal")
        ax.set(xlabel="looks at", ylabel="writes")
        ax.grid(visible=False)
    heading(fig, "Another script, the same diagonal")
    fig.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    told = " and ".join(f"{written} ({title})" for title, (_, written) in maps.items())
    return Picture(
        fig,
        "03_attention",
        "The same head looks at the same place. BOS and SEP begin and end the Latin name.",
        "Attention maps of one head, a row for each letter that it writes, a column for each Latin "
        f"letter; darker is more weight. It writes {told}. In both the dark cells run down the "
        "diagonal: most letters look at their own place in the Latin name.",
    )
