"""Make the recorded runs: `python -m lora_course.experiments.sweep [--workers N] [question …]`.

Learning rates come first: three on a ladder of 1, 2, 5 around a guess, then one more at the edge as
long as the best lies there, so that the chosen rate always has a worse one on either side. They
are chosen on validation towns; what is reported is test towns. A sweep that was stopped goes on
where it was: a run that stands in the table is not done again.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from lora_course.experiments.questions import QUESTIONS, SEEDS, Question
from lora_course.experiments.real_runs import Setting, record, still_missing
from lora_course.experiments.recording import default_workers, drop_cut_row, record_provenance
from lora_course.experiments.runs import CENTRE, COLUMNS, LOW_RANK, SETTINGS, Run, execute, runs_at
from lora_course.results import RESULTS, load_table, tuning_runs
from lora_lib.model import default_device

STARTS = {"pissa": 5e-3, "lora+4": 5e-3, "lora+16": 2e-3}  # rates to begin with
LADDER = [float(f"{m}e{exponent}") for exponent in range(-5, 1) for m in (1, 2, 5)]


def guess(run: Run) -> float:
    """Where on the ladder to begin; wrong guesses only cost runs."""
    if run.task == "same-town":
        return {"lora": 1e-3, "head": 1e-2}.get(run.method, 2e-4)
    if run.method == "head":
        return 2e-2
    if run.method == "full-sgd":
        return 1e-1
    if not run.method.startswith(LOW_RANK):
        return 1e-3
    if run.method in STARTS:
        return STARTS[run.method]
    return 2e-2 if run.rank <= 2 else 1e-2 if run.rank <= 8 else 5e-3 if run.rank <= 16 else 2e-3


def recorded_settings(runs: pd.DataFrame) -> list[Run]:
    """Every row of the table as the run that it records."""
    settings = runs[SETTINGS].astype(object)
    return [Run(**row) for row in settings.where(settings.notna(), None).to_dict("records")]


def plan(runs: pd.DataFrame, questions: Iterable[Question]) -> Iterator[Run]:
    """What is still to be done, given what is recorded: rates to try, then the seeds of every level
    whose rate is chosen."""
    asked = []
    for question in questions:
        levels = question.levels
        tuning = {n: replace(run, script=CENTRE.script, lr=None) for n, run in levels.items()}
        tried = runs_at(tuning, tuning_runs(runs, question.rate_by)).groupby("level").lr.agg(list)
        asked += [
            (Setting(run, None if run.lr else guess(run), SEEDS), tuning[n], tried.get(n, []))
            for n, run in levels.items()
        ]
    return still_missing(asked, set(recorded_settings(runs)), ladder=LADDER, width=3)


def measure(run: Run, device: str) -> dict:
    """The row of a run, "" in columns that it has no score for."""
    return dict.fromkeys(COLUMNS, "") | execute(run, torch.device(device))


def open_table(folder: Path) -> Path:
    """The table of runs in a folder, ready for more rows: with its header, and without a last row
    that was cut off when a sweep was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.csv"
    drop_cut_row(path)
    if not path.is_file() or not path.stat().st_size:
        path.write_text(",".join(COLUMNS) + "\n", "utf-8")
    return path


def sweep(questions: list[Question], folder: Path, workers: int, device: str) -> None:
    """Do what `plan` asks for until nothing is left."""

    def todo(_) -> Iterator[Run]:
        return plan(load_table("runs", folder), questions)

    work = partial(measure, device=device)
    record(open_table(folder), todo, work, workers, precision="highest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(QUESTIONS))
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--device", default=default_device().type)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the table")
    arguments = parser.parse_args()
    unknown = set(arguments.questions) - QUESTIONS.keys()
    if unknown:
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    chosen = [QUESTIONS[name] for name in arguments.questions or QUESTIONS]
    open_table(arguments.out)
    if next(plan(load_table("runs", arguments.out), chosen), None):
        record_provenance("sweep", torch.device(arguments.device), arguments.out)
    sweep(chosen, arguments.out, arguments.workers, arguments.device)


if __name__ == "__main__":
    main()
