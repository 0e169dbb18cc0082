"""Figures of going_deeper/reinforcement: rewards rise, and where they lead."""

from collections.abc import Mapping, Sequence
from statistics import mean

from lora_course.figures.style import (
    BLACK,
    FULL,
    GREY,
    LORA,
    MARKS,
    Picture,
    bars_with_spread,
    blues,
    figure,
    line,
    line_with_spread,
    mark_recorded,
)


def live_rewards(means: Sequence[float], spread: Sequence[float]) -> Picture:
    """Mean reward of every step of a run, and how far the samples of a name lie apart (mean
    standard deviation within a group)."""
    fig, (left, right) = figure(2)
    steps = range(1, len(means) + 1)
    left.plot(steps, means, color=LORA, lw=1, alpha=0.45)
    line(left, steps, _smooth(means), LORA, "mean of nine steps")
    left.set(title="The reward rises", xlabel="step", ylabel="mean reward of the samples")
    left.set_ylim(0.3, 1)
    left.legend(loc="lower right")
    line(right, steps, _smooth(spread), BLACK)
    right.set(title="The samples of a name grow alike", xlabel="step", ylim=(0, None))
    right.set_ylabel("standard deviation in a group")
    ends = [f"{mean(part):.2f}" for part in (means[:9], means[-9:])]
    apart = [f"{mean(part):.2f}" for part in (spread[:9], spread[-9:])]
    return Picture(
        fig,
        "deeper_live_rewards",
        "Where all samples of a name earn the same, there is nothing to learn from it.",
        f"Left: the mean reward of a step against the step, noisy, from {ends[0]} in the first "
        f"nine steps to {ends[1]} in the last nine. Right: the standard deviation of the rewards "
        f"in a group, from {apart[0]} to {apart[1]}.",
    )


def _smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """Mean of each value and its neighbours, `width` in all where there are so many."""
    half = width // 2
    return [mean(values[max(i - half, 0) : i + half + 1]) for i in range(len(values))]


def reward_curves(curves: Mapping[str, Sequence[Sequence[float]]], every: int = 10) -> Picture:
    """Mean reward during training: {method: a curve a seed}, a value for `every` steps."""
    fig, ax = figure()
    for (name, seeds), color in zip(curves.items(), _colors(curves), strict=True):
        groups = list(zip(*seeds, strict=True))
        steps = [every * (i + 0.5) for i in range(len(groups))]
        line_with_spread(ax, steps, groups, color, name)
    ax.set(xlabel="step, 32 names × 8 samples each", ylabel="mean reward of the samples")
    ax.set_title("Told only how near a name is, all of them learn")
    ax.legend(loc="lower right")
    mark_recorded(ax)
    told = "; ".join(
        f"{name} from {mean(c[0] for c in seeds):.2f} to {mean(c[-1] for c in seeds):.2f}"
        for name, seeds in curves.items()
    )
    return Picture(
        fig,
        "deeper_reward_curves",
        "Bands run from the lowest to the highest of five seeds, each method at its own rate.",
        f"Lines of the mean reward against the step: {told}.",
    )


def rewards_or_answers(
    scores: Mapping[str, Mapping[str, Sequence[float]]], start: float
) -> Picture:
    """Names right on test towns: {"rewards" or "answers": {method: seeds}}; `start` before."""
    fig, ax = figure()
    methods = list(next(iter(scores.values())))
    groups = {method: [of[method] for of in scores.values()] for method in methods}
    bars_with_spread(ax, list(scores), groups, _colors(groups))
    ax.axhline(start, color=GREY, ls="--", label="the start, 100 pairs")
    ax.set(ylabel="names right, unseen towns", ylim=(0, None))
    ax.set_title("The same names, with rewards and with answers")
    fig.legend(loc="outside right center")
    mark_recorded(ax)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{method} {mean(v):.2f}" for method, v in of.items())
        for name, of in scores.items()
    )
    return Picture(
        fig,
        "deeper_rewards_or_answers",
        "A line on a bar runs from the lowest to the highest of five seeds.",
        f"Blocks of bars, names right on test towns. {told}. Start: {start:.2f}.",
    )


def distance_and_forgetting(
    runs: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], start: float, skill: str
) -> Picture:
    """Bits of an old skill against the distance from the start, a point a run: {task: {method:
    [(KL, bits), …]}}. Filled points are those of the first task, open ones of the second."""
    fig, ax = figure()
    filled, empty = runs
    for task, fill in ((filled, True), (empty, False)):
        for (name, points), color in zip(runs[task].items(), _colors(runs[task]), strict=True):
            ax.plot(
                *zip(*points, strict=True),
                color=color,
                ls="",
                marker=MARKS[color][0],
                fillstyle="full" if fill else "none",
                label=name if fill else "",
            )
    ax.axhline(start, color=GREY, ls="--", label="the start")
    ax.set(xlabel="KL divergence from the start, bits per character", ylabel=f"bits of {skill}")
    ax.set(title="How far a run went, and what it forgot", xlim=(0, None))
    fig.legend(loc="outside right center")
    mark_recorded(ax)
    told = "; ".join(
        f"{name} with {task}: {mean(x for x, _ in points):.2f} and {mean(y for _, y in points):.2f}"
        for task, methods in runs.items()
        for name, points in methods.items()
    )
    return Picture(
        fig,
        "deeper_distance_and_forgetting",
        f"A point a run, filled with {filled}, open with {empty}. Higher: more is forgotten.",
        f"Points: divergence from the start and bits of {skill}, means of {told}. Start: "
        f"{start:.2f} bits.",
    )


def _colors(methods: Mapping[str, object]) -> list[str]:
    """Full fine-tuning's own colour, and blues for the ranks of LoRA in their order."""
    ranks = [name for name in methods if not name.startswith("full")]
    shades = dict(zip(ranks, blues(len(ranks)), strict=True)) if ranks else {}
    return [shades.get(name, FULL) for name in methods]
