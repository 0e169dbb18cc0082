"""What full fine-tuning changes: `python -m lora_course.experiments.weight_changes`.

Fine-tune all weights (at the sweep's learning rate, steps and seeds), look at the singular values
of every ΔW, and cut every ΔW to rank r. As comparisons: as many more steps of pretraining, and SGD
in place of Adam. Minutes on a GPU, an hour on two CPU cores.

It makes two tables: `k90`, a row a weight matrix, and `cuts`, a row a rank.
"""

from dataclasses import replace
from itertools import chain

from lora_course.experiments.questions import SEEDS, method
from lora_course.experiments.recording import in_parallel, place, record_tables, workers_argument
from lora_course.experiments.runs import Run, chosen_rate, prepare_model, train
from lora_course.results import load_runs
from lora_lib.model import default_device
from lora_lib.names import BASE_SCRIPT
from lora_lib.pretrained import load_pretrained
from lora_lib.rank import k90, noise_like, singular_values, weight_changes, with_changes_cut
from lora_lib.scores import evaluate

CUTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


def measure(job: tuple[Run, tuple[int, ...]]) -> tuple[list[dict], list[dict]]:
    """For a run of full fine-tuning, and some ranks: k90 of every ΔW and of noise of its size, and
    the test scores with every ΔW cut to each rank."""
    run, cuts = job
    device = default_device()
    base, tokenizer = load_pretrained()
    model, _ = prepare_model(run)
    train(run, model.to(device), tokenizer)
    changes = weight_changes(base, model.cpu())
    key = {"method": run.method, "script": run.script, "lr": run.lr, "seed": run.seed}
    ranks = [
        key
        | place(path)
        | {
            "k90": k90(singular_values(change)),
            "k90_of_noise": k90(singular_values(noise_like(change))),
        }
        for path, change in changes.items()
    ]
    scores = []
    for rank in cuts:
        cut = with_changes_cut(base, model, rank).to(device)
        scores.append(key | {"rank": rank} | evaluate(cut, tokenizer, run.script)._asdict())
    return ranks, scores


def main() -> None:
    runs = load_runs()
    jobs = [
        (replace(method(name, script=script), lr=chosen_rate(runs, method(name)), seed=seed), cuts)
        for name, script, cuts in (
            ("full", "georgian", CUTS),
            ("full", "greek", ()),
            ("full", BASE_SCRIPT, ()),
            ("full-sgd", "georgian", ()),
        )
        for seed in SEEDS
    ]
    measured = in_parallel(measure, jobs, workers_argument(__doc__))
    ranks, scores = (list(chain(*tables)) for tables in zip(*measured, strict=True))
    record_tables("weight_changes", default_device(), {"k90": ranks, "cuts": scores})


if __name__ == "__main__":
    main()
