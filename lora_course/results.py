"""The recorded results: tables that `lora_course.experiments` made, read with pandas.

`runs` is the main one, a row a training run: its settings (see `lora_course.experiments.runs.Run`;
no value in `pairs` means all pairs), the number of its trainable parameters, the device, its scores
on validation towns (`validation_exact_match`, …) and on test towns (`exact_match`, …), and in
`losses` the mean training loss of every 25 steps, as text. The others stand beside it in
`experiments/results/`; `provenance.json` says where, when and with what each was made. Tables of
public models are in `real/` there, with a file each that says so.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lora_course.experiments.recording import RESULTS

# What has a learning rate of its own. Scripts and seeds share one.
# fmt: off
SETTING = ["method", "task", "rank", "alpha", "rslora", "targets", "dropout",
           "pairs", "steps", "batch_size"]
# fmt: on


def load_table(name: str, folder: Path = RESULTS) -> pd.DataFrame:
    """One recorded table, such as "runs" or "k90", every number as it was written.

    Raises FileNotFoundError for a table that is not there.
    """
    path = folder / f"{name}.csv"
    if not path.is_file():
        tables = ", ".join(sorted(file.stem for file in folder.glob("*.csv")))
        raise FileNotFoundError(f"there is no recorded table {name!r}; there are: {tables}")
    # Whole numbers of which one may be missing; a curve of one number is text, too.
    return pd.read_csv(path, dtype={"pairs": "Int64", "layer": "Int64", "losses": str})


def load_runs() -> pd.DataFrame:
    """The recorded training runs, a row each (see above)."""
    return load_table("runs")


def tuning_runs(runs: pd.DataFrame, by: str = "bits") -> pd.DataFrame:
    """The runs that learning rates are chosen from, the best first: seed 0, Georgian.

    What counts is the score on validation towns: accuracy in classification, otherwise the bits
    per character; or with by="exact_match" that, bits breaking ties.
    """
    tried = runs[runs.seed.eq(0) & runs.script.eq("georgian")]
    falling = ["validation_accuracy", *(["validation_exact_match"] if by != "bits" else [])]
    order = {name: False for name in falling} | {"validation_bits": True, "lr": True}
    return tried.sort_values(list(order), ascending=list(order.values()))


def at_chosen_rate(runs: pd.DataFrame, by: str = "bits") -> pd.DataFrame:
    """The runs of every script and seed whose learning rate is the one that was chosen on
    validation for their setting (see `tuning_runs`)."""
    chosen = tuning_runs(runs, by).drop_duplicates(SETTING)
    return runs.merge(chosen[[*SETTING, "lr"]])


# The same where a row is a Job of lora_course.experiments.real_runs.
JOB_SETTING = ["task", "method", "rank", "targets", "steps", "batch_size"]


def at_tuned_rate(
    runs: pd.DataFrame, by: str, seeds: Sequence[int] = (0,), low_is_good: bool = False
) -> pd.DataFrame:
    """Of a table whose rows are Jobs, the runs at the learning rate that was chosen for their
    setting: by the mean of a validation score over the seeds that every rate was tried with. In
    the order of their seeds."""
    tried = runs[runs.seed.isin(seeds)].groupby([*JOB_SETTING, "lr"], dropna=False)
    best_first = tried[by].mean().reset_index().sort_values(by, ascending=low_is_good)
    chosen = best_first.drop_duplicates(JOB_SETTING)
    return runs.merge(chosen[[*JOB_SETTING, "lr"]]).sort_values("seed")
