"""Adapt all-MiniLM-L6-v2 to search code: `python -m lora_course.experiments.search_code`.

LoRA of three sizes and full fine-tuning, each at a rate of its own, for 100 and for 300 steps; the
model as it comes; TF-IDF. Recall and mean reciprocal rank on functions of the test split; rates
are chosen by recall@1 on those of the validation split, means of three seeds. About six minutes on
a GPU.
"""

import copy
from collections.abc import Callable
from functools import cache, partial

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
    record_costs,
    thinned,
    time_steps,
    train_job,
)
from lora_course.experiments.recording import RESULTS, Row
from lora_course.real_models import load_minilm
from lora_lib.model import default_device
from lora_lib.training import fit

TARGETS = {"query, value": ("query", "value"), "all linear": "all-linear"}
TUNING_SEEDS = (0, 1, 2)
STEPS = (100, 300)
TRAINED = [  # method, rank, targets
    ("lora", 8, "query, value"),
    ("lora", 1, "query, value"),
    ("lora", 8, "all linear"),
    ("full", 0, ""),
]


def settings() -> list[Setting]:
    alone = [Setting(Job("search", method), False, (0,)) for method in ("base", "tf-idf")]
    return alone + [
        Setting(Job("search", *kind, steps, batch_size=64)) for steps in STEPS for kind in TRAINED
    ]


@cache
def _base() -> tuple:
    return load_minilm()


def prepare_encoder(job: Job) -> Encoder:
    base, tokenizer = _base()
    model = make_trainable(copy.deepcopy(base), job, TARGETS)
    return Encoder(model.to(default_device()), tokenizer)


def measure(job: Job) -> Row:
    """The row of one run. One whose loss stops being finite finds nothing."""
    functions, encoder = load_texts().functions, prepare_encoder(job)

    def train() -> Row:
        batches = search_batches(functions["train"], job.batch_size, job.seed)
        losses = fit(encoder.model, batches, job.steps, job.lr, loss_function=loss_of(encoder))
        return {"losses": thinned(losses)}

    row, finite = train_job(job, encoder.model, train, ["losses"])
    evaluate = partial(evaluate_search, encoder) if finite else find_nothing
    if job.method == "tf-idf":
        evaluate = partial(evaluate_tfidf, learned_from=functions["train"])
    for prefix, split in (("validation_", "validation"), ("", "test")):
        found = evaluate(functions[split])._asdict()
        row |= {prefix + name: score for name, score in found.items()}
    return row


def find_nothing(_functions) -> Search:
    return Search(0.0, 0.0, 0.0)


def loss_of(encoder: Encoder) -> Callable:
    return lambda _model, batch: info_nce(encoder, batch)


def measure_cost(job: Job) -> Row:
    """Time and memory of a training step, with nothing else on the device."""
    encoder = prepare_encoder(job)
    batches = search_batches(load_texts().functions["train"], job.batch_size, job.seed)
    return time_steps(encoder.model, batches, loss_of(encoder))


def main() -> None:
    given = options(__doc__, RESULTS / "real").parse_args()
    _base()  # unpacked once, before the workers want it
    record_costs(given.out / "search_costs.csv", settings(), measure_cost)
    chosen_by = dict(score="validation_recall_1", tuning_seeds=TUNING_SEEDS)
    versions = load_texts().versions
    carry_out("search_code", "search", given, settings(), measure, versions, **chosen_by)


if __name__ == "__main__":
    main()
