"""Adapt SmolLM2-135M-Instruct to write docstrings, or Georgian names of towns:
`python -m lora_course.experiments.write_docstrings [--task towns]`.

Docstrings: the model as it comes; eight examples in the prompt; LoRA of r = 1, 8 and 32 on q and v,
and on all linear layers but the output layer, which is the embedding; full fine-tuning. 200 steps
of 32 functions; on the way, bits per character of validation docstrings and of English news are
measured, to compare what is forgotten where two methods have learned equally much.

Towns: LoRA r = 8 on all linear layers and full fine-tuning, 500 steps of 64, as our small base has
them.

Rates are chosen on validation: by bits per character for docstrings, for towns by exact match,
which after many passes over them wants another rate than bits do. About nine and five minutes on a
GPU.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from torch import nn

from lora_course.docstring_writer import (
    Message,
    answer_loss,
    bits_per_character,
    chat_example,
    conversation,
    docstring_examples,
    score_writing,
    text_examples,
    write,
)
from lora_course.docstrings import Function
from lora_course.experiments.real_data import load_texts
from lora_course.experiments.real_runs import (
    Job,
    Setting,
    carry_out,
    looking,
    make_trainable,
    options,
    rate_scores,
    record_costs,
    thinned,
    time_steps,
    train_job,
)
from lora_course.experiments.recording import RESULTS, Row, read_rows
from lora_course.real_models import load_smollm2
from lora_lib.adapters import save_adapter
from lora_lib.model import default_device
from lora_lib.names import load_pairs, load_spellings
from lora_lib.scores import score_names
from lora_lib.tokens import Example, batches_by_length
from lora_lib.training import fit

TARGETS = {
    "q, v": ("q_proj", "v_proj"),
    "all linear": (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ),
}
LOOKS = (0, 5, 10, 20, 40, 80, 120, 160)  # steps, and after the last one
LOOK_COLUMNS = ["look_at", "look_bits", "look_news"]
SHOTS, TESTED, ARTICLES = 8, 400, 60
# The scores of a run whose loss stopped being finite; "" is what a task does not have.
NOTHING = dict(validation_bits=math.inf, bits=math.inf, one_line="", words="", exact_match="")
NO_TOWN = NOTHING | dict(exact_match=0.0, validation_exact_match=0.0)
# What rates are chosen by, and whether the higher (1) or the lower (-1) is better.
CHOSEN_BY = {"docstrings": ("validation_bits", -1), "towns": ("validation_exact_match", 1)}
TOWN_INSTRUCTION = "Write the name of a town in Georgian letters."
SHIPPED = Job("docstrings", "lora", 1, "all linear", 200, batch_size=32)


def settings(task: str) -> list[Setting]:
    if task == "towns":
        lora = Job(task, "lora", 8, "all linear", 500, batch_size=64)
        return [Setting(lora), Setting(Job(task, "full", steps=500, batch_size=64))]
    return [
        Setting(Job(task, "base"), False, (0,)),
        Setting(Job(task, "prompt"), False),  # a seed is another choice of examples
        *(
            Setting(replace(SHIPPED, rank=rank, targets=targets))
            for targets in TARGETS
            for rank in (1, 8, 32)
        ),
        Setting(Job(task, "full", steps=200, batch_size=32)),
    ]


@cache
def _base() -> tuple:
    return load_smollm2()


# --- one run -------------------------------------------------------------------------------------


def measure(job: Job) -> Row:
    """The row of one run."""
    model = prepare_model(job)
    row, finite = train_job(job, model, partial(train, job, model), ["losses", *LOOK_COLUMNS])
    if not finite:
        return row | (NO_TOWN if job.task == "towns" else NOTHING)
    return row | (score_towns if job.task == "towns" else score_docstrings)(job, model)


def prepare_model(job: Job) -> nn.Module:
    return make_trainable(copy.deepcopy(_base()[0]), job, TARGETS).to(default_device())


def train(job: Job, model: nn.Module) -> Row:
    """Losses, and what was seen on the way: for each look its step, and the bits of validation
    examples and of news."""
    _, tokenizer = _base()
    validation = examples_of(job, "validation")
    news = text_examples(tokenizer, load_texts().news[:ARTICLES])
    looks = []

    def look(step: int) -> None:
        bits = bits_per_character(model, tokenizer, validation)
        bits_of_news = bits_per_character(model, tokenizer, news) if news else math.nan
        looks.append((step, round(bits, 5), round(bits_of_news, 5)))

    batches = batches_by_length(examples_of(job, "train"), job.batch_size, job.seed)
    batches = looking(batches, look, LOOKS)
    losses = fit(model, batches, job.steps, job.lr, loss_function=answer_loss)
    look(job.steps)
    seen = (" ".join(map(str, column)) for column in zip(*looks, strict=True))
    return {"losses": thinned(losses)} | dict(zip(LOOK_COLUMNS, seen, strict=True))


def examples_of(job: Job, split: str) -> list[Example]:
    _, tokenizer = _base()
    if job.task == "towns":
        pairs = load_pairs("georgian", split)
        return [chat_example(tokenizer, ask_town(latin), target) for latin, target in pairs]
    return docstring_examples(tokenizer, load_texts().functions[split], shots_of(job))


def shots_of(job: Job) -> Sequence[Function]:
    """The answered examples that a job has in its prompt."""
    first = job.seed * SHOTS
    return load_texts().functions["train"][first:][:SHOTS] if job.method == "prompt" else ()


def ask_town(latin: str) -> list[Message]:
    return [
        {"role": "system", "content": TOWN_INSTRUCTION},
        {"role": "user", "content": latin},
    ]


def bits_of(job: Job, model: nn.Module) -> Row:
    size = 16 if job.method == "prompt" else 64
    return {
        name: bits_per_character(model, _base()[1], examples_of(job, split)[:TESTED], size)
        for name, split in (("validation_bits", "validation"), ("bits", "test"))
    }


def score_docstrings(job: Job, model: nn.Module) -> Row:
    tested, shots = load_texts().functions["test"][:TESTED], shots_of(job)
    written = write(model, _base()[1], [conversation(f, shots) for f in tested])
    return NOTHING | bits_of(job, model) | score_writing(written, tested)._asdict()


def score_towns(job: Job, model: nn.Module) -> Row:
    row = NO_TOWN | bits_of(job, model)
    for name, split in (("exact_match", "test"), ("validation_exact_match", "validation")):
        spellings = load_spellings("georgian", split)
        written = write(model, _base()[1], [ask_town(latin) for latin in spellings])
        row[name], _ = score_names([answer.text for answer in written], spellings)
    return row


def measure_cost(job: Job) -> Row:
    """Time and memory of a training step, with nothing else on the device."""
    batches = batches_by_length(examples_of(job, "train"), job.batch_size, job.seed)
    return time_steps(prepare_model(job), batches, answer_loss)


# --- the adapter that ships ----------------------------------------------------------------------


def make_adapter(rows: list[dict[str, str]], folder: Path) -> None:
    """Train it again, with seed 0 at its chosen rate, unless it is there."""
    if folder.exists():
        return
    scores = rate_scores(rows, SHIPPED, *CHOSEN_BY["docstrings"], (0,))
    job = replace(SHIPPED, lr=max(scores, key=scores.get))
    model = prepare_model(job)
    train(job, model)
    save_adapter(model.cpu(), folder)


def main() -> None:
    parser = options(__doc__, RESULTS / "real")
    parser.add_argument("--task", choices=CHOSEN_BY, default="docstrings")
    given = parser.parse_args()
    task, (score, sign) = given.task, CHOSEN_BY[given.task]
    command, chosen_by = f"write_docstrings --task {task}", dict(score=score, sign=sign)
    _base()  # unpacked once, before the workers want it
    if task == "docstrings":
        record_costs(given.out / "docstrings_costs.csv", settings(task), measure_cost)
    carry_out(command, task, given, settings(task), measure, load_texts().versions, **chosen_by)
    if task == "docstrings":
        rows = read_rows(given.out / "docstrings.csv")
        make_adapter(rows, given.out / "adapters" / "r1_all_linear")


if __name__ == "__main__":
    main()
