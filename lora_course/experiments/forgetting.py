"""What adapting does to what the base could do: `python -m lora_course.experiments.forgetting`.

Bits per character on Georgian test towns, and on three things the base had learned, measured while
LoRA and full fine-tuning train, each at its chosen learning rate and at half of it; and LoRA of
r = 8 at the rate of full fine-tuning, which is slow for it. Two methods are then compared where
they have learned equally much, not where they happen to stop. Some minutes on a GPU.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path

from lora_course.experiments.parallel import in_parallel, workers_argument
from lora_course.experiments.provenance import provenance
from lora_course.experiments.questions import SEEDS, Difference, lora, method, paired_difference
from lora_course.experiments.runs import Run, chosen_rate, load_results, prepare_model
from lora_lib.model import default_device
from lora_lib.names import BASE_SCRIPT, SCRIPTS, SECOND_SCRIPT, load_pairs
from lora_lib.scores import bits_per_character
from lora_lib.tokens import Example, Tokenizer, batches_by_length, name_examples, pair_examples
from lora_lib.training import fit

RESULTS = Path(__file__).parent / "results" / "forgetting.json"
MEASURED_AT = (0, 10, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400)  # steps, and after the last one
TOWNS = 1000
SETTINGS = {
    "LoRA r=8": lora(8),
    "LoRA r=64": lora(64),
    "full fine-tuning": method("full"),
}
# What the base could do. The first is asked for by the prompt that must now give Georgian, the
# second by a prompt of its own, the third has no prompt: it goes on with a name of another script.
SKILLS = ("Cyrillic", "Arabic", "names alone")


def examples_of(tokenizer: Tokenizer, script: str) -> dict[str, list[Example]]:
    """Test examples: the pairs of `script`, what is learned, and a list for each of SKILLS."""
    others = [s for s in SCRIPTS if s != script]
    names = [
        name
        for s in others
        for name in sorted({p.target for p in load_pairs(s, "test")})[: TOWNS // len(others)]
    ]
    return {
        "learned": pair_examples(load_pairs(script, "test"), tokenizer),
        "Cyrillic": pair_examples(load_pairs(BASE_SCRIPT, "test")[:TOWNS], tokenizer),
        "Arabic": pair_examples(
            load_pairs(SECOND_SCRIPT, "test")[:TOWNS], tokenizer, SECOND_SCRIPT
        ),
        "names alone": name_examples(names, tokenizer),
    }


def measure(run: Run) -> dict:
    """The run's settings, and its track: looks {"step": …, "learned": bits, a skill: bits, …}."""
    model, tokenizer = prepare_model(run)
    model.to(default_device())
    tests = examples_of(tokenizer, run.script)
    track = []

    def look(step: int) -> None:
        bits = {name: bits_per_character(model, examples) for name, examples in tests.items()}
        track.append({"step": step} | bits)

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


def bits_at(track: list[dict], skill: str, learned: float) -> float:
    """Bits of a skill where a run's bits of what it learns first reached `learned`, between two
    looks in a straight line. Raises ValueError if they never did."""
    for before, after in pairwise(track):
        if after["learned"] <= learned <= before["learned"]:
            share = (before["learned"] - learned) / (before["learned"] - after["learned"])
            return before[skill] + share * (after[skill] - before[skill])
    raise ValueError(f"this run never reached {learned} bits on what it learns")


def reached_by_all(runs: list[dict], rates: Sequence[str] = ("chosen", "half")) -> float:
    """The lowest bits that every run at these rates reached: where they can be compared."""
    compared = (run for run in runs if run["rate"] in rates)
    return max(min(look["learned"] for look in run["track"]) for run in compared)


def bits_by_seed(runs: list[dict], name: str, rate: str, skill: str, learned: float) -> list[float]:
    """Bits of a skill under one method at `learned`, one value a seed, in the order of seeds."""
    found = [run for run in runs if (run["name"], run["rate"]) == (name, rate)]
    found.sort(key=lambda run: run["seed"])
    return [bits_at(run["track"], skill, learned) for run in found]


def minus_full(runs: list[dict], name: str, rate: str, skill: str) -> Difference:
    """Bits of a skill under a setting of LoRA minus those under full fine-tuning, where every run
    compared has learned as much. At the rate of full ("full's"), that one has its chosen rate."""
    learned = reached_by_all(runs, ("chosen", "half", rate))
    full_rate = "chosen" if rate == "full's" else rate
    return paired_difference(
        bits_by_seed(runs, name, rate, skill, learned),
        bits_by_seed(runs, "full fine-tuning", full_rate, skill, learned),
    )


def load_forgetting(path: Path = RESULTS) -> list[dict]:
    """The recorded runs (see `measure`); `name` and `rate` (chosen, half, full's) say which."""
    return json.loads(path.read_text("utf-8"))["runs"]


def main() -> None:
    rows = load_results()
    settings = [
        (name, rate, replace(run, lr=factor * chosen_rate(rows, run)))
        for name, run in SETTINGS.items()
        for rate, factor in (("chosen", 1), ("half", 0.5))
    ]
    rate_of_full = chosen_rate(rows, SETTINGS["full fine-tuning"])
    settings.append(("LoRA r=8", "full's", replace(SETTINGS["LoRA r=8"], lr=rate_of_full)))
    jobs = [(*names, replace(run, seed=seed)) for seed in SEEDS for *names, run in settings]
    measured = in_parallel(
        measure, [run for _, _, run in jobs], workers_argument(__doc__.splitlines()[0])
    )
    runs = [
        {"name": name, "rate": rate} | found
        for (name, rate, _), found in zip(jobs, measured, strict=True)
    ]
    facts = provenance("python -m lora_course.experiments.forgetting", default_device())
    RESULTS.write_text(json.dumps({"provenance": facts, "runs": runs}) + "\n", "utf-8")


if __name__ == "__main__":
    main()
