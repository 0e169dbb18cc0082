"""What the newer experiments share: rates tried, seeds, and rows as they come.

They run on machines that have torch and transformers and little else, so nothing here needs pandas
or PEFT.
"""

import csv
import datetime
import gc
import json
import multiprocessing
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import pairwise
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

from lora_lib.files import write_atomically
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import count_parameters
from lora_lib.model import default_device
from lora_lib.training import fit

LADDER = [m * 10.0**exponent for exponent in range(-7, 1) for m in (1, 3)]
LADDER = [float(f"{rate:.0e}") for rate in LADDER]
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
    """What is compared: a job whatever its rate and seed. Rates are tried on a ladder of 1 and 3
    around `first_rate`, None where nothing is trained."""

    job: Job
    first_rate: float | None = None
    seeds: Sequence[int] = SEEDS


Row = dict[str, object]
SETTINGS = [field.name for field in fields(Job)]


def job_of(row: Mapping[str, str]) -> Job:
    """The job that a row of a table records."""
    kinds = {field.name: field.type for field in fields(Job)}
    return Job(**{name: kind(row[name]) for name, kind in kinds.items()})


# --- what is still to be done --------------------------------------------------------------------


def untried_rates(scores: Mapping[float, float], first: float) -> list[float]:
    """Four rates around `first`, then those beside the best, until it has a worse one on either
    side."""
    at = LADDER.index(first)
    missing = [rate for rate in LADDER[at - 1 : at + 3] if rate not in scores]
    if missing:
        return missing
    best = LADDER.index(max(scores, key=scores.get))
    return [rate for rate in LADDER[max(best - 1, 0) : best + 2] if rate not in scores]


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
    """What is still to be done: rates to try first, then the seeds at every chosen rate. What rates
    are chosen by is `score`, on validation, with sign −1 if a low one is good.

    Raises ValueError for rows without that score."""
    if rows and score not in rows[0]:
        raise ValueError(
            f"the table has no column {score!r}, by which rates are chosen: it is of an older "
            "recording; give --out another folder"
        )
    done = set(map(job_of, rows))
    ready = []
    for setting in settings:
        rates = []
        job = setting.job
        if setting.first_rate:
            scores = rate_scores(rows, job, score, sign, tuning_seeds)
            rates = untried_rates(scores, setting.first_rate)
            tuning = [replace(job, lr=lr, seed=seed) for lr in rates for seed in tuning_seeds]
            yield from (run for run in tuning if run not in done)
            job = replace(job, lr=max(scores, key=scores.get, default=0.0))
        if not rates:
            ready += [replace(job, seed=seed) for seed in setting.seeds]
    yield from (run for run in ready if run not in done)


# --- doing it ------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table, without a last one that was cut off."""
    if not path.is_file():
        return []
    text = path.read_text("utf-8")
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def record(
    path: Path,
    still_to_do: Callable[[list[dict[str, str]]], Iterator[Job]],
    measure: Callable[[Job], Row],
    workers: int,
    seconds: float | None = None,
) -> bool:
    """Do what `still_to_do` asks for, given the rows so far, until nothing is left (True) or the
    time is up (False). Each row is appended to the table as it comes, so a record that was stopped
    goes on where it was. Workers share the GPUs that are there."""
    start = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path)
    _drop_cut_row(path)
    context = multiprocessing.get_context("spawn")  # a fork could not use the GPU
    running = {}
    started = context.Value("i", 0)
    with ProcessPoolExecutor(workers, context, _prepare_worker, (started,)) as pool:
        while True:
            todo = (job for job in still_to_do(rows) if job not in running.values())
            while len(running) < workers and (job := next(todo, None)) is not None:
                running[pool.submit(measure, job)] = job
            if not running:
                return True
            left = seconds and max(0, start + seconds - time.monotonic())
            finished, _ = wait(running, left, FIRST_COMPLETED)
            if not finished:
                for process in list(pool._processes.values()):
                    process.terminate()
                return False
            for future in finished:
                job = running.pop(future)
                row = asdict(job) | future.result()
                rows.append({name: str(value) for name, value in row.items()})
                _append(path, row)
                spent = time.monotonic() - start
                print(f"{spent:5.0f} s, {len(rows)} rows: {job}", flush=True)


def take_a_gpu(started: Synchronized) -> None:
    """One thread, and the next GPU in turn, for this worker; `started` counts the workers."""
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    torch.set_num_threads(1)


def _prepare_worker(started: Synchronized) -> None:
    take_a_gpu(started)
    _set_precision()


def _set_precision() -> None:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU that has it


def _drop_cut_row(path: Path) -> None:
    """So that the next row begins on a line of its own."""
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):
        write_atomically(path, text[: text.rfind(b"\n") + 1])


def _append(path: Path, row: Row) -> None:
    new = not path.is_file() or path.stat().st_size == 0
    with path.open("a", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if new:
            table.writeheader()
        table.writerow(row)


def device_name() -> str:
    device = default_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def write_provenance(path: Path, command: str, versions: Mapping[str, str]) -> None:
    """Where, when and with what a table was made; `versions` are those of the texts' libraries."""
    facts = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "float32 products": "TF32 on a GPU",
        "texts from": dict(versions),
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


# --- models and costs ----------------------------------------------------------------------------


def make_trainable(model: nn.Module, job: Job, targets: Mapping[str, Sequence[str]]) -> nn.Module:
    """Put LoRA in, or leave all weights trainable, as the job says."""
    torch.manual_seed(job.seed)
    if job.method == "lora":
        add_lora_to_model(model, job.rank, 2.0 * job.rank, targets[job.targets])
        freeze_non_lora_params(model)
    return model


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
    _set_precision()
    name = device_name()
    trained = [setting.job for setting in settings if setting.first_rate]
    for job in 3 * trained:
        row = asdict(job) | {"device": name} | measure_cost(job)
        _append(path, row)
        print(row, flush=True)


def thinned(losses: Sequence[float], every: int = 10) -> str:
    """Means of `every` steps, as text: enough to draw a curve."""
    groups = [losses[i : i + every] for i in range(0, len(losses), every)]
    return " ".join(f"{mean(group):.4f}" for group in groups)


def default_workers() -> int:
    return max(1, (os.cpu_count() or 2) // 2)
