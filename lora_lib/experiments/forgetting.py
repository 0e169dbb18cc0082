"""What adapting does to Cyrillic on the way: `python -m lora_lib.experiments.forgetting`.

Bits per character on Georgian and on Cyrillic test towns, measured while LoRA and full fine-tuning
train, each at its chosen learning rate and at half of it. Two methods are then compared where they
have learned equally much, not where they happen to stop. Some minutes on a GPU.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path

from lora_lib.data import BASE_SCRIPT, batches_by_length, load_pairs, pair_examples
from lora_lib.experiments.parallel import in_parallel, workers_argument
from lora_lib.experiments.provenance import provenance
from lora_lib.experiments.questions import SEEDS, lora, method
from lora_lib.experiments.runs import Run, chosen_rate, load_results, prepare_model
from lora_lib.model import default_device
from lora_lib.training import bits_per_character, fit

RESULTS = Path(__file__).parent / "results" / "forgetting.json"
MEASURED_AT = (0, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400)  # steps, and after the last one
CYRILLIC_TOWNS = 1000
SETTINGS = {
    "LoRA r=8": lora(8),
    "LoRA r=64": lora(64),
    "full fine-tuning": method("full"),
}


def measure(run: Run) -> dict:
    """The run's settings, and [step, Georgian bits, Cyrillic bits] as it trains."""
    model, tokenizer = prepare_model(run)
    model.to(default_device())
    learned = load_pairs(run.script, "test")
    forgotten = load_pairs(BASE_SCRIPT, "test")[:CYRILLIC_TOWNS]
    track = []

    def look(step: int) -> None:
        bits = (bits_per_character(model, tokenizer, pairs) for pairs in (learned, forgotten))
        track.append([step, *bits])
        model.train()

    def batches() -> Iterator:
        examples = pair_examples(load_pairs(run.script, "train"), tokenizer)
        endless = batches_by_length(examples, run.batch_size, run.seed)
        for step, batch in enumerate(islice(endless, run.steps)):
            if step in MEASURED_AT:
                look(step)
            yield batch

    fit(model, batches(), run.steps, run.lr)
    look(run.steps)
    return asdict(run) | {"track": track}


def cyrillic_bits_at(track: list[list[float]], georgian_bits: float) -> float:
    """Cyrillic bits where a run first reached `georgian_bits`, between two looks in a straight
    line. Raises ValueError if it never did."""
    for (_, g0, c0), (_, g1, c1) in pairwise(track):
        if g1 <= georgian_bits <= g0:
            share = (g0 - georgian_bits) / (g0 - g1)
            return c0 + share * (c1 - c0)
    raise ValueError(f"this run never reached {georgian_bits} bits on Georgian")


def reached_by_all(runs: list[dict]) -> float:
    """The lowest Georgian bits that every one of the runs reached: where they can be compared."""
    return max(min(georgian for _, georgian, _ in run["track"]) for run in runs)


def cyrillic_bits(runs: list[dict], name: str, rate: str, georgian_bits: float) -> list[float]:
    """Cyrillic bits of one method at `georgian_bits`, one value a seed, in the order of seeds."""
    found = [run for run in runs if (run["name"], run["rate"]) == (name, rate)]
    found.sort(key=lambda run: run["seed"])
    return [cyrillic_bits_at(run["track"], georgian_bits) for run in found]


def load_forgetting(path: Path = RESULTS) -> list[dict]:
    """The recorded runs (see `measure`); `name` and `rate` ("chosen" or "half") say which."""
    return json.loads(path.read_text("utf-8"))["runs"]


def main() -> None:
    rows = load_results()
    jobs = [
        (name, rate, replace(run, lr=factor * chosen_rate(rows, run), seed=seed))
        for seed in SEEDS
        for name, run in SETTINGS.items()
        for rate, factor in (("chosen", 1), ("half", 0.5))
    ]
    measured = in_parallel(
        measure, [run for _, _, run in jobs], workers_argument(__doc__.splitlines()[0])
    )
    runs = [
        {"name": name, "rate": rate} | found
        for (name, rate, _), found in zip(jobs, measured, strict=True)
    ]
    facts = provenance("python -m lora_lib.experiments.forgetting", default_device())
    RESULTS.write_text(json.dumps({"provenance": facts, "runs": runs}) + "\n", "utf-8")


if __name__ == "__main__":
    main()
