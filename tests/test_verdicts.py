"""Verdicts follow from the recorded numbers: each number is computed again by other means, and
other numbers give other verdicts."""

import copy
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats

from lora_course.experiments import sayings as sayings_module
from lora_course.experiments.change import RESULTS as CHANGE
from lora_course.experiments.forgetting import RESULTS as FORGETTING
from lora_course.experiments.geometry import RESULTS as GEOMETRY
from lora_course.experiments.questions import QUESTIONS, Difference, lora, method, number
from lora_course.experiments.runs import CENTRE, RESULTS, Run, chosen_rate
from lora_course.experiments.sayings import CANT_TELL, SAYINGS, Region, about
from lora_course.experiments.verdicts import (
    NOT_REPRODUCED,
    REPRODUCED,
    judge,
    load_recorded,
    verdict_of,
    verdicts,
)
from lora_lib.adapters import load_adapter
from lora_lib.injection import unload_lora
from lora_lib.lora import count_parameters
from lora_lib.names import SCRIPTS
from lora_lib.pretrained import adapter_directory

ROWS = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]
CHANGES = json.loads(CHANGE.read_text("utf-8"))["runs"]
TRACKS = json.loads(FORGETTING.read_text("utf-8"))["runs"]
DIRECTIONS = json.loads(GEOMETRY.read_text("utf-8"))


@pytest.fixture(scope="module")
def recorded():
    return load_recorded()


@pytest.fixture(scope="module")
def judged(recorded):
    return {row.says: row for row in verdicts(recorded)}


def find(start: str):
    [found] = [saying for saying in SAYINGS if saying.says.startswith(start)]
    return found


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.03, 0.05, REPRODUCED),
        (0.02, 0.05, REPRODUCED),
        (0.01, 0.05, CANT_TELL),
        (-0.5, 0.5, CANT_TELL),
        (0.0, 0.02, CANT_TELL),
        (0.0, 0.019, NOT_REPRODUCED),
        (-0.5, -0.4, NOT_REPRODUCED),
    ],
)
def test_the_whole_interval_has_to_lie_inside_or_outside(low, high, verdict):
    assert judge(Difference((low + high) / 2, low, high), Region("", 0.02, math.inf)) == verdict


@pytest.mark.parametrize(
    "low, high, verdict",
    [(6, 19, REPRODUCED), (4, 8, CANT_TELL), (19, 21, CANT_TELL), (21, 30, NOT_REPRODUCED),
     (1, 4, NOT_REPRODUCED), (1, 40, CANT_TELL)],
)  # fmt: skip
def test_about_ten_is_within_a_factor_of_two(low, high, verdict):
    assert judge(Difference(10, low, high), about(10, "10")) == verdict


def test_every_saying_is_judged_and_says_who_says_it(judged):
    assert len(judged) == len(SAYINGS) >= 12
    for row in judged.values():
        assert row.source and row.reported and row.why
        assert row.verdict in (REPRODUCED, NOT_REPRODUCED, CANT_TELL) and row.measured


# --- every number, computed again ----------------------------------------------------------------


def by_seed(run: Run, score: str = "exact_match") -> dict[int, float]:
    """Seed → test score of `run` at the learning rate with the fewest validation bits at seed 0, in
    Georgian; from the rows alone."""
    wanted = {name: value for name, value in asdict(run).items() if name not in ("seed", "lr")}
    lr = run.lr
    if lr is None:
        settings = wanted | {"script": "georgian", "seed": 0}
        tuning = [row for row in ROWS if all(row[n] == v for n, v in settings.items())]
        if not tuning:
            return {}
        lr = min(tuning, key=lambda row: (row["validation"] or {"bits": 99})["bits"])["lr"]
    found = [row for row in ROWS if row["lr"] == lr and all(row[n] == v for n, v in wanted.items())]
    return {row["seed"]: row["test"][score] for row in found}


def interval_text(values: list[float]) -> str:
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{number(np.mean(values))} ({number(low)} to {number(high)})"


def across(**factors) -> list[Run]:
    return [Run(script=script, **factors) for script in SCRIPTS]


def at(rank: int, **factors) -> list[Run]:
    return [lora(rank, **factors)]


FULL, EIGHT = [method("full")], at(8)
# An explicit learning rate is the one with the most exact matches on validation.
COMPARED = {
    "100 pairs, LoRA minus full, exact match, rates chosen by it": (
        at(8, pairs=100, lr=2e-2), [method("full", pairs=100, lr=1e-3)]),
    "300 pairs, LoRA minus full, exact match, rates chosen by it": (
        at(8, pairs=300, lr=1e-2), [method("full", pairs=300, lr=5e-4)]),
    "r = 8 minus full, mean of six scripts": (across(), across(method="full")),
    "r = 64 minus full, Georgian": (at(64), FULL),
    "100 pairs, LoRA minus full, exact match": (at(8, pairs=100), [method("full", pairs=100)]),
    "100 pairs, LoRA minus full, bits": (at(8, pairs=100), [method("full", pairs=100)], "bits"),
    "300 pairs, LoRA minus full, exact match": (at(8, pairs=300), [method("full", pairs=300)]),
    "300 pairs, LoRA minus full, bits": (at(8, pairs=300), [method("full", pairs=300)], "bits"),
    "r = 8 minus from scratch, same steps, mean of six scripts": (
        across(), across(method="scratch")),
    "r = 8 minus from scratch with ten times the steps, mean of six scripts": (
        across(), across(method="scratch", steps=5000, lr=2e-3)),
    "W_q, W_v at r = 38 minus all linear layers at r = 8": (at(38, targets="W_q, W_v"), EIGHT),
    **{f"all layers of the blocks at r = 9 minus {name} at r = {r}": (
        at(9, targets="blocks"), at(r, targets=name))
       for name, r in (("W_q, W_v", 38), ("attention", 19), ("feed-forward", 15))},
    "feed-forward at r = 15 minus attention at r = 19": (
        at(15, targets="feed-forward"), at(19, targets="attention")),
    **{f"attention at r = 4 minus {name} at r = 16": (
        at(4, targets="attention"), at(16, targets=name)) for name in ("W_q", "W_k", "W_v", "W_o")},
    "r = 1 minus r = 64": (at(1), at(64)),
    "r = 16 minus r = 4": (at(16), at(4)),
    "r = 64 minus r = 16": (at(64), at(16)),
    "α = 4 minus α = 16, r = 8": (at(8, alpha=4.0), EIGHT),
    "α = 64 minus α = 16, r = 8": (at(8, alpha=64.0), EIGHT),
    **{f"r = {r} at the rate of r = 8, minus r = {r} at its own": (at(r, lr=0.01), at(r))
       for r in (2, 64)},
    "r = 64, α = 16, α / √r minus α / r, each at its own rate": (
        at(64, alpha=16.0, rslora=True), at(64, alpha=16.0)),
    "B alone at r = 16 minus A and B at r = 8": ([replace(lora(16), method="lora-b")], EIGHT),
}  # fmt: skip


@pytest.mark.parametrize("words", COMPARED)
def test_every_difference_is_computed_again_from_the_rows(words, judged):
    ours, theirs, *score = COMPARED[words]
    seeds, scores = [], []
    for run in (*ours, *theirs):
        scores.append(by_seed(run, *score))
        seeds.append(set(scores[-1]))
    assert set.intersection(*seeds) == set(range(5))
    [says] = [s.says for s in SAYINGS if words in [measure.words for measure in s.measures]]
    row = judged[says]
    means = [[np.mean([found[seed] for found in side]) for seed in range(5)]
             for side in (scores[: len(ours)], scores[len(ours) :])]  # fmt: skip
    assert f"{words}: {interval_text(list(np.subtract(*means)))}" in row.measured


def test_every_compared_measure_is_among_those_computed_again():
    elsewhere = ("best", "geometric", "bits under r = 8", "cut to rank 8", "φ(1, 1)",
                 "intruders", "fewer", "weights, gradients", "arithmetic")  # fmt: skip
    words = {measure.words for saying in SAYINGS for measure in saying.measures}
    assert {w for w in words if not any(part in w for part in elsewhere)} == COMPARED.keys()


def test_the_rates_of_six_settings_are_computed_again(judged):
    ratios = []
    for factors in (*({"pairs": n} for n in (100, 300, 1000, None)),
                    *({"pairs": n, "task": "same-town"} for n in (500, None))):  # fmt: skip
        rates = []
        for kind in ("lora", "full"):
            tried = [row for row in ROWS if row["seed"] == 0 and all(
                row[n] == v for n, v in (asdict(Run(method=kind, **factors))).items()
                if n not in ("seed", "lr"))]  # fmt: skip
            key = (lambda row: row["validation"]["accuracy"]) if "task" in factors else (
                lambda row: -row["validation"]["bits"])  # fmt: skip
            rates.append(max(tried, key=key)["lr"])
        ratios.append(rates[0] / rates[1])
    logs = np.log(ratios)
    low, high = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    text = f"{number(stats.gmean(ratios))} ({number(math.exp(low))} to {number(math.exp(high))})"
    row = judged["LoRA wants about ten times the learning rate of full fine-tuning"]
    assert f"geometric mean of six settings: {text}" in row.measured


def kept(skill: str, name: str, rate: str, target: float) -> list[float]:
    """Bits of a skill at the first crossing of `target`, by numpy's interpolation."""
    found = []
    for run in TRACKS:
        if (run["name"], run["rate"]) == (name, rate):
            new, old = (np.array([look[x] for look in run["track"]]) for x in ("learned", skill))
            k = next(k for k in range(1, len(new)) if new[k] <= target <= new[k - 1])
            found.append(np.interp(target, new[[k, k - 1]], old[[k, k - 1]]))
    return found


EACH, HALF, FULL_NAME = "each at its rate", "at half of it", "full fine-tuning"


@pytest.mark.parametrize(
    "skill, rate, words",
    [
        ("Arabic", "chosen", f"Arabic: bits under r = 8 minus under full, {EACH}: {{}}"),
        ("Arabic", "half", f"Arabic: bits under r = 8 minus under full, {HALF}: {{}}"),
        ("names alone", "chosen", f"alone: bits under r = 8 minus under full, {EACH}: {{}}"),
        ("names alone", "half", f"alone: bits under r = 8 minus under full, {HALF}: {{}}"),
        ("Cyrillic", "chosen", "not judged: r = 8, each at its rate: Cyrillic {}"),
    ],
)
def test_forgetting_is_computed_again(skill, rate, words, judged):
    sides = (kept(skill, name, rate, target(full=False)) for name in ("LoRA r=8", FULL_NAME))
    expected = words.format(interval_text(list(np.subtract(*sides))))
    assert expected in judged[find("LoRA forgets").says].measured


def target(full: bool) -> float:
    """The bits on Georgian that every run reached, with or without those at the rate of full."""
    compared = [run for run in TRACKS if full or run["rate"] != "full's"]
    return max(min(look["learned"] for look in run["track"]) for run in compared)


@pytest.mark.parametrize(
    "name, rate, words",
    [("LoRA r=64", "chosen", "r = 64, each at its rate"),
     ("LoRA r=8", "full's", "r = 8 at the rate of full")],
)  # fmt: skip
def test_what_is_not_judged_is_computed_again(name, rate, words, judged):
    texts = []
    for skill in ("Arabic", "names alone"):
        bits = target(full=rate == "full's")
        lost = np.subtract(kept(skill, name, rate, bits), kept(skill, FULL_NAME, "chosen", bits))
        texts.append(f"{skill} {interval_text(list(lost))}")
    assert f"{words}: {', '.join(texts)}" in judged[find("LoRA forgets").says].measured


def test_the_cut_change_and_its_k90_are_computed_again(judged):
    runs = [run for run in CHANGES if (run["method"], run["script"]) == ("full", "georgian")]
    lost = [run["cut"]["8"]["exact_match"] - run["cut"]["128"]["exact_match"] for run in runs]
    row = judged[find("The weight change").says]
    assert f"minus uncut: {interval_text(lost)}" in row.measured
    k90 = np.mean([k for run in runs for path, k in run["k90"].items() if ".W_" in path])
    assert f"matrices {k90:.1f} of 128" in row.measured


def test_shared_directions_are_computed_again(judged):
    row = judged[find("Two ranks").says]
    for matrix in ("W_q", "W_v"):
        values = [np.mean([f["phi"][0][0] for f in DIRECTIONS["similarity"]
                           if f["pair"] == "r = 8 and r = 64, other seed" and f["side"] == "A"
                           and f["seed"] == seed and f["path"].endswith(matrix)])
                  for seed in range(5)]  # fmt: skip
        assert f"{matrix}: {interval_text(values)}" in row.measured


def test_parameters_memory_and_use_are_computed_again(judged, base):
    total = count_parameters(base)
    model = load_adapter(base, adapter_directory("georgian"))
    factors = count_parameters(model) - total
    assert f"r = 8: {number(1 - factors / total)}" in judged[find("99 %").says].measured
    # float32: a weight and its gradient 4 bytes each, Adam's two means 8; the base has no gradient.
    bytes_full, bytes_lora = total * (4 + 4 + 8), total * 4 + factors * (4 + 4 + 8)
    assert (
        f"full: {number(bytes_lora / bytes_full)}" in judged[find("Training takes").says].measured
    )
    assert unload_lora(model, merge=True) is model and count_parameters(model) == total
    use = judged[find("LoRA costs nothing").says]
    assert use.measured.startswith("arithmetic, merged over base: 1; unmerged 1.0")


# --- other results give other verdicts -----------------------------------------------------------


def planted(run: Run, scores: list[float]) -> list[dict]:
    """Rows for every seed of `run`, with bits that fall as the exact match rises."""
    return [
        asdict(replace(run, seed=seed))
        | {
            "trainable": 1000,
            "validation": {"bits": 1 - x},
            "test": {"exact_match": x, "bits": 1 - x},
        }
        for seed, x in enumerate(scores)
    ]


def changed(recorded, run: Run, by: float):
    """The recorded rows with the exact match of one setting moved, in every script."""
    rows = copy.deepcopy(recorded.rows)
    for row in rows:
        same = all(row[n] == v for n, v in asdict(run).items() if n not in ("seed", "lr", "script"))
        if same and row["test"]:
            row["test"]["exact_match"] += by
    return replace(recorded, rows=rows)


@pytest.mark.parametrize(
    "says, run, by, verdict",
    [
        ("LoRA is as good", CENTRE, 0.1, REPRODUCED),
        ("LoRA is as good", CENTRE, -0.1, NOT_REPRODUCED),
        ("With enough rank", lora(64), 0.1, REPRODUCED),
        ("With enough rank", lora(64), -0.1, NOT_REPRODUCED),
        ("W_q and W_v are enough", lora(38, targets="W_q, W_v"), 0.2, REPRODUCED),
        ("Put LoRA on all", lora(9, targets="blocks"), 0.1, REPRODUCED),
        ("Put LoRA on all", lora(9, targets="blocks"), -0.1, NOT_REPRODUCED),
        ("Feed-forward layers", lora(19, targets="attention"), -0.1, REPRODUCED),
        ("Feed-forward layers", lora(19, targets="attention"), 0.1, NOT_REPRODUCED),
        ("A very small rank", lora(1), 0.3, REPRODUCED),
        ("It is pretraining", method("scratch"), 0.5, NOT_REPRODUCED),
        ("At a fixed budget", lora(4, targets="attention"), 0.1, REPRODUCED),
    ],
)
def test_a_planted_difference_changes_the_verdict(says, run, by, verdict, recorded):
    assert verdict_of(find(says), changed(recorded, run, by)).verdict == verdict


def test_without_one_seed_there_is_no_verdict(recorded):
    rows = [row for row in recorded.rows if row["seed"] != 3 or row["rank"] != 64]
    row = verdict_of(find("With enough rank"), replace(recorded, rows=rows))
    assert (row.verdict, row.measured) == ("not recorded yet (4 of 5 seeds)", "")


def test_without_any_run_nothing_fails_and_nothing_is_claimed(recorded):
    elsewhere = ("LoRA forgets", "The weight change", "Two ranks", "LoRA leaves", "LoRA costs")
    for row in verdicts(replace(recorded, rows=[])):
        missing = row.verdict == "not recorded yet (0 of 5 seeds)"
        assert missing != row.says.startswith(elsewhere), row


@pytest.mark.parametrize("shift, verdict", [(0.0, REPRODUCED), (0.1, NOT_REPRODUCED)])
def test_a_verdict_comes_by_itself_when_the_runs_arrive(shift, verdict):
    seeds = [0.50, 0.52, 0.51, 0.53, 0.49]
    rows = [row for a, by in ((4.0, 0), (16.0, 0), (64.0, shift))
            for row in planted(lora(8, alpha=a, lr=0.01), [x + by for x in seeds])]  # fmt: skip
    saying = find("α is just")
    assert verdict_of(saying, replace(load_recorded(), rows=rows)).verdict == verdict


@pytest.mark.parametrize("best, verdict", [(0.005, CANT_TELL), (0.1, NOT_REPRODUCED)])
def test_a_best_rate_is_known_as_well_as_its_neighbours_on_the_ladder(best, verdict):
    def valley(run, best):
        ladder = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
        scores = {lr: 1 - abs(math.log(lr / best)) for lr in ladder}
        return [row for lr in ladder for row in planted(replace(run, lr=lr), [scores[lr]])]

    rows = valley(lora(8, alpha=16.0), 0.005) + valley(lora(64, alpha=16.0), best)
    row = verdict_of(find("With α fixed"), replace(load_recorded(), rows=rows))
    assert row.verdict == verdict
    assert f": {number(best / 0.005)} (" in row.measured


@pytest.mark.parametrize("best, verdict", [(0.02, REPRODUCED), (0.002, NOT_REPRODUCED)])
def test_the_ratio_of_rates_is_taken_seed_by_seed(best, verdict):
    def rate_runs(start, best):
        runs = [run for label, run in QUESTIONS["rate"].levels.items() if label.startswith(start)]
        return [row for run in runs for row in planted(run, [1 - abs(math.log(run.lr / best))] * 5)]

    recorded = load_recorded()
    kept = [row for row in recorded.rows if row["pairs"] or row["task"] == "same-town"]
    rows = kept + rate_runs("LoRA", best) + rate_runs("full", 0.002)
    saying = find("LoRA wants about ten")
    alone = replace(saying, measures=saying.measures[:1])
    assert verdict_of(alone, replace(recorded, rows=rows)).verdict == verdict


def test_when_lora_and_full_swap_their_tracks_lora_forgets_less(recorded):
    other = {"LoRA r=8": "full fine-tuning", "full fine-tuning": "LoRA r=8"}
    runs = [run | {"name": other.get(run["name"], run["name"])} if run["rate"] != "full's" else run
            for run in recorded.forgetting]  # fmt: skip
    row = verdict_of(find("LoRA forgets"), replace(recorded, forgetting=runs))
    assert row.verdict == REPRODUCED


def test_a_change_that_survives_the_cut_is_low_rank(recorded):
    runs = copy.deepcopy(recorded.changes)
    for run in runs:
        if run["cut"]:
            run["cut"]["8"] = run["cut"]["128"]
    row = verdict_of(find("The weight change"), replace(recorded, changes=runs))
    assert row.verdict == REPRODUCED


def test_ranks_that_share_their_first_direction_are_seen(recorded):
    geometry = copy.deepcopy(recorded.geometry)
    for found in geometry["similarity"]:
        found["phi"][0][0] = 0.8
    assert verdict_of(find("Two ranks"), replace(recorded, geometry=geometry)).verdict == REPRODUCED


def test_the_intruder_test_is_judged_where_its_limit_is_far_from_chance(recorded, monkeypatch):
    assert verdict_of(find("LoRA leaves"), recorded).verdict == CANT_TELL
    monkeypatch.setattr(sayings_module, "_width", lambda: 768)
    assert verdict_of(find("LoRA leaves"), recorded).verdict == REPRODUCED


def test_in_a_wide_model_99_of_100_parameters_are_saved(recorded):
    rows = copy.deepcopy(recorded.rows)
    for row in rows:
        if row["method"] == "full":
            row["trainable"] *= 100
    assert verdict_of(find("99 %"), replace(recorded, rows=rows)).verdict == REPRODUCED


def test_the_worst_of_several_measures_decides_and_is_named(recorded):
    both = changed(changed(recorded, lora(4), -0.2), lora(64), 0.2)
    assert verdict_of(find("More rank"), both).verdict == REPRODUCED
    row = verdict_of(find("More rank"), changed(both, lora(4), 0.5))
    assert row.verdict == NOT_REPRODUCED
    assert "r = 16 minus r = 4" in row.why and "r = 64" not in row.why


def test_the_rate_of_the_one_rate_question_is_the_chosen_one_of_rank_8():
    assert chosen_rate(ROWS, lora(8)) == 0.01
