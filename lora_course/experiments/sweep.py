"""Make the recorded runs: `python -m lora_course.experiments.sweep [--workers N] [question …]`.

Learning rates come first: three on a ladder of 1, 2, 5 around 0.001, then one more at the edge as
long as the best lies there, so that the chosen rate always has a worse one on either side. They
are chosen on validation towns; what is reported is test towns. A sweep that was stopped goes on
where it was: a run that stands in the table is not done again.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

import pandas as pd

from lora_course.experiments.questions import QUESTIONS, SEEDS, Question
from lora_course.experiments.real_runs import Setting, record, still_missing
from lora_course.experiments.recording import default_workers, record_provenance
from lora_course.experiments.runs import CENTRE, COLUMNS, SETTINGS, Run, execute, runs_at
from lora_course.results import RESULTS, load_runs, tuning_runs
from lora_lib.model import default_device

LADDER = [float(f"{m}e{exponent}") for exponent in range(-5, 1) for m in (1, 2, 5)]


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
            (Setting(run, run.lr is None, SEEDS), tuning[n], tried.get(n, []))
            for n, run in levels.items()
        ]
    return still_missing(asked, set(recorded_settings(runs)), ladder=LADDER)


def measure(run: Run) -> dict:
    """The row of a run, "" in columns that it has no score for."""
    return dict.fromkeys(COLUMNS, "") | execute(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(QUESTIONS))
    parser.add_argument("--workers", type=int, default=default_workers())
    arguments = parser.parse_args()
    unknown = set(arguments.questions) - QUESTIONS.keys()
    if unknown:
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    chosen = [QUESTIONS[name] for name in arguments.questions or QUESTIONS]

    def todo(_) -> Iterator[Run]:
        return plan(load_runs(), chosen)

    note_origin = partial(record_provenance, "sweep", default_device())
    table, workers = RESULTS / "runs.csv", arguments.workers
    record(table, todo, measure, workers, note_origin, precision="highest")


if __name__ == "__main__":
    main()
