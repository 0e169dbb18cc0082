"""What full fine-tuning changes: `python -m lora_course.experiments.change`.

Fine-tune all weights (at the sweep's learning rate, steps and seeds), look at the singular values
of every ΔW, and cut every ΔW to rank r. As comparisons: as many more steps of pretraining, and SGD
in place of Adam. Minutes on a GPU, an hour on two CPU cores.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

from lora_course.experiments.parallel import in_parallel, workers_argument
from lora_course.experiments.provenance import provenance
from lora_course.experiments.questions import SEEDS, method
from lora_course.experiments.runs import Run, chosen_rate, load_results, prepare_model, train
from lora_lib.model import default_device
from lora_lib.names import BASE_SCRIPT
from lora_lib.pretrained import load_pretrained
from lora_lib.rank import k90, noise_like, singular_values, weight_changes, with_changes_cut
from lora_lib.scores import evaluate

RESULTS = Path(__file__).parent / "results" / "change.json"
CUTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


def measure(job: tuple[Run, tuple[int, ...]]) -> dict:
    """For a run of full fine-tuning, and some ranks: k90 of every ΔW, and the test scores with
    every ΔW cut to each rank."""
    run, cuts = job
    device = default_device()
    base, tokenizer = load_pretrained()
    model, _ = prepare_model(run)
    train(run, model.to(device), tokenizer)
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


def load_changes(path: Path = RESULTS, **factors) -> list[dict]:
    """The recorded runs that have these factors (method="full", script="georgian", …), one dict
    each (see `measure`; JSON makes the ranks of `cut` strings)."""
    runs = json.loads(path.read_text("utf-8"))["runs"]
    return [run for run in runs if all(run[name] == value for name, value in factors.items())]


def attention_k90(run: dict, of: str = "k90") -> float:
    """Mean k90 of the square attention matrices of one recorded run; of="k90_of_noise" for the
    noise of equal norm beside them."""
    return mean(k for path, k in run[of].items() if ".attention." in path)


def main() -> None:
    rows = load_results()
    jobs = [
        (replace(method(name, script=script), lr=chosen_rate(rows, method(name)), seed=seed), cuts)
        for name, script, cuts in (
            ("full", "georgian", CUTS),
            ("full", "greek", ()),
            ("full", BASE_SCRIPT, ()),
            ("full-sgd", "georgian", ()),
        )
        for seed in SEEDS
    ]
    runs = in_parallel(measure, jobs, workers_argument(__doc__.splitlines()[0]))
    facts = provenance("python -m lora_course.experiments.change", default_device())
    RESULTS.write_text(json.dumps({"provenance": facts, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
