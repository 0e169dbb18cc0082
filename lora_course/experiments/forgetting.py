"""What adapting does to what the base could do: `python -m lora_course.experiments.forgetting`.

Bits per character on Georgian test towns, and on three things the base had learned, measured while
LoRA and full fine-tuning train, each at its chosen learning rate and at half of it; and LoRA of
r = 8 at the rate of full fine-tuning, which is slow for it. Two methods are then compared where
they have learned equally much, not where they happen to stop. Some minutes on a GPU.

The table `forgetting` has a row a look: how many bits each thing costs after so many steps.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from lora_course.experiments.questions import SEEDS, Interval, lora, method, paired_difference
from lora_course.experiments.real_runs import looking
from lora_course.experiments.recording import in_parallel, record_tables, workers_argument
from lora_course.experiments.runs import Run, chosen_rate, prepare_model
from lora_course.experiments.skills import examples_of
from lora_course.results import load_runs
from lora_lib.model import default_device
from lora_lib.names import load_pairs
from lora_lib.scores import bits_per_character
from lora_lib.tokens import batches_by_length, pair_examples
from lora_lib.training import fit

MEASURED_AT = (0, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400)  # steps, and after the last one
FULL = "full fine-tuning"
SETTINGS = {"LoRA r=8": lora(8), "LoRA r=64": lora(64), FULL: method("full")}


def measure(run: Run) -> list[dict]:
    """The looks at a run: {"step": …, "learned": bits, a skill: bits, …}."""
    model, tokenizer = prepare_model(run)
    model.to(default_device())
    tests = examples_of(tokenizer, run.script)
    looks = []

    def look(step: int) -> None:
        bits = {name: bits_per_character(model, examples) for name, examples in tests.items()}
        looks.append({"step": step} | bits)

    examples = pair_examples(load_pairs(run.script, "train"), tokenizer)
    batches = batches_by_length(examples, run.batch_size, run.seed)
    fit(model, looking(batches, look, MEASURED_AT), run.steps, run.lr)
    look(run.steps)
    return looks


# --- reading the table ---------------------------------------------------------------------------


def bits_at(track: pd.DataFrame, skill: str, learned: float) -> float:
    """Bits of a skill where a run's bits of what it learns first reached `learned`, between two
    looks in a straight line. Raises ValueError if they never did."""
    new, old = track.learned.to_numpy(), track[skill].to_numpy()
    crossed = (new[1:] <= learned) & (learned <= new[:-1])
    if not crossed.any():
        raise ValueError(f"this run never reached {learned} bits on what it learns")
    before = crossed.argmax()
    after = before + 1
    return float(np.interp(learned, new[[after, before]], old[[after, before]]))


def reached_by_all(looks: pd.DataFrame, rates: Sequence[str] = ("chosen", "half")) -> float:
    """The lowest bits that every run at these rates reached: where they can be compared."""
    compared = looks[looks.rate.isin(rates)]
    return compared.groupby(["setting", "rate", "seed"]).learned.min().max()


def bits_by_seed(
    looks: pd.DataFrame, setting: str, rate: str, skill: str, learned: float
) -> list[float]:
    """Bits of a skill in one setting at `learned`, one value a seed, in the order of seeds."""
    found = looks[looks.setting.eq(setting) & looks.rate.eq(rate)]
    return [bits_at(track, skill, learned) for _, track in found.groupby("seed")]


def minus_full(looks: pd.DataFrame, setting: str, rate: str, skill: str) -> Interval:
    """Bits of a skill under a setting of LoRA minus those under full fine-tuning, where every run
    compared has learned as much. At the rate of full ("full's"), that one has its chosen rate."""
    learned = reached_by_all(looks, ("chosen", "half", rate))
    full_rate = "chosen" if rate == "full's" else rate
    return paired_difference(
        bits_by_seed(looks, setting, rate, skill, learned),
        bits_by_seed(looks, FULL, full_rate, skill, learned),
    )


def main() -> None:
    runs = load_runs()
    rates = {name: chosen_rate(runs, run) for name, run in SETTINGS.items()}
    tried = [(name, "chosen", rate) for name, rate in rates.items()]
    tried += [(name, "half", rate / 2) for name, rate in rates.items()]
    tried.append(("LoRA r=8", "full's", rates[FULL]))
    names = ("setting", "rate", "lr")
    keys = [dict(zip(names, one, strict=True), seed=seed) for seed in SEEDS for one in tried]
    jobs = [replace(SETTINGS[k["setting"]], lr=k["lr"], seed=k["seed"]) for k in keys]
    tracks = in_parallel(measure, jobs, workers_argument(__doc__))
    rows = [key | look for key, looks in zip(keys, tracks, strict=True) for look in looks]
    record_tables("forgetting", default_device(), {"forgetting": rows})


if __name__ == "__main__":
    main()
