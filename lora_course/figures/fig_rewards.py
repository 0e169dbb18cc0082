"""Figures of going_deeper/reinforcement: rewards rise, and where they lead."""

from collections.abc import Mapping
from itertools import product
from statistics import mean

from torch import Tensor

from lora_course.figures.style import *

Runs = Mapping[tuple[str, str], "pandas.DataFrame"]
# The methods of the table `rewards`.
REWARDED = dict(zip(("LoRA r=1", "LoRA r=8", "LoRA r=32", "full"), (*blues(3), FULL), strict=True))


def live_rewards(rewards: Tensor) -> Picture:
    """Mean reward of every step of a run, and how far the samples of a name lie apart (mean
    standard deviation within a group); `rewards` (steps, names, samples)."""
    means = rewards.mean(dim=(1, 2)).tolist()
    spread = rewards.std(dim=2).mean(dim=1).tolist()
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


def _smooth(values: Numbers) -> list[float]:
    """Mean of each value and its neighbours, nine in all where there are so many."""
    return [mean(values[max(i - 4, 0) : i + 5]) for i in range(len(values))]


def rewards_or_answers(runs: Runs, start: float) -> Picture:
    """Mean reward during training, and names right on test towns; `runs` by task and method, as
    `lora_course.recorded_rewards` has them, `start` the names right before."""
    curves = {
        name: [list(map(float, curve.split())) for curve in runs["rewards", name].curve]
        for name in REWARDED
    }
    scores = {
        task: {name: list(runs[task, name].exact_match) for name in REWARDED}
        for task in ("rewards", "answers")
    }
    fig, (left, right) = figure(2, recorded=True)
    for name, seeds in curves.items():
        groups = list(zip(*seeds, strict=True))
        steps = [10 * (i + 0.5) for i in range(len(groups))]  # each is the mean of ten
        line_with_spread(left, steps, groups, REWARDED[name], name)
    left.set(title="Told only how near", xlabel="step", ylabel="mean reward of the samples")
    left.legend(loc="lower right")
    groups = {name: [of[name] for of in scores.values()] for name in curves}
    bars_with_spread(right, list(scores), groups, list(REWARDED.values()))
    right.axhline(start, color=GREY, ls="--")
    right.set(title="Names right, unseen towns", ylim=(0, None))
    rise = "; ".join(
        f"{name} from {mean(c[0] for c in seeds):.2f} to {mean(c[-1] for c in seeds):.2f}"
        for name, seeds in curves.items()
    )
    told = "; ".join(
        f"{name}: " + ", ".join(f"{method} {mean(v):.2f}" for method, v in of.items())
        for name, of in scores.items()
    )
    return Picture(
        fig,
        "deeper_rewards_or_answers",
        "Bands, and lines on bars, run from the lowest to the highest seed. Dashed: the start.",
        f"Left: mean reward against the step: {rise}. Right: names right on test towns. {told}. "
        f"Start: {start:.2f}.",
    )


def distance_and_forgetting(runs: Runs, start: Mapping[str, float], skill: str) -> Picture:
    """Bits of an old skill against the distance from the start, a point a run: filled after
    rewards, open after answers; `start` is the row of the start."""
    fig, ax = figure(recorded=True)
    for name, task in product(REWARDED, ("rewards", "answers")):
        run = runs[task, name]
        ax.plot(
            run.kl,
            run[skill],
            color=REWARDED[name],
            ls="",
            marker=MARKS[REWARDED[name]][0],
            fillstyle="full" if task == "rewards" else "none",
            label=name if task == "rewards" else "",
        )
    ax.axhline(start[skill], color=GREY, ls="--", label="the start")
    ax.set(xlabel="KL divergence from the start, bits per character", ylabel=f"bits of {skill}")
    ax.set(title="How far a run went, and what it forgot")
    fig.legend(loc="outside right center")
    told = "; ".join(
        f"{name} with {task}: {run.kl.mean():.2f} and {run[skill].mean():.2f}"
        for (task, name), run in runs.items()
    )
    return Picture(
        fig,
        "deeper_distance_and_forgetting",
        "A point a run, filled after rewards, open after answers. Higher: more is forgotten.",
        f"Points: divergence from the start and bits of {skill}, means of {told}. Start: "
        f"{start[skill]:.2f} bits.",
    )
