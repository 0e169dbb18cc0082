"""Score the counting tables: `python -m lora_lib.experiments.baselines` (a minute on a CPU)."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from lora_lib.baselines import context_table, letter_table
from lora_lib.data import SCRIPTS, load_pairs, load_spellings
from lora_lib.experiments.provenance import provenance
from lora_lib.training import score_names

RESULTS = Path(__file__).parent / "results" / "baselines.json"
TABLES = {"letter": letter_table, "context": context_table}


def score(table: str, script: str, n_pairs: int | None) -> dict:
    """One table, learned from the first `n_pairs` training pairs (None: all), on test towns."""
    spellings = load_spellings(script, "test")
    written = TABLES[table](load_pairs(script, "train")[:n_pairs]).write(list(spellings))
    exact_match, error_rate = score_names(written, spellings)
    return {
        "table": table,
        "script": script,
        "pairs": n_pairs,
        "exact_match": exact_match,
        "error_rate": error_rate,
    }


def load_baselines(path: Path = RESULTS) -> list[dict]:
    """The recorded scores, one dict a table, script and number of pairs (see `score`)."""
    return json.loads(path.read_text("utf-8"))["scores"]


def main() -> None:
    jobs = [(table, script, None) for table in TABLES for script in SCRIPTS]
    jobs += [(table, "georgian", n) for table in TABLES for n in (100, 300, 1000)]
    scores = [score(*job) for job in tqdm(jobs)]
    facts = provenance("python -m lora_lib.experiments.baselines", torch.device("cpu"))
    RESULTS.write_text(json.dumps({"provenance": facts, "scores": scores}, indent=1) + "\n")


if __name__ == "__main__":
    main()
