"""What was recorded of the search for code (`lora_course.experiments.search_code`)."""

import pandas as pd

from lora_course.code_search import Search
from lora_course.experiments.questions import mean_interval, paired_difference
from lora_course.experiments.search_code import TUNING_SEEDS
from lora_course.results import at_tuned_rate, load_table
from lora_course.tables import span

METHODS = {  # (targets, rank)
    "LoRA r=1, query and value": ("query, value", 1),
    "LoRA r=8, query and value": ("query, value", 8),
    "LoRA r=8, all linear": ("all linear", 8),
    "full fine-tuning": ("", 0),
}


def load_search() -> tuple[dict[str, dict[int, pd.DataFrame]], dict[str, Search]]:
    """{method: {steps: five seeds at the rate chosen on validation, a row each}}, and the scores of
    what trains nothing."""
    runs = load_table("real/search").fillna({"targets": ""})
    tuned = at_tuned_rate(runs, "validation_recall_1", TUNING_SEEDS)
    trained = {}
    for name, (targets, rank) in METHODS.items():
        rows = tuned[tuned.steps.gt(0) & tuned.targets.eq(targets) & tuned["rank"].eq(rank)]
        trained[name] = dict(iter(rows.groupby("steps")))
    alone = tuned[tuned.steps.eq(0)].set_index("method")[list(Search._fields)]
    names = {"as it comes": "base", "TF-IDF": "tf-idf"}
    return trained, {name: Search(*alone.loc[method]) for name, method in names.items()}


def compare_search(trained: dict[str, dict[int, pd.DataFrame]]) -> pd.DataFrame:
    """A row a method: recall@1 in % at each number of steps, and full fine-tuning's minus it, as
    `Interval`s; in the last columns recall@5 in % and MRR after the most steps."""
    full, rows = trained["full fine-tuning"], {}
    for name, runs in trained.items():
        row = {}
        for steps in runs:
            ours, theirs = (100 * r[steps].recall_1 for r in (runs, full))
            row[f"{steps} steps"] = mean_interval(ours)
            row[f"full − it, {steps}"] = paired_difference(theirs, ours)
        longest = runs[max(runs)]
        row |= {"recall@5": f"{100 * longest.recall_5.mean():.1f}", "MRR": longest.mrr.mean()}
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def search_costs() -> list[list[object]]:
    """A row a method: its name, trained parameters, milliseconds of a step of 64 pairs (lowest and
    highest of three measurements), GB at the peak of it, and MB of what has to be kept."""
    costs = load_table("real/search_costs").fillna({"targets": ""})
    rows = []
    for name, (targets, rank) in METHODS.items():
        found = costs[costs.targets.eq(targets) & costs["rank"].eq(rank)]
        trained = int(found.trainable.iloc[0])
        peak = found.peak_bytes.max() / 1e9
        rows.append([name, trained, span(found.ms), peak, 4 * trained / 1e6])
    return rows
