"""What experiments with a learning rate for every setting share: rates tried, seeds, and rows as
they come; and the models and costs of those whose run is a `Job`."""

import argparse
import gc
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

from lora_course.experiments.recording import (
    Row,
    default_workers,
    device_name,
    drop_cut_row,
    provenance,
    read_rows,
    take_a_gpu,
    write_json,
    write_table,
)
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import count_parameters
from lora_lib.model import default_device
from lora_lib.training import fit

LADDER = [float(f"{m}e{exponent}") for exponent in range(-7, 1) for m in (1, 3)]
FIRST_RATE = 1e-3  # where it is tried first
SEEDS = range(5)


@dataclass(frozen=True)
class Job:
    """One run. Methods: "lora" (rank and targets are its, alpha is 2 r), "full", and those that
    train nothing, with lr 0."""

    task: str
    method: str
    rank: int = 0
    targets: str = ""
    steps: int = 0
    batch_size: int = 0
    lr: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """What is compared: a job (or another dataclass with a rate and a seed) whatever its seed and,
    where it is `tuned`, its rate."""

    job: Job
    tuned: bool = True
    seeds: Sequence[int] = SEEDS


def job_of(row: Mapping[str, str]) -> Job:
    """The job that a row of a table records."""
    kinds = {field.name: field.type for field in fields(Job)}
    return Job(**{name: kind(row[name]) for name, kind in kinds.items()})


# --- what is still to be done --------------------------------------------------------------------


def untried_rates(tried: Sequence[float], ladder: Sequence[float] = LADDER) -> list[float]:
    """The rates to try next, given those tried, the best first: those beside it on the ladder, so
    that in the end it has a worse one on either side or lies at an end."""
    at = ladder.index(tried[0] if tried else FIRST_RATE)
    return [rate for rate in ladder[max(at - 1, 0) : at + 2] if rate not in tried]


def still_missing(
    asked: Iterable[tuple[Setting, Job, Sequence[float]]],
    done: Collection[Job],
    tuning_seeds: Sequence[int] = (0,),
    ladder: Sequence[float] = LADDER,
) -> Iterator[Job]:
    """What is not done yet: of settings, each with the job whose rates are tried for it and those
    that were, the best first. Rates to try come first, then the seeds of every setting whose rate
    is chosen."""
    ready = []
    for setting, tuning, tried in asked:
        job, rates = setting.job, []
        if setting.tuned:
            rates = untried_rates(tried, ladder)
            runs = (replace(tuning, lr=lr, seed=seed) for lr in rates for seed in tuning_seeds)
            yield from (run for run in runs if run not in done)
            job = replace(job, lr=tried[0] if tried else 0.0)
        if not rates:
            ready += [replace(job, seed=seed) for seed in setting.seeds]
    yield from (run for run in ready if run not in done)


def rate_scores(
    rows: Sequence[Mapping[str, str]], job: Job, score: str, sign: int, seeds: Sequence[int]
) -> dict[float, float]:
    """Rate → mean score of a setting over the seeds that rates are chosen with, the higher the
    better; only rates at which all these seeds are done."""
    found = defaultdict(dict)
    for row in rows:
        done = job_of(row)
        if replace(done, lr=job.lr, seed=job.seed) == job:
            found[done.lr][done.seed] = sign * float(row[score])
    return {
        lr: mean(by_seed[seed] for seed in seeds)
        for lr, by_seed in found.items()
        if by_seed.keys() >= set(seeds)
    }


def plan(
    rows: Sequence[Mapping[str, str]],
    settings: Sequence[Setting],
    score: str,
    sign: int = 1,
    tuning_seeds: Sequence[int] = (0,),
) -> Iterator[Job]:
    """What is still to be done. What rates are chosen by is `score`, on validation, with sign −1 if
    a low one is good."""

    def best_first(setting: Setting) -> list[float]:
        if not setting.tuned:
            return []
        scores = rate_scores(rows, setting.job, score, sign, tuning_seeds)
        return sorted(scores, key=scores.get, reverse=True)

    asked = ((setting, setting.job, best_first(setting)) for setting in settings)
    return still_missing(asked, set(map(job_of, rows)), tuning_seeds)


# --- doing it ------------------------------------------------------------------------------------


def record(
    path: Path,
    still_to_do: Callable[[list[dict[str, str]]], Iterator[Job]],
    measure: Callable[[Job], Row],
    workers: int,
    note_origin: Callable[[], None],
    precision: str = "high",
) -> None:
    """Do what `still_to_do` asks for, given the rows so far, until nothing is left; `note_origin`
    is called before, if there is anything. Each row is appended to the table as it comes, so a
    record that was stopped goes on where it was. Workers share the GPUs that are there; `precision`
    is that of float32 products, "high" meaning TF32 on a GPU that has it."""
    start = time.monotonic()
    drop_cut_row(path)
    rows = read_rows(path)
    if next(still_to_do(rows), None):
        note_origin()
    context = multiprocessing.get_context("spawn")  # a fork could not use the GPU
    running, todo = {}, []
    shared = context.Value("i", 0), precision
    with ProcessPoolExecutor(workers, context, take_a_gpu, shared) as pool:
        while True:
            if not todo:
                planned = dict.fromkeys(still_to_do(rows))
                todo = [job for job in planned if job not in running.values()]
            while todo and len(running) < workers:
                job = todo.pop(0)
                running[pool.submit(measure, job)] = job
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                row = asdict(job) | future.result()
                rows.append({name: str(value) for name, value in row.items()})
                write_table(path, [row], "a")
                spent = time.monotonic() - start
                print(f"{spent:5.0f} s, {len(rows)} rows: {job}", flush=True)


def options(doc: str, out: Path) -> argparse.ArgumentParser:
    """The command line of a recording."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=out, help="the folder of the table")
    parser.add_argument("--workers", type=int, default=default_workers())
    return parser


def carry_out(
    experiment: str,
    table: str,
    given: argparse.Namespace,
    settings: Sequence[Setting],
    measure: Callable[[Job], Row],
    versions: Mapping[str, str],
    **chosen_by,
) -> None:
    """Record the table with the `options` given, and beside it where, when and with what it is
    made; `versions` are those of the texts' libraries. Rates are chosen as `plan` has it, by what
    `chosen_by` says."""

    def note_origin() -> None:
        made = provenance(experiment, default_device(), "transformers")
        made |= {"float32 products": "TF32 on a GPU", "texts from": dict(versions)}
        write_json(given.out / f"{table}_provenance.json", made)

    given.out.mkdir(parents=True, exist_ok=True)
    todo = partial(plan, settings=settings, **chosen_by)
    record(given.out / f"{table}.csv", todo, measure, given.workers, note_origin)


# --- training and its costs ----------------------------------------------------------------------


def make_trainable(model: nn.Module, job: Job, targets: Mapping[str, Sequence[str]]) -> nn.Module:
    """Put LoRA in, or leave all weights trainable, as the job says."""
    torch.manual_seed(job.seed)
    if job.method == "lora":
        add_lora_to_model(model, job.rank, 2.0 * job.rank, targets[job.targets])
        freeze_non_lora_params(model)
    return model


def train_job(
    job: Job, model: nn.Module, train: Callable[[], Row], columns: Sequence[str]
) -> tuple[Row, bool]:
    """Let `train` train the model, if the job has steps. The first part of its row: device, costs,
    and in `columns` what `train` returns; and whether the loss stayed finite."""
    device = default_device()
    row = {"device": device.type, "trainable": 0, "peak_bytes": 0, "seconds": 0.0}
    row |= dict.fromkeys(columns, "")
    if not job.steps:
        return row, True
    row["trainable"] = count_parameters(model, only_trainable=True)
    peak_bytes(device)
    start = time.perf_counter()
    try:
        row |= train()
    except FloatingPointError:
        return row, False
    return row | {"peak_bytes": peak_bytes(device), "seconds": time.perf_counter() - start}, True


def looking(batches: Iterable, look: Callable[[int], None], at: Container[int]) -> Iterator:
    """The batches; before the steps in `at`, `look` is called with the number of steps so far."""
    for step, batch in enumerate(batches):
        if step in at:
            look(step)
        yield batch


def peak_bytes(device: torch.device) -> int:
    """The most that tensors of this process took on a GPU since the last call; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    gc.collect()  # a model of the last run that is still there would count
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def time_steps(
    model: nn.Module, batches: Iterable, loss_function: Callable, steps: int = 30
) -> Row:
    """The median milliseconds of a training step after the first ten, and the most memory."""
    device = default_device()
    stamps = []

    def stamped() -> Iterator:
        for batch in batches:
            stamps.append(time.perf_counter())
            yield batch

    peak_bytes(device)
    fit(model, stamped(), steps, 1e-6, loss_function=loss_function)
    gaps = [after - before for before, after in pairwise(stamps[steps // 3 :])]
    trainable = count_parameters(model, only_trainable=True)
    peak = peak_bytes(device)
    return {"trainable": trainable, "ms": 1000 * median(gaps), "peak_bytes": peak}


def record_costs(
    path: Path, settings: Sequence[Setting], measure_cost: Callable[[Job], Row]
) -> None:
    """Three rows for every setting that trains, unless the table is there: in turns, since times
    of the same step differ from minute to minute, and before anything else uses the device."""
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    name = device_name(default_device())
    trained = [setting.job for setting in settings if setting.tuned]
    for job in 3 * trained:
        write_table(path, [asdict(job) | {"device": name} | measure_cost(job)], "a")


def thinned(losses: Sequence[float], every: int = 10) -> str:
    """Means of `every` steps, as text: enough to draw a curve."""
    groups = [losses[i : i + every] for i in range(0, len(losses), every)]
    return " ".join(f"{mean(group):.4f}" for group in groups)
