"""Figures of notebook 03: the transformer."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lora_course.figures.style import TALL, bars_with_spread, blues, figure


def attention_maps(maps: Mapping[str, tuple[Tensor, str]], columns: Sequence[str]):
    """One head's attention while it writes: a panel for each (weights, what was written)."""
    fig, axes = figure(len(maps), height=TALL)
    for ax, (title, (weights, written)) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(columns)), columns)
        for label in ax.get_xticklabels():
            if len(label.get_text()) > 1:  # BOS and SEP are wider than a column
                label.set_rotation(90)
        ax.set_yticks(range(len(written)), list(written))
        ax.set(title=title, xlabel="looks at", ylabel="writes")
        ax.grid(visible=False)
    fig.colorbar(image, ax=axes, label="attention weight", location="bottom", aspect=50)
    return fig


def parameters_by_target(counts: Mapping[tuple[str, int], int], total: int):
    """Trainable parameters for every (targets, rank), with their share of the base's `total`."""
    fig, ax = figure()
    labels = list(dict.fromkeys(label for label, _ in counts))
    ranks = list(dict.fromkeys(rank for _, rank in counts))
    groups = {f"r = {rank}": [[counts[label, rank]] for label in labels] for rank in ranks}
    bars_with_spread(ax, labels, groups, blues(len(ranks)))
    for bars, rank in zip(ax.containers, ranks, strict=True):
        shares = [f"{counts[label, rank] / total:.1%}" for label in labels]
        ax.bar_label(bars, shares, padding=3, fontsize=12)
    ax.set(title="Trainable parameters, and their share of the base's", ylabel="parameters")
    ax.yaxis.set_major_formatter("{x:,.0f}")
    ax.legend(loc="upper left")
    return fig
