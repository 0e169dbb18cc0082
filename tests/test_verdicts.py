"""Verdicts follow from the recorded numbers: numbers are computed again by other means, straight
from the files, and other numbers give other verdicts."""

import csv
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats

from lora_course.experiments import statements
from lora_course.experiments.questions import (
    CANT_TELL,
    NOT_REPRODUCED,
    REPRODUCED,
    Interval,
    lora,
    method,
    number,
)
from lora_course.experiments.runs import Run
from lora_course.experiments.statements import (
    COMPARISONS,
    Measure,
    Region,
    about,
    compare,
    decide,
    doubt_of_intruders,
    forgotten,
    highest_rank,
    verdicts,
    what_changes,
)
from lora_course.results import RESULTS, load_runs, load_table
from lora_lib.adapters import load_adapter
from lora_lib.lora import count_parameters
from lora_lib.names import SCRIPTS
from lora_lib.pretrained import adapter_directory


def read(name: str) -> list[dict]:
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


RUNS = read("runs")


@pytest.fixture(scope="module")
def judged():
    return verdicts()


def test_every_statement_is_judged_and_says_who_says_it(judged):
    assert len(judged) == 24 and {statement for statement, *_ in COMPARISONS} <= set(judged.index)
    assert judged.notna().all(axis=None) and judged.source.ne("").all()
    assert set(judged.verdict) == {REPRODUCED, NOT_REPRODUCED, CANT_TELL}


# --- numbers, computed again ---------------------------------------------------------------------


def by_seed(run: Run, score: str = "exact_match", rate_by: str = "bits") -> list[float]:
    """Test scores of `run`, seed by seed, at the rate with the best validation score at seed 0 in
    Georgian."""

    def text(value):
        return "" if value is None else str(value)

    def same(row, without):
        return all(row[n] == text(v) for n, v in asdict(run).items() if n not in without)

    def validation(row):
        match, bits = float(row["validation_exact_match"]), float(row["validation_bits"])
        return (-bits,) if rate_by == "bits" else (match, -bits)

    tuning = [row for row in RUNS if same(row, ("script", "seed", "lr"))
              and (row["script"], row["seed"]) == ("georgian", "0")]  # fmt: skip
    lr = max(tuning, key=validation)["lr"]
    found = [row for row in RUNS if row["lr"] == lr and same(row, ("seed", "lr"))]
    assert sorted(row["seed"] for row in found) == list("01234")
    return [float(row[score]) for row in sorted(found, key=lambda row: row["seed"])]


def interval_text(values) -> str:
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{number(np.mean(values))} ({number(low)} to {number(high)})"


def across(run: Run) -> list[Run]:
    return [replace(run, script=script) for script in SCRIPTS]


FULL, LARGE, SCRATCH = method("full"), lora(64, alpha=16.0), method("scratch")
SAMPLE = {
    "r = 8 minus full, mean of six scripts": (across(lora()), across(FULL)),
    "r = 64, α = 16, minus full, exact match": ([LARGE], [FULL]),
    "r = 64, α = 16, minus full, bits": ([LARGE], [FULL], "bits"),
    "r = 64, α = 2r, minus full, exact match": ([lora(64)], [FULL]),
    "300 pairs, LoRA minus full, bits": ([lora(pairs=300)], [replace(FULL, pairs=300)], "bits"),
    "100 pairs, LoRA minus full, exact match, rates chosen by it": (
        [lora(pairs=100)], [replace(FULL, pairs=100)], "exact_match", "exact_match"),
    "r = 8 minus from scratch with ten times the steps, mean of six scripts": (
        across(lora()), across(replace(SCRATCH, steps=5000)), "exact_match", "exact_match"),
    "all layers of the blocks at r = 9 minus attention at r = 19": (
        [lora(9, targets="blocks")], [lora(19, targets="attention")]),
    "r = 64, α = 16, α / √r minus α / r, each at its own rate": (
        [replace(LARGE, rslora=True)], [LARGE]),
    "B alone at r = 16 minus A and B at r = 8": ([lora(16, method="lora-b")], [lora()]),
}  # fmt: skip


@pytest.mark.parametrize("words", SAMPLE)
def test_a_difference_is_computed_again_from_the_file(words, judged):
    ours, theirs, *score = SAMPLE[words]
    a, b = (np.mean([by_seed(run, *score) for run in side], axis=0) for side in (ours, theirs))
    text = f"{words}: {interval_text(a - b)}"
    assert judged.measured.str.contains(text, regex=False).sum() == 1


def test_enough_rank_is_judged_at_the_alpha_that_validation_chooses(judged):
    """Not at α = 2r alone, where five seeds can't tell."""
    best = min((row for row in RUNS if row["rank"] == "64" and row["targets"] == "all-linear"
                and row["seed"] == "0"), key=lambda row: float(row["validation_bits"]))  # fmt: skip
    assert (best["alpha"], best["rslora"]) == ("16.0", "False")
    assert judged.verdict["enough-rank"] == REPRODUCED
    others = judged.measured["enough-rank"].split("not chosen on validation: ")[1:]
    assert [other.partition(", minus")[0] for other in others] == (
        ["r = 64, α = 2r"] * 2 + ["r = 64, α = 16, rsLoRA"] * 2
    )


@pytest.mark.parametrize("skill, rate, words", [
    ("Arabic", "chosen", "Arabic: bits under r = 8 minus under full, each at its rate"),
    ("names alone", "half", "names alone: bits under r = 8 minus under full, at half of it"),
    ("Arabic", "full's", "not judged: Arabic, r = 8, both at the rate of full"),
])  # fmt: skip
def test_forgetting_is_computed_again(skill, rate, words, judged):
    tracks = {}
    for look in read("forgetting"):
        key = look["setting"], look["rate"], look["seed"]
        tracks.setdefault(key, []).append((float(look["learned"]), float(look[skill])))
    rates = ("chosen", "half", rate)
    target = max(min(bits for bits, _ in track) for key, track in tracks.items() if key[1] in rates)

    def kept(setting, rate, seed):
        track = tracks[setting, rate, seed]
        k = next(k for k in range(1, len(track)) if track[k][0] <= target <= track[k - 1][0])
        return np.interp(target, *zip(track[k], track[k - 1], strict=True))

    full_rate = "chosen" if rate == "full's" else rate
    lost = [kept("LoRA r=8", rate, s) - kept("full fine-tuning", full_rate, s) for s in "01234"]
    assert f"{words}: {interval_text(lost)}" in judged.measured["forgetting"]


def test_cuts_k90_directions_and_parameters_are_computed_again(judged, base):
    cut = {(c["seed"], c["rank"]): float(c["exact_match"]) for c in read("cuts")}
    lost = [cut[seed, "8"] - cut[seed, "128"] for seed in "01234"]
    assert f"minus uncut: {interval_text(lost)}" in judged.measured["low-rank"]
    k90 = [int(row["k90"]) for row in read("k90") if row["matrix"].startswith("W_")
           and (row["method"], row["script"]) == ("full", "georgian")]  # fmt: skip
    assert f"matrices, of 128: {np.mean(k90):.1f}" in judged.measured["low-rank"]
    for matrix in ("W_q", "W_v"):
        phi = [[float(f["phi"]) for f in read("similarity") if f["seed"] == seed
                and (f["pair"], f["side"]) == ("r = 8 and r = 64, other seed", "A")
                and (f["matrix"], f["i"], f["j"]) == (matrix, "1", "1")]
               for seed in "01234"]  # fmt: skip
        text = f"φ(1, 1) of A, {matrix}: {interval_text(np.mean(phi, axis=1))}"
        assert text in judged.measured["same-direction"]
    total = count_parameters(base)
    factors = count_parameters(load_adapter(base, adapter_directory("georgian"))) - total
    assert judged.measured["parameters"] == f"fewer, r = 8: {number(1 - factors / total)}"
    # float32: a weight and its gradient 4 bytes each, Adam's two means 8; the base has no gradient.
    ratio = (total * 4 + factors * (4 + 4 + 8)) / (total * (4 + 4 + 8))
    assert judged.measured["memory"].endswith(f"full: {number(ratio)}")
    assert judged.measured["use"].startswith("arithmetic, merged over base: 1; unmerged: 1.0")


# --- other results give other verdicts -----------------------------------------------------------


def moved(run: Run, by: float):
    """The recorded runs with the exact match of one setting moved, in every script."""
    runs = load_runs()
    same = np.logical_and.reduce(
        [runs[n].isna() if v is None else runs[n].eq(v).fillna(False)
         for n, v in asdict(run).items() if n not in ("seed", "lr", "script")])  # fmt: skip
    runs.loc[same, "exact_match"] += by
    return runs


def verdict(key: str, measures) -> str:
    return decide([measure for measure in measures if measure.statement == key])[0]


@pytest.mark.parametrize("key, run, by, expected", [
    ("as-good", lora(), 0.1, REPRODUCED),
    ("as-good", lora(), -0.1, NOT_REPRODUCED),
    ("all-linear", lora(9, targets="blocks"), 0.1, REPRODUCED),
    ("feed-forward", lora(19, targets="attention"), -0.1, REPRODUCED),
    ("small-rank", lora(1), 0.3, REPRODUCED),
    ("pretraining", method("scratch"), 0.5, NOT_REPRODUCED),
    ("alpha", lora(alpha=64.0), 0.1, NOT_REPRODUCED),
])  # fmt: skip
def test_a_planted_difference_changes_the_verdict(key, run, by, expected, monkeypatch):
    mine = [comparison for comparison in COMPARISONS if comparison[0] == key]
    monkeypatch.setattr(statements, "COMPARISONS", mine)
    assert verdict(key, compare(moved(run, by))) == expected


def test_enough_rank_follows_the_chosen_alpha():
    for run, by, expected in (
        (LARGE, -0.1, NOT_REPRODUCED), (lora(64), -0.1, REPRODUCED), (FULL, 0.02, CANT_TELL),
    ):  # fmt: skip
        assert verdict("enough-rank", highest_rank(moved(run, by))) == expected


def test_other_tracks_cuts_and_directions_give_other_verdicts():
    looks = load_table("forgetting")
    swap = {"LoRA r=8": "full fine-tuning", "full fine-tuning": "LoRA r=8"}
    swapped = looks.rate.ne("full's")
    looks.loc[swapped, "setting"] = looks.setting[swapped].replace(swap)
    assert verdict("forgetting", forgotten(looks)) == REPRODUCED
    tables = {name: load_table(name) for name in ("cuts", "k90", "similarity", "intruders")}
    tables["cuts"].exact_match, tables["similarity"].phi = 0.5, 0.8
    measures = list(what_changes(tables.get))
    assert verdict("low-rank", measures) == verdict("same-direction", measures) == REPRODUCED


def test_the_intruder_test_is_judged_where_its_limit_is_far_from_chance():
    assert "in width 128 a random direction has a cosine of 0.2" in doubt_of_intruders(128)
    assert doubt_of_intruders(768) == ""
    measure = Measure("intruders", "flagged", Interval(19, 18, 20), Region("more", 1, 99))
    assert decide([measure._replace(doubt="chance")]) == (CANT_TELL, "chance")
    assert decide([measure]) == (REPRODUCED, "as said: more")


def test_the_worst_of_several_measures_decides_and_is_named():
    good, bad = Interval(0.5, 0.4, 0.6), Interval(0.1, 0.05, 0.15)
    unsure, region = Interval(0.3, 0.1, 0.5), Region("more than 0.2", 0.2, 1)
    measures = [Measure("x", name, found, region)
                for name, found in (("good", good), ("bad", bad), ("unsure", unsure))]  # fmt: skip
    shown = Measure("x", "shown", bad)
    assert decide(measures) == (NOT_REPRODUCED, "wholly outside “more than 0.2”: bad")
    assert decide([measures[0], measures[2]])[1] == "across the limit of “more than 0.2”: unsure"
    assert decide([measures[0], shown]) == (REPRODUCED, "as said: more than 0.2")
    assert about(10, "10")[1:] == (5, 20)
