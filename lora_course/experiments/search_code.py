"""Adapt all-MiniLM-L6-v2 to search code: `python -m lora_course.experiments.search_code`.

LoRA of three sizes and full fine-tuning, each at a rate of its own, for 100 and for 300 steps; the
model as it comes; TF-IDF. Recall and mean reciprocal rank on functions of the test split; rates
are chosen by recall@1 on those of the validation split, means of three seeds. About six minutes on
a GPU.
"""

import copy
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from lora_course.code_search import (
    Encoder,
    Search,
    evaluate_search,
    evaluate_tfidf,
    info_nce,
    search_batches,
)
from lora_course.experiments.real_data import load_texts
from lora_course.experiments.real_runs import (
    Job,
    Setting,
    carry_out,
    make_trainable,
    options,
    peak_bytes,
    record_costs,
    thinned,
    time_steps,
)
from lora_course.experiments.recording import Row
from lora_course.real_models import load_minilm
from lora_lib.lora import count_parameters
from lora_lib.model import default_device
from lora_lib.training import fit

TARGETS = {"query, value": ("query", "value"), "all linear": "all-linear"}
TUNING_SEEDS = (0, 1, 2)
STEPS = (100, 300)
TRAINED = [  # method, rank, targets, and a rate to begin with
    ("lora", 8, "query, value", 3e-3),
    ("lora", 1, "query, value", 3e-3),
    ("lora", 8, "all linear", 1e-3),
    ("full", 0, "", 1e-4),
]


def settings() -> list[Setting]:
    alone = [Setting(Job("search", method), None, (0,)) for method in ("base", "tf-idf")]
    return alone + [
        Setting(Job("search", *kind, steps, batch_size=64), rate)
        for steps in STEPS
        for *kind, rate in TRAINED
    ]


@cache
def _base() -> tuple:
    return load_minilm()


def prepare_encoder(job: Job) -> Encoder:
    base, tokenizer = _base()
    model = make_trainable(copy.deepcopy(base), job, TARGETS)
    return Encoder(model.to(default_device()), tokenizer)


def measure(job: Job, data: Path | None = None, limit: int | None = None) -> Row:
    """The row of one run; `limit` keeps the first so many functions to validate and test on.

    A run whose loss stops being finite finds nothing.
    """
    device, functions = default_device(), load_texts(data).functions
    row = {"device": device.type, "trainable": 0, "peak_bytes": 0, "seconds": 0.0, "losses": ""}
    evaluate = partial(evaluate_tfidf, learned_from=functions["train"])
    if job.method != "tf-idf":
        encoder = prepare_encoder(job)
        evaluate = partial(evaluate_search, encoder)
    if job.steps:
        row["trainable"] = count_parameters(encoder.model, only_trainable=True)
        batches = search_batches(functions["train"], job.batch_size, job.seed)
        peak_bytes(device)
        start = time.perf_counter()
        try:
            losses = fit(encoder.model, batches, job.steps, job.lr, loss_function=loss_of(encoder))
            row["losses"] = thinned(losses)
        except FloatingPointError:
            evaluate = find_nothing
        row |= {"peak_bytes": peak_bytes(device), "seconds": time.perf_counter() - start}
    for prefix, split in (("validation_", "validation"), ("", "test")):
        found = evaluate(functions[split][:limit])._asdict()
        row |= {prefix + name: score for name, score in found.items()}
    return row


def find_nothing(_functions) -> Search:
    return Search(0.0, 0.0, 0.0)


def loss_of(encoder: Encoder) -> Callable:
    return lambda _model, batch: info_nce(encoder, batch)


def measure_cost(job: Job, data: Path | None = None) -> Row:
    """Time and memory of a training step, with nothing else on the device."""
    encoder = prepare_encoder(job)
    batches = search_batches(load_texts(data).functions["train"], job.batch_size, job.seed)
    return time_steps(encoder.model, batches, loss_of(encoder))


def main() -> None:
    parser = options(__doc__, Path("."))
    parser.add_argument("--data", type=Path, help="a file of real_data; else what is installed")
    parser.add_argument("--costs", action="store_true", help="time a step of each method first")
    given = parser.parse_args()
    _base()  # unpacked once, before the workers want it
    if given.costs:
        cost = partial(measure_cost, data=given.data)
        record_costs(given.out / "search_costs.csv", settings(), cost)
    work = partial(measure, data=given.data, limit=given.limit)
    chosen_by = dict(score="validation_recall_1", tuning_seeds=TUNING_SEEDS)
    versions = load_texts(given.data).versions
    carry_out("search_code", "search", given, settings(), work, versions, **chosen_by)


if __name__ == "__main__":
    main()
