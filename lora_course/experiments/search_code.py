"""Adapt all-MiniLM-L6-v2 to search code: `python -m lora_course.experiments.search_code`.

LoRA of three sizes and full fine-tuning, each at a rate of its own, for 100 and for 300 steps; the
model as it comes; TF-IDF. Recall and mean reciprocal rank on functions of the test split; rates
are chosen by recall@1 on those of the validation split, means of three seeds. About six minutes on
a GPU.
"""

import copy
import time
from dataclasses import replace
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
    plan,
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
TRAINED = [  # and a rate to begin with
    (Job("search", "lora", 8, "query, value"), 3e-3),
    (Job("search", "lora", 1, "query, value"), 3e-3),
    (Job("search", "lora", 8, "all linear"), 1e-3),
    (Job("search", "full"), 1e-4),
]


def settings(steps: int | None = None, batch_size: int | None = None) -> list[Setting]:
    alone = [Setting(Job("search", method), None, (0,)) for method in ("base", "tf-idf")]
    return alone + [
        Setting(replace(job, steps=n, batch_size=batch_size or 64), rate)
        for n in ([steps] if steps else STEPS)
        for job, rate in TRAINED
    ]


@cache
def _base() -> tuple:
    return load_minilm()


def measure(job: Job, data: Path | None = None, limit: int | None = None) -> Row:
    """The row of one run; `limit` keeps the first so many functions to validate and test on.

    A run whose loss stops being finite finds nothing.
    """
    device = default_device()
    functions = load_texts(data).functions
    encoder, facts = None, {"trainable": 0, "peak_bytes": 0, "seconds": 0.0, "losses": ""}
    if job.method != "tf-idf":
        base, tokenizer = _base()
        encoder = Encoder(make_trainable(copy.deepcopy(base), job, TARGETS).to(device), tokenizer)
    if job.steps:
        peak_bytes(device)
        start = time.perf_counter()
        batches = search_batches(functions["train"], job.batch_size, job.seed)
        try:
            losses = fit(
                encoder.model,
                batches,
                job.steps,
                job.lr,
                loss_function=lambda _, batch: info_nce(encoder, batch),
            )
        except FloatingPointError:
            losses, functions = [], functions | {"validation": [], "test": []}
        facts = {
            "trainable": count_parameters(encoder.model, only_trainable=True),
            "peak_bytes": peak_bytes(device),
            "seconds": time.perf_counter() - start,
            "losses": thinned(losses),
        }
    scores = {}
    for prefix, split in (("validation_", "validation"), ("", "test")):
        tested = functions[split][:limit]
        if not tested:
            found = Search(0.0, 0.0, 0.0)
        elif encoder is None:
            found = evaluate_tfidf(tested, functions["train"])
        else:
            found = evaluate_search(encoder, tested)
        scores |= {prefix + name: score for name, score in found._asdict().items()}
    return {"device": device.type} | facts | scores


def measure_cost(job: Job, data: Path | None = None) -> Row:
    """Time and memory of a training step, with nothing else on the device."""
    base, tokenizer = _base()
    model = make_trainable(copy.deepcopy(base), job, TARGETS).to(default_device())
    encoder = Encoder(model, tokenizer)
    batches = search_batches(load_texts(data).functions["train"], job.batch_size, job.seed)
    return time_steps(model, batches, lambda _, batch: info_nce(encoder, batch))


def main() -> None:
    parser = options(__doc__, Path("."))
    parser.add_argument("--data", type=Path, help="a file of real_data; else what is installed")
    parser.add_argument("--costs", action="store_true", help="time a step of each method first")
    given = parser.parse_args()
    compared = settings(given.steps, given.batch_size)
    _base()  # unpacked once, before the workers want it
    if given.costs:
        cost = partial(measure_cost, data=given.data)
        record_costs(given.out / "search_costs.csv", compared, cost)
    todo = partial(plan, settings=compared, score="validation_recall_1", tuning_seeds=TUNING_SEEDS)
    work = partial(measure, data=given.data, limit=given.limit)
    carry_out("search_code", "search", given, todo, work, load_texts(given.data).versions)


if __name__ == "__main__":
    main()
