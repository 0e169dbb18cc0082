"""The recorded runs of SmolLM2 on docstrings, as a page reads them."""

import pandas as pd

from lora_course.results import RESULTS, load_table

REAL = RESULTS / "real"
ADAPTER = REAL / "adapters" / "r1_all_linear"  # trained with seed 0, 200 steps
SETTING = ["method", "rank", "targets"]
_NAMES = {"base": "as it comes", "prompt": "eight examples", "full": "full fine-tuning"}


def load_docstring_runs() -> pd.DataFrame:
    """The runs at the rate with the fewest bits on validation (seed 0), in the order of seeds; the
    name of each setting is its `setting`, such as "LoRA r=8 on q, v"."""
    runs = load_table("docstrings", REAL).fillna({"targets": ""})
    tuned = runs[runs.seed.eq(0)].sort_values("validation_bits").drop_duplicates(SETTING)
    runs = runs.merge(tuned[[*SETTING, "lr"]]).sort_values([*SETTING[::-1], "seed"])
    lora = "LoRA r=" + runs["rank"].astype(str) + " on " + runs.targets
    return runs.assign(setting=runs.method.map(_NAMES).fillna(lora))


def looks_of(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a look at a run in training, as lora_course.experiments.forgetting has them: setting,
    rate, seed, step, and the bits per character of validation docstrings (`learned`) and of
    English news (`news`)."""
    names = {"look_at": "step", "look_bits": "learned", "look_news": "news"}
    looks = runs[runs.steps.gt(0)].rename(columns=names).assign(rate="chosen")
    looks = looks[["setting", "rate", "seed", *names.values()]]
    texts = looks[list(names.values())].apply(lambda column: column.str.split())
    return looks.assign(**texts).explode(list(texts)).astype(dict.fromkeys(texts, float))
