"""Make the recorded runs: `python -m lora_course.experiments.sweep [--workers N] [question …]`.

Learning rates come first: three on a ladder of 1, 2, 5 around a guess, then one more at the edge as
long as the best lies there, so that the chosen rate always has a worse one on either side. They
are chosen on validation towns; what is reported is test towns. A sweep that was stopped goes on
where it was: a run that stands in the results file is not done again.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from lora_course.experiments.provenance import provenance
from lora_course.experiments.questions import QUESTIONS, SEEDS, Question
from lora_course.experiments.runs import (
    CENTRE,
    RESULTS,
    Run,
    execute,
    load_results,
    run_of,
    tried_rates,
    tuning_key,
)
from lora_lib.model import default_device

LADDER = tuple(m * 10.0**e for e in range(-5, 1) for m in (1, 2, 5))
LADDER = tuple(float(f"{rate:g}") for rate in LADDER)  # 2e-4 exactly, not 2.0000000000000001e-4


def guess(run: Run) -> float:
    """Where on the ladder to begin; wrong guesses only cost runs."""
    if run.task == "same-town":
        return {"lora": 1e-3, "head": 1e-2}.get(run.method, 2e-4)
    if run.method == "head":
        return 2e-2
    if run.method == "full-sgd":
        return 1e-1
    if not run.method.startswith("lora"):
        return 1e-3
    return 2e-2 if run.rank <= 2 else 1e-2 if run.rank <= 8 else 5e-3 if run.rank <= 16 else 2e-3


def untried_rates(tried: dict[float, float], first: float) -> list[float]:
    """The learning rates to try next, none if the best one tried has a worse one on either side or
    lies at an end of the ladder."""
    at = LADDER.index(first)
    missing = [rate for rate in LADDER[max(at - 1, 0) : at + 2] if rate not in tried]
    if missing:
        return missing
    best = max(tried, key=tried.get)
    at = LADDER.index(best)
    below, above = LADDER[:at][-1:], LADDER[at + 1 :][:1]  # empty at an end of the ladder
    if best == min(tried):
        return list(below)
    return list(above) if best == max(tried) else []


def plan(rows: list[dict], questions: Iterable[Question]) -> Iterator[Run]:
    """What is still to be done, given what is recorded: rates to try, then the seeds of every level
    whose rate is chosen."""
    done = {run_of(row) for row in rows}
    ready = []
    for question in questions:
        for label, level in question.levels.items():
            setting = tuning_key(level)
            tried = tried_rates(rows, setting, question.rate_by)
            rates = [] if level.lr else untried_rates(tried, guess(setting))
            yield from (run for rate in rates if (run := replace(setting, lr=rate)) not in done)
            if not rates:
                ready.append((question, label))
    for question, label in ready:
        yield from (run for run in question.runs(label, rows) if run not in done)


def _work(run: Run, device: str) -> dict:
    torch.set_num_threads(1)
    return execute(run, torch.device(device)) | {"device": device.partition(":")[0]}


def sweep(
    questions: list[Question], path: Path, workers: int, device: str, seconds: float = float("inf")
) -> None:
    """Do what `plan` asks for until nothing is left or the time is up; each result is appended to
    `path` as it comes."""
    end = time.monotonic() + seconds
    rows = load_results(path)
    total = sum(len(question.levels) for question in questions) * len(SEEDS)
    # A fork of a process that has touched a GPU cannot use it: start workers afresh.
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, context) as pool,
        path.open("a") as file,
        tqdm(desc="runs", mininterval=10, unit="run") as bar,
    ):
        running = {}
        while True:
            todo = (run for run in plan(rows, questions) if run not in running.values())
            while len(running) < workers and (run := next(todo, None)) is not None:
                running[pool.submit(_work, run, device)] = run
            if not running:
                return
            finished, _ = wait(running, max(0, end - time.monotonic()), FIRST_COMPLETED)
            if not finished:  # the time is up
                for process in pool._processes.values():
                    process.terminate()
                return
            for future in finished:
                rows.append(future.result())
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                del running[future]
                bar.update()
            bar.set_postfix_str(f"at most {total} after tuning", refresh=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(QUESTIONS))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--device", default=default_device().type)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    unknown = set(arguments.questions) - QUESTIONS.keys()
    if unknown:
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.touch()
    facts = provenance("python -m lora_course.experiments.sweep", torch.device(arguments.device))
    facts |= {"centre": asdict(CENTRE)}
    arguments.out.with_suffix(".provenance.json").write_text(json.dumps(facts, indent=2) + "\n")
    chosen = [QUESTIONS[name] for name in arguments.questions or QUESTIONS]
    sweep(chosen, arguments.out, arguments.workers, arguments.device, arguments.seconds)


if __name__ == "__main__":
    main()
