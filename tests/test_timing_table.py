"""The table of timings holds what was recorded before it, value by value; goes when it moves."""

import json
import math
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent.parent / "lora_course/experiments/results"
FILES = {"benchmark_cpu": "CPU", "benchmark_cuda": "GPU", "large": "GPU"}


def before():
    """(processor, settings, method) → everything that was recorded of it."""
    found = {}
    for file, processor in FILES.items():
        for line in (RESULTS / f"{file}.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            shared = row["provenance"] | {"device_bytes": row.get("device_bytes")}
            facts = {name: each | {"failed": None} for name, each in row["contestants"].items()} | {
                name: {"failed": reason} for name, reason in row["failed"].items()
            }
            for name, each in facts.items():
                method = row["name"] if name == "full" and row["case"]["vocabulary"] else name
                differences = each.pop("differences", {})
                each |= {f"{what.rstrip('s')}_difference": x for what, x in differences.items()}
                each |= row.get("profile", {}).get(name, {})
                found[processor, *row["case"].values(), method] = each | shared
    return found


def after():
    table = pd.read_csv(RESULTS / "timing.csv")
    found = {}
    for row in table.to_dict("records"):
        key = tuple(row.pop(name) for name in table.columns[:12])
        if isinstance(row["ms"], str):
            row["ms"] = list(map(float, row["ms"].split()))
        found[key] = row
    return found


def test_every_value_is_the_same():
    old, new = before(), after()
    assert list(old) == list(new) and len(old) == 251
    count = 0
    for key, facts in old.items():
        kept = {k: v for k, v in new[key].items() if not (isinstance(v, float) and math.isnan(v))}
        assert kept == {k: v for k, v in facts.items() if v is not None}
        count += len(kept)
    assert count > 4000
