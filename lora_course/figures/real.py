"""Figures of the page on searching code with a public model."""

from collections.abc import Mapping, Sequence

import numpy as np

from lora_course.code_search import Search
from lora_course.figures.style import *


def search_idea() -> Picture:
    """How sentence vectors find a function, and what is trained."""
    fig, (left, right) = figure(2)
    arrow = dict(arrowstyle="->", lw=1.6, shrinkA=0, shrinkB=0)
    for y, words, what in ((3.1, "trim the\nspaces", "query"), (0.9, "str strip", "name")):
        box(left, 0, y - 0.45, 2.5, 0.9, PALE, words, size=12)
        left.text(1.25, y + 0.6, what, ha="center", size=12, color=GREY)
        left.annotate("", (3.4, 2 + (y - 2) / 4), (2.5, y), arrowprops=arrow)
    box(left, 3.4, 1.1, 1.7, 1.8, PALE, "frozen\nmodel", size=13)
    box(left, 5.1, 1.1, 0.5, 1.8, LORA, "LoRA", size=12, color="white", rotation=90)
    foot = np.array([6, 0.6])
    for degrees, words in ((62, "query"), (45, "the right name"), (8, "another name")):
        tip = 3.2 * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])
        left.annotate("", foot + tip, foot, arrowprops=arrow)
        left.text(*(foot + 1.06 * tip), words, size=12, ha="left", va="center")
    left.set(title="To search: the nearest name is found", xlim=(0, 11.6), ylim=(-0.2, 4.4))
    for row in range(4):
        for column in range(4):
            own = row == column
            box(right, column, 3 - row, 0.92, 0.92, LORA if own else PALE,
                "near" if own else "far", color="white" if own else "black", size=12)  # fmt: skip
        right.text(-0.15, 3.46 - row, f"query {row + 1}", ha="right", va="center", size=12)
        right.text(row + 0.46, 4.15, f"name {row + 1}", ha="center", size=12)
    right.set(title="To train: each to its own", xlim=(-1.4, 4.2), ylim=(-0.2, 4.5))
    for ax in (left, right):
        ax.axis("off")
    return Picture(
        fig,
        "deeper_search_idea",
        "What you type and every name become arrows; training turns each query towards its name.",
        "Left: a query and a function's name go through one frozen model with LoRA, and come out "
        "as arrows; the arrow of the right name points almost where the query's does, that of "
        "another name elsewhere. Right: a table of four queries and four names, near on the "
        "diagonal, where each query meets its own name, and far everywhere else.",
    )


def nearness(queries: Sequence[str], names: Sequence[str], cosines: np.ndarray) -> Picture:
    """Cosines of queries (rows) with names (columns), of which the i-th is right for query i; the
    highest of each row is marked."""
    fig, ax = figure(height=3.6)
    ax.imshow(cosines, cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
    hits = cosines.argmax(1)
    for (row, column), value in np.ndenumerate(cosines):
        mark = "" if hits[row] != column else " ✓" if row == column else " ✗"
        weight = "bold" if mark else "normal"
        ax.text(column, row, f"{value:.2f}{mark}", ha="center", va="center", weight=weight)
    short = [query if len(query) <= 42 else query[:40] + " …" for query in queries]
    last = [name.rpartition(".")[2].replace("_", "_\n") for name in names]
    ax.set_xticks(range(len(names)), last)
    ax.set_yticks(range(len(queries)), short)
    ax.set_title("Which name is nearest?")
    ax.tick_params(length=0)
    ax.grid(visible=False)
    right = int((hits == np.arange(len(queries))).sum())
    return Picture(
        fig,
        "deeper_search_nearness",
        f"The right names are on the diagonal. The nearest is right (✓) in {right} of "
        f"{len(queries)} rows.",
        f"A table of cosines, {len(queries)} sentences by the names of the same functions, "
        f"{', '.join(names)}. The highest of a row is on the diagonal in {right} of "
        f"{len(queries)} rows.",
    )


def search_methods(
    trained: Mapping[str, Mapping[int, "pd.DataFrame"]], untrained: Mapping[str, Search]
) -> Picture:
    """Recall@1 as `recorded_search.load_search` has it: a block for every number of steps, a bar
    for every method; a line for each that trains nothing."""
    fig, ax = figure(height=TALL, recorded=True)
    steps = list(next(iter(trained.values())))
    scores = {name: [list(runs[n].recall_1) for n in steps] for name, runs in trained.items()}
    bars_with_spread(ax, [f"{n} steps" for n in steps], scores, (BLUES[1], LORA, BLUES[5], FULL))
    for (name, found), style in zip(untrained.items(), (":", "--"), strict=True):
        ax.axhline(found.recall_1, color=BLACK, ls=style, label=name)
    ax.set(ylabel="right name first (recall@1)", ylim=(0, 0.8))
    ax.set_title("Rank 1 gives most of the gain, all weights some more")
    fig.legend(loc="outside lower center", ncols=3)
    lines = ", ".join(f"{name} {found.recall_1:.3f}" for name, found in untrained.items())
    return Picture(
        fig,
        "deeper_search_methods",
        "Unseen functions. A line on a bar runs from the lowest to the highest of five seeds.",
        f"Bars of recall@1 after {' and '.join(map(str, steps))} steps: "
        f"{means_by_name(scores, '.3f')}. Lines across: {lines}.",
    )
