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
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import islice
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
from lora_course.experiments.real_data import Texts, load_texts
from lora_course.experiments.real_runs import (
    Job,
    Setting,
    carry_out,
    make_trainable,
    options,
    peak_bytes,
    rate_scores,
    record_costs,
    thinned,
    time_steps,
)
from lora_course.experiments.recording import Row, read_rows
from lora_course.real_models import load_smollm2
from lora_lib.adapters import save_adapter
from lora_lib.lora import count_parameters
from lora_lib.model import default_device
from lora_lib.names import Pair
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
SHOTS, TESTED, LOOKED_AT, ARTICLES = 8, 400, 200, 60
# The scores of a run whose loss stopped being finite; "" is what a task does not have.
NOTHING = dict(validation_bits=math.inf, bits=math.inf, one_line="", words="", exact_match="")
NO_TOWN = NOTHING | dict(exact_match=0.0, validation_exact_match=0.0)
# What rates are chosen by, and whether the higher (1) or the lower (-1) is better.
CHOSEN_BY = {"docstrings": ("validation_bits", -1), "towns": ("validation_exact_match", 1)}
TOWN_INSTRUCTION = "Write the name of a town in Georgian letters."
SHIPPED = {"r1_all_linear": (1, "all linear"), "r8_q_v": (8, "q, v")}


def settings(task: str) -> list[Setting]:
    if task == "towns":
        lora = Job(task, "lora", 8, "all linear", 500, batch_size=64)
        full = Job(task, "full", steps=500, batch_size=64)
        return [Setting(lora, 1e-3), Setting(full, 1e-4)]
    return [
        Setting(Job(task, "base"), None, (0,)),
        Setting(Job(task, "prompt")),  # a seed is another choice of examples
        *(
            Setting(Job(task, "lora", rank, targets, 200, batch_size=32), 1e-3)
            for targets in TARGETS
            for rank in (1, 8, 32)
        ),
        Setting(Job(task, "full", steps=200, batch_size=32), 1e-4),
    ]


@cache
def _base() -> tuple:
    return load_smollm2()


# --- one run -------------------------------------------------------------------------------------


def measure(job: Job, data: Path | None = None, limit: int | None = None) -> Row:
    """The row of one run; `limit` keeps the first so many texts of each kind."""
    return _run(job, load_texts(data), limit)[1]


def _run(job: Job, texts: Texts, limit: int | None) -> tuple[nn.Module, Row]:
    device = default_device()
    model = make_trainable(copy.deepcopy(_base()[0]), job, TARGETS).to(device)
    facts = {"device": device.type, "trainable": 0, "peak_bytes": 0, "seconds": 0.0, "losses": ""}
    facts |= dict.fromkeys(("look_at", "look_bits", "look_news"), "")
    if job.steps:
        facts["trainable"] = count_parameters(model, only_trainable=True)
        peak_bytes(device)
        start = time.perf_counter()
        try:
            losses, looks = _train(job, model, texts, limit)
        except FloatingPointError:  # the loss is no longer finite
            return model, facts | (NO_TOWN if job.task == "towns" else NOTHING)
        facts["seconds"] = time.perf_counter() - start  # the looks too, and others on the GPU
        facts |= {"peak_bytes": peak_bytes(device), "losses": thinned(losses)} | looks
    score = _score_towns if job.task == "towns" else _score_docstrings
    return model, facts | score(job, model, texts, limit)


def _train(
    job: Job, model: nn.Module, texts: Texts, limit: int | None
) -> tuple[list[float], dict[str, str]]:
    """The loss of each step, and what was seen on the way: for each look its step, and the bits of
    validation examples and of news."""
    _, tokenizer = _base()
    train, validation = (
        examples_of(job, texts, split)[:limit] for split in ("train", "validation")
    )
    news = text_examples(tokenizer, texts.news[:ARTICLES][:limit])
    looks = []

    def look(step: int) -> None:
        bits = bits_per_character(model, tokenizer, validation)
        bits_of_news = bits_per_character(model, tokenizer, news) if news else math.nan
        looks.append((step, round(bits, 5), round(bits_of_news, 5)))

    def batches() -> Iterator:
        endless = batches_by_length(train, job.batch_size, job.seed)
        for step, batch in enumerate(islice(endless, job.steps)):
            if step in LOOKS:
                look(step)
            yield batch

    losses = fit(model, batches(), job.steps, job.lr, loss_function=answer_loss)
    look(job.steps)
    columns = zip(*looks, strict=True)
    names = ("look_at", "look_bits", "look_news")
    return losses, {n: " ".join(map(str, c)) for n, c in zip(names, columns, strict=True)}


def examples_of(job: Job, texts: Texts, split: str) -> list[Example]:
    _, tokenizer = _base()
    if job.task == "towns":
        pairs = texts.towns[split]
        return [chat_example(tokenizer, ask_town(latin), target) for latin, target in pairs]
    shots = []
    if job.method == "prompt":
        first = job.seed * SHOTS
        shots = texts.functions["train"][first : first + SHOTS]
    return docstring_examples(tokenizer, texts.functions[split], shots)


def ask_town(latin: str) -> list[Message]:
    return [
        {"role": "system", "content": TOWN_INSTRUCTION},
        {"role": "user", "content": latin},
    ]


def _bits(job: Job, model: nn.Module, texts: Texts, limit: int | None) -> Row:
    _, tokenizer = _base()
    size = 16 if job.method == "prompt" else 64
    return {
        name: bits_per_character(
            model, tokenizer, examples_of(job, texts, split)[: limit or TESTED], size
        )
        for name, split in (("validation_bits", "validation"), ("bits", "test"))
    }


def _score_docstrings(job: Job, model: nn.Module, texts: Texts, limit: int | None) -> Row:
    _, tokenizer = _base()
    tested = texts.functions["test"][: limit or TESTED]
    first = job.seed * SHOTS
    shots = texts.functions["train"][first : first + SHOTS] if job.method == "prompt" else ()
    written = write(model, tokenizer, [conversation(f, shots) for f in tested])
    scores = score_writing(written, tested)._asdict()
    return NOTHING | _bits(job, model, texts, limit) | scores


def _score_towns(job: Job, model: nn.Module, texts: Texts, limit: int | None) -> Row:
    found = {
        name: _exact_match(model, texts.towns[split], limit)
        for name, split in (("exact_match", "test"), ("validation_exact_match", "validation"))
    }
    return NO_TOWN | _bits(job, model, texts, limit) | found


def _exact_match(model: nn.Module, pairs: Sequence[Pair], limit: int | None) -> float:
    """As lora_lib.scores has it: any recorded spelling of a name is right."""
    spellings: dict[str, set[str]] = {}
    for latin, target in pairs:
        spellings.setdefault(latin, set()).add(target)
    towns = list(spellings)[:limit]
    written = write(model, _base()[1], [ask_town(latin) for latin in towns])
    right = [said.text in spellings[latin] for said, latin in zip(written, towns, strict=True)]
    return sum(right) / len(right)


def measure_cost(job: Job, data: Path | None = None) -> Row:
    """Time and memory of a training step, with nothing else on the device."""
    model = make_trainable(copy.deepcopy(_base()[0]), job, TARGETS).to(default_device())
    batches = batches_by_length(
        examples_of(job, load_texts(data), "train"), job.batch_size, job.seed
    )
    return time_steps(model, batches, answer_loss)


# --- the adapters that ship ----------------------------------------------------------------------


def make_adapters(
    rows: list[dict[str, str]],
    chosen: list[Setting],
    texts: Texts,
    folder: Path,
    limit: int | None,
) -> None:
    """Train those of SHIPPED again, with seed 0 at their chosen rates, and save them."""
    for name, kind in SHIPPED.items():
        [job] = [
            setting.job for setting in chosen if (setting.job.rank, setting.job.targets) == kind
        ]
        scores = rate_scores(rows, job, "validation_bits", -1, (0,))
        if scores:  # the recording may have stopped before
            best = replace(job, lr=max(scores, key=scores.get))
            save_adapter(_run(best, texts, limit)[0].cpu(), folder / name)


def main() -> None:
    parser = options(__doc__, Path("."))
    parser.add_argument("--task", choices=("docstrings", "towns"), default="docstrings")
    parser.add_argument("--data", type=Path, help="a file of real_data; else what is installed")
    parser.add_argument("--costs", action="store_true", help="time a step of each method first")
    parser.add_argument("--adapters", action="store_true", help="train and save those that ship")
    given = parser.parse_args()
    texts, task, chosen = load_texts(given.data), given.task, settings(given.task)
    _base()  # unpacked once, before the workers want it
    if given.costs:
        cost = partial(measure_cost, data=given.data)
        record_costs(given.out / f"{task}_costs.csv", chosen, cost)
    work = partial(measure, data=given.data, limit=given.limit)
    score, sign = CHOSEN_BY[task]
    command = f"write_docstrings --task {task}"
    carry_out(command, task, given, chosen, work, texts.versions, score=score, sign=sign)
    if given.adapters:
        rows = read_rows(given.out / f"{task}.csv")
        make_adapters(rows, chosen, texts, given.out / "adapters", given.limit)


if __name__ == "__main__":
    main()
