"""What full fine-tuning changes: `python -m lora_lib.experiments.change`.

Fine-tune all weights (at the sweep's learning rate, steps and seeds), look at the singular values
of every ΔW, and cut every ΔW to rank r. As a comparison: as many more steps of pretraining.
Twenty minutes on two CPU cores.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from lora_lib.analysis import k90, noise_like, singular_values, weight_changes, with_changes_cut
from lora_lib.data import BASE_SCRIPT, load_pairs
from lora_lib.experiments.provenance import provenance
from lora_lib.experiments.sweep import (
    BATCH_SIZE,
    CENTRE,
    Run,
    chosen_rate,
    load_results,
    prepare_model,
)
from lora_lib.model import default_device, load_pretrained
from lora_lib.training import adapt, evaluate

RESULTS = Path(__file__).parent / "results" / "change.json"
CUTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


def measure(run: Run, cuts: tuple[int, ...]) -> dict:
    """k90 of every ΔW of one run of full fine-tuning, and test scores with every ΔW cut."""
    device = default_device()
    base, tokenizer = load_pretrained()
    model, _ = prepare_model(run)
    model.to(device)
    pairs = load_pairs(run.script, "train")[: run.pairs]
    adapt(model, tokenizer, pairs, steps=run.steps, lr=run.lr, batch_size=BATCH_SIZE, seed=run.seed)
    changes = weight_changes(base, model.cpu())
    return asdict(run) | {
        "k90": {path: k90(singular_values(change)) for path, change in changes.items()},
        "k90_of_noise": {
            path: k90(singular_values(noise_like(change))) for path, change in changes.items()
        },
        "cut": {
            rank: evaluate(
                with_changes_cut(base, model, rank).to(device), tokenizer, run.script
            )._asdict()
            for rank in cuts
        },
    }


def load_changes(path: Path = RESULTS) -> list[dict]:
    """The recorded runs, one dict each (see `measure`; JSON makes the ranks of `cut` strings)."""
    return json.loads(path.read_text("utf-8"))["runs"]


def main() -> None:
    full = replace(CENTRE, method="full")
    full = replace(full, lr=chosen_rate(load_results(), full))
    jobs = [
        (replace(full, script=script, seed=seed), cuts)
        for script, cuts in (("georgian", CUTS), ("greek", ()), (BASE_SCRIPT, ()))
        for seed in range(3)
    ]
    runs = [measure(*job) for job in tqdm(jobs)]
    facts = provenance("python -m lora_lib.experiments.change", default_device())
    RESULTS.write_text(json.dumps({"provenance": facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
