"""What was recorded of docstrings and towns by SmolLM2, as its page shows it (see
`lora_course.experiments.write_docstrings`)."""

from collections.abc import Sequence

import pandas as pd

from lora_course.experiments.forgetting import FULL, bits_by_seed
from lora_course.experiments.questions import QUESTIONS, paired_difference
from lora_course.results import RESULTS, at_tuned_rate, load_runs, load_table
from lora_course.tables import span

ADAPTER = RESULTS / "real" / "adapters" / "r1_all_linear"  # seed 0, 200 steps of 32
COMPARED = (
    ("LoRA r=1 on q, v", "eight examples"),
    ("LoRA r=32 on q, v", "LoRA r=8 on q, v"),
    ("LoRA r=1 on all linear", "LoRA r=32 on q, v"),
    ("LoRA r=32 on all linear", FULL),
)
_NAMES = {"base": "as it comes", "prompt": "eight examples", "full": FULL}


def docstring_runs() -> pd.DataFrame:
    """The runs at the rate with the fewest bits on validation (seed 0), in the order of seeds; the
    name of each setting is its `setting`, such as "LoRA r=8 on q, v"."""
    runs = load_table("real/docstrings").fillna({"targets": ""})
    runs = at_tuned_rate(runs, "validation_bits", low_is_good=True)
    runs = runs.sort_values(["targets", "rank", "method", "seed"])
    lora = "LoRA r=" + runs["rank"].astype(str) + " on " + runs.targets
    return runs.assign(setting=runs.method.map(_NAMES).fillna(lora))


def differences(runs: pd.DataFrame) -> list[list[str]]:
    """A row for each two settings of COMPARED: their names, and the first minus the second, seed by
    seed, in bits and in words."""
    scores = runs.set_index(["setting", "seed"])[["bits", "words"]]
    return [
        [ours, theirs]
        + [str(paired_difference(scores[s][ours], scores[s][theirs])) for s in scores]
        for ours, theirs in COMPARED
    ]


def looks_of(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a look at a run in training, as lora_course.experiments.forgetting has them: setting,
    rate, seed, step, and the bits per character of validation docstrings (`learned`) and of
    English news (`news`)."""
    names = {"look_at": "step", "look_bits": "learned", "look_news": "news"}
    looks = runs[runs.steps.gt(0)].rename(columns=names).assign(rate="chosen")
    looks = looks[["setting", "rate", "seed", *names.values()]]
    texts = looks[list(names.values())].apply(lambda column: column.str.split())
    return looks.assign(**texts).explode(list(texts)).astype(dict.fromkeys(texts, float))


def news_minus_full(looks: pd.DataFrame, levels: Sequence[float]) -> pd.DataFrame:
    """Bits of news under LoRA minus those under full fine-tuning, seed by seed, where both first
    reached so many bits of docstrings: a row a setting, a column for each of `levels`, an Interval
    in each."""

    def at(setting: str, learned: float) -> list[float]:
        return bits_by_seed(looks, setting, "chosen", "news", learned)

    settings = [name for name in looks.setting.unique() if name != FULL]
    gaps = {x: [paired_difference(at(s, x), at(FULL, x)) for s in settings] for x in levels}
    return pd.DataFrame(gaps, settings)


def towns_right() -> tuple[pd.DataFrame, pd.DataFrame]:
    """The share of unseen towns written right by SmolLM2, at the rate with the most right on
    validation, and by our small base: five seeds each, in the rows; a column a method."""
    runs = at_tuned_rate(load_table("real/towns"), "validation_exact_match")
    right = runs.pivot(index="seed", columns="method", values="exact_match")
    small = QUESTIONS["pairs"].scores(load_runs())
    names = {"lora": "LoRA r=8", "full": FULL}
    ours = pd.DataFrame({name: small[f"{name}, all"] for name in names.values()})
    return right[list(names)].rename(columns=names), ours


def bits_before_training() -> float:
    """Bits per character of Georgian validation towns, by SmolLM2 as it comes."""
    return float(load_table("real/towns").look_bits.iloc[0].split()[0])


def step_costs() -> list[list[str]]:
    """A row for LoRA on each choice of targets and one for full fine-tuning, each from its lowest
    to its highest rank and measurement: MB to keep (float32), milliseconds of a training step of 32
    functions, GB at its peak."""
    costs = load_table("real/docstrings_costs").fillna({"targets": ""})
    rows = []
    for targets in ("q, v", "all linear", ""):
        found = costs[costs.targets.eq(targets)]
        spans = [span(4 * found.trainable / 1e6), span(found.ms), span(found.peak_bytes / 1e9)]
        rows.append([f"LoRA r=1 to 32 on {targets}" if targets else FULL, *spans])
    return rows
