"""Make the recorded runs: `python -m lora_course.experiments.sweep [--workers N] [question …]`.

Learning rates come first: three on a ladder of 1, 2, 5 around a guess, then one more at the edge as
long as the best lies there, so that the chosen rate always has a worse one on either side. They
are chosen on validation towns; what is reported is test towns. A sweep that was stopped goes on
where it was: a run that stands in the table is not done again.
"""

import argparse
import csv
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from lora_course.experiments.questions import QUESTIONS, SEEDS, Question
from lora_course.experiments.real_runs import take_a_gpu
from lora_course.experiments.recording import record_provenance
from lora_course.experiments.runs import (
    CENTRE,
    COLUMNS,
    LOW_RANK,
    SETTINGS,
    Run,
    execute,
    runs_at,
)
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


def untried_rates(tried: list[float], first: float) -> list[float]:
    """The learning rates to try next, given those tried, the best first: around `first`, then
    beyond the best, until it has a worse one on either side or lies at an end of the ladder."""
    at = LADDER.index(first)
    missing = [rate for rate in LADDER[max(at - 1, 0) : at + 2] if rate not in tried]
    if missing:
        return missing
    at = LADDER.index(tried[0])
    below, above = LADDER[:at][-1:], LADDER[at + 1 :][:1]  # empty at an end of the ladder
    if tried[0] == min(tried):
        return below
    return above if tried[0] == max(tried) else []


def recorded_settings(runs: pd.DataFrame) -> list[Run]:
    """Every row of the table as the run that it records."""
    settings = runs[SETTINGS].astype(object)
    return [Run(**row) for row in settings.where(settings.notna(), None).to_dict("records")]


def plan(runs: pd.DataFrame, questions: Iterable[Question]) -> Iterator[Run]:
    """What is still to be done, given what is recorded: rates to try, then the seeds of every level
    whose rate is chosen."""
    done = set(recorded_settings(runs))
    ready = []
    for question in questions:
        tuning = {
            label: replace(level, script=CENTRE.script, lr=None)
            for label, level in question.levels.items()
        }
        tried = runs_at(tuning, tuning_runs(runs, question.rate_by)).groupby("level").lr.agg(list)
        for label, level in question.levels.items():
            mine = tried.get(label, [])
            rates = [] if level.lr else untried_rates(mine, guess(level))
            missing = [replace(tuning[label], lr=rate) for rate in rates]
            yield from (run for run in missing if run not in done)
            if not rates:
                ready.append(replace(level, lr=level.lr or mine[0]))
    for level in ready:
        yield from (run for seed in SEEDS if (run := replace(level, seed=seed)) not in done)


def _work(run: Run, device: str) -> dict:
    return execute(run, torch.device(device))


def open_table(folder: Path) -> Path:
    """The table of runs in a folder, ready for more rows: with its header, and without a last row
    that was cut off when a sweep was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.csv"
    written = path.read_bytes() if path.is_file() else b""
    if written and not written.endswith(b"\n"):
        os.truncate(path, written.rfind(b"\n") + 1)
    if b"\n" not in written:
        path.write_text(",".join(COLUMNS) + "\n", "utf-8")
    return path


def sweep(questions: list[Question], folder: Path, workers: int, device: str) -> None:
    """Do what `plan` asks for until nothing is left; each row is appended to the table of runs as
    it comes. Workers share the GPUs that are there."""
    path = open_table(folder)
    # A fork of a process that has touched a GPU cannot use it: start workers afresh.
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(workers, take_a_gpu, (context.Value("i", 0),)) as pool,
        path.open("a", encoding="utf-8", newline="") as file,
    ):
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        # A run may tune several questions; what they lead to is planned once all are done.
        while todo := list(dict.fromkeys(plan(load_table("runs", folder), questions))):
            done = pool.imap_unordered(partial(_work, device=device), todo)
            for row in tqdm(done, desc="runs", total=len(todo)):
                table.writerow(row)
                file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(QUESTIONS))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
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
