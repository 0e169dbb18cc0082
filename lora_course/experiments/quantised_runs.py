"""LoRA on a base of few bits: `python -m lora_course.experiments.quantised_runs`.

The base in each precision writes Cyrillic, as it had learned to. Then LoRA of r = 8 on all linear
layers learns Georgian on it, 500 steps of 64, five seeds, each precision at its own rate, chosen by
exact match on validation. What was learned is then measured beside the base, and merged in three
ways. Minutes on four GPUs.

The table `bits` has a row a run; its `task` is the precision.
"""

from dataclasses import replace

import torch
from torch import nn

from lora_course.experiments.real_runs import (
    Job,
    Setting,
    carry_out,
    make_trainable,
    options,
    thinned,
)
from lora_course.experiments.recording import RESULTS, Row, device_name
from lora_course.four_bits import (
    FORMATS,
    Format,
    Linear16,
    QuantisedLinear,
    count_bytes,
    in_floats,
    merged,
    quantise_blocks,
)
from lora_lib.model import SmallTransformer, default_device
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained
from lora_lib.scores import Scores, evaluate
from lora_lib.tokens import Tokenizer
from lora_lib.training import adapt

TARGETS = {"all-linear": "all-linear"}
PRECISIONS = {"float32": None} | FORMATS
LORA = Job("", "lora", rank=8, targets="all-linear", steps=500, batch_size=64)
# Where the adapter of a row ends up: left beside the base; merged with the base as it was quantised
# and kept in 16 bits; merged with it and quantised again (what was trained in float32, to NF4);
# merged with the base as it was before, in 16 bits.
WAYS = {
    "beside": "beside the codes",
    "16_bits": "merged, kept in 16 bits",
    "requantised": "merged, quantised again",
    "original": "merged into the weights of before",
}
COLUMNS = [f"{score}_{way}" for way in WAYS for score in (*Scores._fields, "bytes")]


def settings() -> list[Setting]:
    """The base alone in each precision, which nothing is drawn for, and LoRA on it."""
    return [
        *(Setting(replace(LORA, task=name)) for name in PRECISIONS),
        *(Setting(Job(name, "base"), False, (0,)) for name in PRECISIONS),
    ]


def measure(job: Job) -> Row:
    """Scores on test names: of the base alone in Cyrillic, which shows in the column "beside" too;
    of LoRA in Georgian."""
    torch.manual_seed(job.seed)
    form, device = PRECISIONS[job.task], default_device()
    model, tokenizer = load_pretrained(dropout=0.1)
    model = quantise_blocks(model, form).to(device)
    row = {name: "" for name in ("validation_exact_match", "validation_bits", *COLUMNS, "losses")}
    row["device"] = device_name(device)
    if job.method == "base":
        return row | _scores("beside", model, tokenizer, "cyrillic")
    make_trainable(model, job, TARGETS).to(device)
    pairs = load_pairs("georgian", "train")
    batches = dict(steps=job.steps, batch_size=job.batch_size, seed=job.seed)
    try:
        losses = adapt(model, tokenizer, pairs, lr=job.lr, **batches)
    except FloatingPointError:  # it gets nothing right
        return row | {"validation_exact_match": 0.0}
    validation = evaluate(in_floats(model), tokenizer, "georgian", "validation")
    row["validation_exact_match"], row["validation_bits"] = validation[0], validation[2]
    row["losses"] = thinned(losses, every=25)
    for way, deployed in deployments(model, form).items():
        row |= _scores(way, deployed, tokenizer, "georgian")
    return row


def deployments(model: SmallTransformer, form: Format | None) -> dict[str, nn.Module]:
    """The adapted model in each of WAYS."""
    original = load_pretrained()[0].to(default_device())

    def again(linear: nn.Linear) -> QuantisedLinear:
        return QuantisedLinear(linear, form or FORMATS["NF4"])

    return {
        "beside": model,
        "16_bits": merged(model, Linear16),
        "requantised": merged(model, again),
        "original": merged(model, Linear16, original),
    }


def _scores(way: str, model: nn.Module, tokenizer: Tokenizer, script: str) -> Row:
    scores = evaluate(in_floats(model), tokenizer, script, "test")._asdict()
    scores["bytes"] = count_bytes(model)
    return {f"{name}_{way}": value for name, value in scores.items()}


def main() -> None:
    given = options(__doc__, RESULTS).parse_args()
    chosen_by = {"score": "validation_exact_match"}
    carry_out("quantised_runs", "bits", given, settings(), measure, {}, **chosen_by)


if __name__ == "__main__":
    main()
