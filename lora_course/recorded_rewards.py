"""What was recorded of rewards against answers (`lora_course.experiments.rewards`)."""

import pandas as pd

from lora_course.experiments.questions import Interval, paired_difference
from lora_course.experiments.rewards import METHODS, SAMPLES, TUNING_SEEDS
from lora_course.results import at_tuned_rate, load_table

NAMES = {rank: f"LoRA r={rank}" if rank else "full" for _, rank in METHODS}
# What rewards are compared with answers in: a score of the table, by its name on the page.
LOOKED_AT = {
    "one of 8 right": "right_in_8",
    "mean reward": "sampled_reward",
    "KL from start": "kl",
    "bits of names alone": "names alone",
}
RewardRuns = dict[tuple[str, str], pd.DataFrame]


def runs_at_chosen_rates(table: pd.DataFrame) -> RewardRuns:
    """(task, method) → its five runs at the rate that was chosen, in the order of the seeds. The
    tasks are "rewards" and "answers", the methods those of `NAMES`."""
    tuned = at_tuned_rate(table[table.lr > 0], "validation_exact_match", TUNING_SEEDS)
    return {
        (task, NAMES[rank]): mine.reset_index(drop=True)
        for (task, rank), mine in tuned.groupby(["task", "rank"])
    }


def load_reward_runs() -> tuple[pd.Series, RewardRuns]:
    """The row of the start, and the runs at their chosen rates."""
    table = load_table("rewards")
    return table[table.task.eq("start")].iloc[0], runs_at_chosen_rates(table)


def minus(
    runs: RewardRuns, ours: tuple[str, str], theirs: tuple[str, str], score: str = "exact_match"
) -> Interval:
    """A score of our runs minus that of theirs, seed by seed."""
    return paired_difference(runs[ours][score], runs[theirs][score])


def rewards_minus_answers(runs: RewardRuns) -> dict[str, dict[str, Interval]]:
    """Method → {each of LOOKED_AT: after rewards minus after answers}."""
    return {
        name: {
            label: minus(runs, ("rewards", name), ("answers", name), score)
            for label, score in LOOKED_AT.items()
        }
        for name in NAMES.values()
    }


def bits_for_each_parameter(run: pd.DataFrame) -> float:
    """What all rewards of a run tell at most, in bits, over the parameters that it trains."""
    rewards = run.steps * run.batch_size * SAMPLES
    return float((rewards * run.reward_bits / run.trainable).mean())
