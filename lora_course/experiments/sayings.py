"""What people say about LoRA, and how each saying is measured on the recorded results.

A saying is put as a region: where a true value lies if it holds. `verdicts` compares the region
with the interval that the recorded seeds give.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_course.directions import nearest_cosines_by_chance
from lora_course.experiments.answers import Level, NoVerdict, difference, not_recorded
from lora_course.experiments.change import attention_k90
from lora_course.experiments.forgetting import minus_full
from lora_course.experiments.geometry import mean_phi
from lora_course.experiments.questions import (
    EQUAL_BUDGET,
    QUESTIONS,
    SEEDS,
    Difference,
    Question,
    lora,
    mean_interval,
    method,
    number,
    paired_difference,
)
from lora_course.experiments.runs import Run, chosen_rate, rows_of, tried_rates, validation_score
from lora_lib.adapters import load_adapter
from lora_lib.lora import unload_lora
from lora_lib.names import SCRIPTS
from lora_lib.pretrained import adapter_directory, load_pretrained, read_metadata

CANT_TELL = "can't tell at this scale"


@dataclass(frozen=True)
class Recorded:
    """The committed results that the measures rest on."""

    rows: list[dict]  # of the sweep
    changes: list[dict]
    forgetting: list[dict]
    geometry: dict


class Region(NamedTuple):
    """Where a true value lies if a saying holds, and that in words."""

    words: str
    low: float
    high: float


EXACT, BITS = Question.threshold, 0.05  # below these a difference is not worth a word
BETTER = Region(f"more than {EXACT:g} higher", EXACT, math.inf)
NOT_WORSE = Region(f"at most {EXACT:g} lower", -EXACT, math.inf)
LEVEL = Region(f"within {EXACT:g}", -EXACT, EXACT)
FEWER_BITS = Region(f"more than {BITS:g} bits lower", -math.inf, -BITS)


def about(value: float, words: str) -> Region:
    """A number that a saying gives roughly: within a factor of two."""
    return Region(f"within a factor of two of {words}", value / 2, 2 * value)


class Measure(NamedTuple):
    """One thing that a saying implies: in words, the interval, and where it should lie."""

    words: str
    interval: Callable[[Recorded], Difference]
    region: Region


@dataclass(frozen=True)
class Saying:
    """What people say; it is reproduced only if every one of its measures is."""

    theme: str
    says: str
    source: str
    reported: str
    measures: tuple[Measure, ...]
    note: str = ""  # what to keep in mind, whatever the verdict
    beside: Callable[[Recorded], str] | None = None  # numbers shown, but not judged


# --- measures ------------------------------------------------------------------------------------


def compared(
    words: str,
    ours: Level | list[Level],
    theirs: Level | list[Level],
    region: Region,
    score: str = "",
) -> Measure:
    """Ours minus theirs: two levels, or the means of two lists of levels."""
    a, b = ([side] if isinstance(side, tuple) else side for side in (ours, theirs))
    return Measure(words, lambda recorded: difference(a, b, recorded.rows, score), region)


def in_every_script(question: str, label: str) -> list[Level]:
    return [(question, f"{label}, {script}") for script in SCRIPTS]


def geometric(ratios: Sequence[float]) -> Difference:
    """The geometric mean of ratios, with the interval of the mean of their logarithms."""
    return Difference(*map(math.exp, mean_interval([math.log(ratio) for ratio in ratios])))


def best_rates_by_seed(recorded: Recorded) -> Difference:
    """LoRA's best learning rate over full fine-tuning's, each chosen on validation seed by seed."""
    question, best = QUESTIONS["rate"], {}
    for kind in ("LoRA", "full"):
        runs = [run for label, run in question.levels.items() if label.startswith(kind)]
        found = [rows_of(recorded.rows, run) for run in runs]
        if (seeds := min(map(len, found))) < len(SEEDS):
            raise not_recorded(seeds)
        for tried in zip(*found, strict=True):  # every rate with one seed
            best[kind, tried[0]["seed"]] = max(tried, key=validation_score)["lr"]
    return geometric([best["LoRA", seed] / best["full", seed] for seed in SEEDS])


def ratios_by_setting(recorded: Recorded) -> dict[str, float]:
    """The same of the chosen rates, in every setting that has rates of its own."""
    settings = {f"write, {n or 'all'} pairs": {"pairs": n} for n in (100, 300, 1000, None)} | {
        f"same town, {n or 'all'} pairs": {"pairs": n, "task": "same-town"} for n in (500, None)
    }
    return {
        name: tuned(recorded, lora(**factors)).lr / tuned(recorded, method("full", **factors)).lr
        for name, factors in settings.items()
    }


def tuned(recorded: Recorded, run: Run) -> Run:
    """The run at its chosen learning rate. Raises NoVerdict if none has been tried."""
    if not tried_rates(recorded.rows, run):
        raise not_recorded(0)
    return replace(run, lr=chosen_rate(recorded.rows, run))


def best_rate_ratio(ours: Run, theirs: Run) -> Callable[[Recorded], Difference]:
    """Our best learning rate over theirs. The bounds come from the ladder, not from seeds: a best
    rate lies somewhere between its neighbours, which were tried and are worse."""

    def bracket(recorded: Recorded, run: Run) -> list[float]:
        best = tuned(recorded, run).lr
        tried = sorted(tried_rates(recorded.rows, run))
        at = tried.index(best)
        if at in (0, len(tried) - 1):
            raise not_recorded(0)  # still to be tried further out
        return tried[at - 1 : at + 2]

    def measure(recorded: Recorded) -> Difference:
        a, b = bracket(recorded, ours), bracket(recorded, theirs)
        return Difference(a[1] / b[1], a[0] / b[2], a[2] / b[0])

    return measure


def forgotten(skill: str, rate: str) -> Callable[[Recorded], Difference]:
    return lambda recorded: minus_full(recorded.forgetting, "LoRA r=8", rate, skill)


def not_judged(recorded: Recorded) -> str:
    """The skill that is asked to go, a high rank, and one rate for both."""
    runs = recorded.forgetting
    others = (
        ("r = 8, each at its rate", "LoRA r=8", "chosen", ("Cyrillic",)),
        ("r = 64, each at its rate", "LoRA r=64", "chosen", ("Arabic", "names alone")),
        ("r = 8 at the rate of full", "LoRA r=8", "full's", ("Arabic", "names alone")),
    )
    return "not judged: " + "; ".join(
        f"{words}: " + ", ".join(f"{s} {minus_full(runs, name, rate, s)}" for s in skills)
        for words, name, rate, skills in others
    )


def cut_to_rank_8(recorded: Recorded) -> Difference:
    """Exact match of full fine-tuning with every ΔW cut to rank 8, minus the same uncut."""
    cuts = [run["cut"] for run in recorded.changes if run["cut"]]
    cut, whole = ([scores[rank]["exact_match"] for scores in cuts] for rank in ("8", "128"))
    return paired_difference(cut, whole)


def k90_of_full(recorded: Recorded) -> str:
    runs = [
        run for run in recorded.changes if (run["method"], run["script"]) == ("full", "georgian")
    ]
    found = mean_interval([attention_k90(run) for run in runs])
    noise = mean(attention_k90(run, "k90_of_noise") for run in runs)
    return (
        f"mean k90 of the attention matrices {found.mean:.1f} of {_width()}, "
        f"Gaussian noise of equal norm {noise:.1f}"
    )


def shared_direction(matrix: str) -> Callable[[Recorded], Difference]:
    """φ(1, 1) of A between r = 8 and r = 64."""
    pair = "r = 8 and r = 64, other seed"
    return lambda recorded: mean_interval(mean_phi(recorded.geometry, pair, "A", matrix, 1, 1))


EPSILON = 0.3  # of the intruder test


def intruders(recorded: Recorded) -> Difference:
    """Intruder dimensions of LoRA r = 8 minus those of full fine-tuning, among 160 directions.

    Raises NoVerdict where ε is less than twice the cosine that random directions reach.
    """
    width = _width()
    chance = nearest_cosines_by_chance(width)
    if chance.mean() * 2 > EPSILON:
        flagged = (chance < EPSILON).double().mean()
        raise NoVerdict(
            CANT_TELL,
            f"in width {width} a random direction has a cosine of {chance.mean():.2f} with some "
            f"singular vector by chance, and ε = {EPSILON} calls {flagged:.0%} of random "
            "directions intruders: the limit lies where chance does",
        )
    return paired_difference(
        _intruder_counts(recorded, "LoRA r = 8"), _intruder_counts(recorded, "full fine-tuning")
    )


def _intruder_counts(recorded: Recorded, name: str) -> list[int]:
    found = [run for run in recorded.geometry["intruders"] if run["method"] == name]
    return [sum(run["counts"]) for run in sorted(found, key=lambda run: run["seed"])]


def intruder_counts(recorded: Recorded) -> str:
    counts = {
        name: _intruder_counts(recorded, name)
        for name in ("LoRA r = 8", "LoRA r = 64", "full fine-tuning")
    }
    return "flagged of 160, lowest to highest seed: " + ", ".join(
        f"{name} {min(found)} to {max(found)}" for name, found in counts.items()
    )


def _trainable(recorded: Recorded, run: Run) -> int:
    found = rows_of(recorded.rows, tuned(recorded, run))
    if not found:
        raise not_recorded(0)
    return found[0]["trainable"]


def fewer_parameters(recorded: Recorded) -> Difference:
    share = 1 - _trainable(recorded, lora()) / _trainable(recorded, method("full"))
    return Difference(share, share, share)


def training_memory(recorded: Recorded) -> Difference:
    """Bytes of weights, gradients and Adam's two means in float32: LoRA over full fine-tuning."""
    base, factors = (_trainable(recorded, run) for run in (method("full"), lora()))
    ratio = (4 * base + 16 * factors) / (16 * base)
    return Difference(ratio, ratio, ratio)


def _flops(model: torch.nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, 24, dtype=torch.long))
    return counter.get_total_flops()


def cost_of_use(merged: bool) -> float:
    """Arithmetic of the base with the shipped Georgian adapter, over that of the base."""
    model = load_adapter(load_pretrained()[0], adapter_directory("georgian"))
    if merged:
        unload_lora(model, merge=True)
    return _flops(model) / _flops(load_pretrained()[0])


def cost_when_merged(_: Recorded) -> Difference:
    ratio = cost_of_use(merged=True)
    return Difference(ratio, ratio, ratio)


def _width() -> int:
    return read_metadata()["config"]["d_model"]


# --- what people say -----------------------------------------------------------------------------

GOOD, WHERE = "Is LoRA as good?", "Which layers, which rank?"
HOW, WHAT = "Learning rate and α", "What it changes, and what it costs"
CENTRE_LEVEL = ("budget", "all-linear, r = 8")

SAYINGS = (
    Saying(
        GOOD,
        "LoRA is as good as full fine-tuning",
        "Hu et al. 2021, Table 4",
        "GPT-3, LoRA and full: WikiSQL 74.0 and 73.8, MNLI-m 91.6 and 89.5",
        (
            compared(
                "r = 8 minus full, mean of six scripts",
                in_every_script("methods", "LoRA r=8"),
                in_every_script("methods", "full fine-tuning"),
                NOT_WORSE,
            ),
        ),
        "All linear layers, a few thousand pairs, each method at its own rate",
    ),
    Saying(
        GOOD,
        "With enough rank, on all layers, LoRA equals full fine-tuning",
        "Schulman et al. 2025",
        "Llama 3, Qwen3: no gap while the parameters can hold what there is to learn",
        (
            compared(
                "r = 64 minus full, Georgian",
                ("rank", "r = 64"),
                ("methods", "full fine-tuning, georgian"),
                NOT_WORSE,
            ),
        ),
        "r = 64 is half of the width here",
    ),
    Saying(
        GOOD,
        "LoRA wins where pairs are few",
        "Hu et al. 2021, Table 16",
        "GPT-3, MNLI with 100 examples: LoRA 63.8, full 60.2; level with 1,000 and 10,000 (±0.3)",
        tuple(
            compared(
                f"{n} pairs, LoRA minus full, {words}",
                (question, f"LoRA r=8, {n}"),
                (question, f"full fine-tuning, {n}"),
                region,
                score,
            )
            for n in (100, 300)
            for words, question, region, score in (
                ("exact match", "pairs", BETTER, "exact_match"),
                ("bits", "pairs", FEWER_BITS, "bits"),
                ("exact match, rates chosen by it", "pairs-by-match", BETTER, "exact_match"),
            )
        ),
        "Rates are chosen by validation bits elsewhere; with so few pairs bits and exact match "
        "prefer different rates, so look at both",
    ),
    Saying(
        GOOD,
        "It is pretraining that makes adapting good",
        "Aghajanyan et al. 2020",
        "pretraining lowers the number of dimensions that fine-tuning needs",
        (
            compared(
                "r = 8 minus from scratch, same steps, mean of six scripts",
                in_every_script("methods", "LoRA r=8"),
                in_every_script("methods", "from scratch"),
                BETTER,
            ),
        ),
    ),
    Saying(
        GOOD,
        "Training longer from scratch does not make up for a base",
        "the reason to fine-tune at all",
        "the LoRA papers start from a pretrained model and do not ask",
        (
            compared(
                "r = 8 minus from scratch with ten times the steps, mean of six scripts",
                in_every_script("methods", "LoRA r=8"),
                in_every_script("ten-times", "from scratch, 10 × the steps"),
                BETTER,
            ),
        ),
        "Its rate is chosen by exact match, the best for this rival; chosen by bits as everywhere "
        "else, it would be far behind. The table above has the scripts one by one",
    ),
    Saying(
        WHERE,
        "W_q and W_v are enough",
        "Hu et al. 2021, Table 5",
        "GPT-3, 18M parameters, WikiSQL: q, v 73.7; all four 73.7; feed-forward was not tried",
        (
            compared(
                "W_q, W_v at r = 38 minus all linear layers at r = 8",
                ("budget", "W_q, W_v, r = 38"),
                CENTRE_LEVEL,
                NOT_WORSE,
            ),
        ),
    ),
    Saying(
        WHERE,
        "Put LoRA on all linear layers",
        "Dettmers et al. 2023 (QLoRA), §4",
        "q, v alone did not match full fine-tuning; all linear layers did",
        tuple(
            compared(
                f"all layers of the blocks at r = 9 minus {name} at r = {rank}",
                ("budget", "blocks, r = 9"),
                ("budget", f"{name}, r = {rank}"),
                BETTER,
            )
            for name, rank in EQUAL_BUDGET.items()
            if name != "blocks"
        ),
        "As there, without the output layer; “all-linear” in this course has it",
        lambda recorded: (
            "with it, all-linear at r = 8 minus the blocks at r = 9: "
            f"{difference([CENTRE_LEVEL], [('budget', 'blocks, r = 9')], recorded.rows)}"
        ),
    ),
    Saying(
        WHERE,
        "Feed-forward layers matter more than attention",
        "Biderman et al. 2024, Fig. 7; Schulman et al. 2025",
        "attention alone is worst (Llama-2-7B); attention at r = 256 is behind feed-forward at "
        "r = 128 (Llama-3.1-8B)",
        (
            compared(
                "feed-forward at r = 15 minus attention at r = 19",
                ("budget", "feed-forward, r = 15"),
                ("budget", "attention, r = 19"),
                BETTER,
            ),
        ),
    ),
    Saying(
        WHERE,
        "At a fixed budget, more matrices at a lower rank",
        "Hu et al. 2021, Table 5",
        "WikiSQL, MNLI: q, k, v, o at r = 2 73.7, 91.7; one alone at r = 8 at best 73.2, 91.3",
        tuple(
            compared(
                f"attention at r = 4 minus {name} at r = 16",
                ("matrices", "attention, r = 4"),
                ("matrices", f"{name}, r = 16"),
                BETTER,
            )
            for name in ("W_q", "W_k", "W_v", "W_o")
        ),
    ),
    Saying(
        WHERE,
        "A very small rank is enough",
        "Hu et al. 2021, Table 6",
        "GPT-3, q, v, WikiSQL: 73.4 at r = 1, 73.5 at r = 64; noise ±0.5",
        (compared("r = 1 minus r = 64", ("rank", "r = 1"), ("rank", "r = 64"), NOT_WORSE),),
        "r = 1 is 1/128 of the width here and 1/12,288 there",
    ),
    Saying(
        WHERE,
        "More rank is better",
        "Biderman et al. 2024, Table S1",
        "continued pretraining on code, HumanEval: .162, .196, .224 at r = 16, 64, 256; full .263",
        (
            compared("r = 16 minus r = 4", ("rank", "r = 16"), ("rank", "r = 4"), BETTER),
            compared("r = 64 minus r = 16", ("rank", "r = 64"), ("rank", "r = 16"), BETTER),
        ),
        "Each rank at its own rate",
    ),
    Saying(
        HOW,
        "LoRA wants about ten times the learning rate of full fine-tuning",
        "Schulman et al. 2025",
        "a factor of 9.8, fitted to 14 models; Hu et al. used 40 on GPT-3",
        (
            Measure("r = 8 over full, each seed's best", best_rates_by_seed, about(10, "10")),
            Measure(
                "r = 8 over full, geometric mean of six settings",
                lambda recorded: geometric(list(ratios_by_setting(recorded).values())),
                about(10, "10"),
            ),
        ),
        "Rates were tried on a ladder of 1, 2, 5, and the best falls as the rank grows at α = 2r",
        lambda recorded: (
            "these six: "
            + "; ".join(
                f"{name}: {number(x)} times" for name, x in ratios_by_setting(recorded).items()
            )
        ),
    ),
    Saying(
        HOW,
        "α is just a learning rate: once that is tuned, α does not matter",
        "Hu et al. 2021, §4.1",
        "tuning α is roughly tuning the learning rate, if the start is scaled with it",
        tuple(
            compared(
                f"α = {a} minus α = 16, r = 8", ("alpha", f"α = {a}"), ("alpha", "α = 16"), LEVEL
            )
            for a in (4, 64)
        ),
    ),
    Saying(
        HOW,
        "With α fixed, the best learning rate does not depend on the rank",
        "Schulman et al. 2025",
        "it moves less than a factor of two from r = 4 to 512; lower at r = 1",
        (
            Measure(
                "α = 16, best rate at r = 64 over that at r = 8 (bounds: the neighbours tried)",
                best_rate_ratio(lora(64, alpha=16.0), lora(8, alpha=16.0)),
                about(1, "1"),
            ),
        ),
        "Rates were tried on a ladder of 1, 2, 5, which hardly resolves a factor of two",
    ),
    Saying(
        HOW,
        "Set α = 2r, and a learning rate will do for any rank",
        "Biderman et al. 2024, Fig. S3; the default of TRL",
        "at r = 256, α = 512 was better than 256 and 32 at every rate",
        tuple(
            compared(
                f"r = {r} at the rate of r = 8, minus r = {r} at its own",
                ("one-rate", f"r = {r}, 0.01"),
                ("rank", f"r = {r}"),
                NOT_WORSE,
            )
            for r in (2, 64)
        ),
    ),
    Saying(
        HOW,
        "At a high rank rsLoRA is better",
        "Kalajdzievski 2023",
        "proves that only a scaling of order 1 / √r stays stable as the rank grows",
        (
            compared(
                "r = 64, α = 16, α / √r minus α / r, each at its own rate",
                ("rslora", "α / √r"),
                ("rslora", "α / r"),
                BETTER,
            ),
        ),
        "At α = 16, α / √r is 2, just what α = 2r gives. The proof is about ranks without bound",
    ),
    Saying(
        HOW,
        "Freezing A costs nothing",
        "Zhu et al. 2024",
        "RoBERTa-large on GLUE: B alone at r = 16 87.5, LoRA at r = 8 87.2",
        (
            compared(
                "B alone at r = 16 minus A and B at r = 8",
                ("frozen-a", "B alone, r = 16"),
                ("frozen-a", "A and B, r = 8"),
                NOT_WORSE,
            ),
        ),
    ),
    Saying(
        WHAT,
        "LoRA forgets less than full fine-tuning",
        "Biderman et al. 2024",
        "its title: LoRA learns less and forgets less. Shuttleworth et al. 2024: not always, not "
        "at large rates",
        tuple(
            Measure(
                f"{skill}: bits under r = 8 minus under full, {words}",
                forgotten(skill, rate),
                FEWER_BITS,
            )
            for skill in ("Arabic", "names alone")
            for rate, words in (("chosen", "each at its rate"), ("half", "at half of it"))
        ),
        "Stricter than the source: compared where both have learned as much Georgian, and about "
        "r = 8, whose rate is ten times that of full. Cyrillic is not judged: its prompt must now "
        "give Georgian, so the old answer has to go",
        not_judged,
    ),
    Saying(
        WHAT,
        "The weight change of full fine-tuning is low-rank",
        "Hu et al. 2021, §1, as a hypothesis",
        "Biderman et al. 2024: its k90 is 10 to 100 times usual LoRA ranks",
        (
            Measure(
                "exact match with every ΔW cut to rank 8, minus uncut", cut_to_rank_8, NOT_WORSE
            ),
        ),
        "That a low rank suffices when trained is another matter",
        k90_of_full,
    ),
    Saying(
        WHAT,
        "Two ranks find the same strongest direction",
        "Hu et al. 2021, §7.2",
        "r = 8 and r = 64, layer 48 of GPT-3: about one shared direction, φ above 0.5",
        tuple(
            Measure(
                f"φ(1, 1) of A, {matrix}", shared_direction(matrix), Region("above 0.5", 0.5, 1)
            )
            for matrix in ("W_q", "W_v")
        ),
        "Mean of four layers, two seeds; by chance 1/128",
    ),
    Saying(
        WHAT,
        "LoRA leaves intruder dimensions, full fine-tuning does not",
        "Shuttleworth et al. 2024",
        "LoRA has them, full fine-tuning almost never; none at r = 2048",
        (Measure("intruders, r = 8 minus full", intruders, Region("more than 1", 1, math.inf)),),
        beside=intruder_counts,
    ),
    Saying(
        WHAT,
        "99 % fewer parameters to train",
        "Hu et al. 2021, §4.2",
        "GPT-3, q, v at r = 4: 18 million of 175 billion",
        (Measure("fewer, r = 8", fewer_parameters, Region("0.99 or more", 0.99, 1)),),
        "The width decides: a d × d matrix has d² weights, its factors 2rd",
    ),
    Saying(
        WHAT,
        "Training takes a third of the memory",
        "Hu et al. 2021, §4.2",
        "GPT-3: 350 GB instead of 1.2 TB",
        (
            Measure(
                "weights, gradients and Adam's state, r = 8 over full",
                training_memory,
                about(1 / 3, "a third"),
            ),
        ),
        "Counted in float32; activations come on top, and LoRA hardly shrinks them",
    ),
    Saying(
        WHAT,
        "LoRA costs nothing in use",
        "Hu et al. 2021, §4.1 and Table 1",
        "once merged, the latency of the base",
        (Measure("arithmetic, merged over base", cost_when_merged, Region("exactly 1", 1, 1)),),
        "Only once merged",
        lambda _: f"unmerged {number(cost_of_use(merged=False))}",
    ),
)
