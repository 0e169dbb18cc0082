"""What was recorded of LoRA on a base of few bits (`lora_course.experiments.quantised_runs`): the
table `bits`, as `load_table` gives it."""

from collections.abc import Sequence

import pandas as pd

from lora_course.experiments.quantised_runs import PRECISIONS, WAYS
from lora_course.experiments.questions import Interval, paired_difference
from lora_course.results import at_tuned_rate


def adapted(table: pd.DataFrame) -> pd.DataFrame:
    """The LoRA runs at the rate that was chosen for their precision, in the order of the seeds."""
    return at_tuned_rate(table[table.method.eq("lora")], "validation_exact_match")


def errors_by_bits(table: pd.DataFrame) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Error rates of a row each: {title: {kind of levels, or "float": {bits: a list}}}."""
    alone = table[table.method.eq("base")]
    groups = {"The base alone: Cyrillic": alone, "With LoRA: Georgian": adapted(table)}
    panels = {}
    for title, rows in groups.items():
        panels[title] = {"float": {}, "normal": {}, "even": {}}
        for name, form in PRECISIONS.items():
            kind, bits = (form.kind, form.bits) if form else ("float", 32)
            panels[title][kind][bits] = list(rows[rows.task.eq(name)].error_rate_beside)
    return panels


def minus(table: pd.DataFrame, ours: str, theirs: str, score: str) -> Interval:
    """The score beside a base of the precision `ours` minus that of `theirs`, seed by seed."""
    runs = adapted(table).groupby("task")[f"{score}_beside"]
    return paired_difference(*(runs.get_group(name) for name in (ours, theirs)))


def after_training(table: pd.DataFrame, score: str, names: Sequence[str]) -> list[list]:
    """A row for each of WAYS: in words, the mean score on each precision in `names`, and the kB of
    the first of them."""
    runs = adapted(table).groupby("task")
    rows = []
    for way, words in WAYS.items():
        size = runs[f"bytes_{way}"].min()[names[0]]
        rows.append([words, *runs[f"{score}_{way}"].mean()[names], round(size / 1000)])
    return rows
