"""How differences are measured and judged: every question is answered, verdicts follow from the
recorded numbers, and other numbers give other verdicts."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats

from lora_course.experiments import statements
from lora_course.experiments.questions import (
    CANT_TELL,
    CAPACITY,
    COUNTS,
    NOT_REPRODUCED,
    QUESTIONS,
    REPRODUCED,
    SEEDS,
    THRESHOLD,
    Interval,
    Question,
    Region,
    in_a_word,
    judge,
    lora,
    method,
    paired_difference,
)
from lora_course.experiments.runs import SETTINGS, Run, runs_at
from lora_course.results import load_runs, load_table
from lora_lib.names import load_pairs

RUNS = load_runs()

# --- differences and questions -------------------------------------------------------------------


@pytest.mark.parametrize("ours, theirs, message", [
    ([1.0, 2.0], [1.0], "argument 2 is shorter"),
    ([1.0], [1.0], "two or more seeds; 1 given"),
    ([], [], "two or more seeds; 0 given"),
])  # fmt: skip
def test_seeds_without_a_partner_are_refused(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(ours, theirs)


def test_an_interval_is_written_with_three_digits_and_a_minus_sign():
    assert str(Interval(-0.03841, -0.0491, 10.0)) == "−0.0384 (−0.0491 to 10)"


@pytest.mark.parametrize(
    "low, high, verdict, word",
    [
        (0.021, 0.9, REPRODUCED, "higher"),
        (0.005, 0.015, NOT_REPRODUCED, "level"),  # surely above zero, and surely not worth a word
        (-0.02, 0.02, CANT_TELL, "level"),
        (-0.9, -0.021, NOT_REPRODUCED, "lower"),
        (-0.03, 0.0, NOT_REPRODUCED, "can't tell"),
        (0.01, 0.03, CANT_TELL, "can't tell"),
        (-0.3, 0.3, CANT_TELL, "can't tell"),
    ],
)
def test_one_rule_asks_where_the_whole_interval_lies(low, high, verdict, word):
    interval = Interval((low + high) / 2, low, high)
    assert judge(interval, Region("more than 0.02 higher", 0.02, math.inf)) == verdict
    assert in_a_word(interval, 0.02) == word


def test_scores_come_by_level_and_seed_whatever_the_order_of_the_table():
    question = Question("Which?", {"b": lora(2), "a": lora(1)})
    found = question.scores(RUNS[::-1])
    assert list(found.index) == [(level, seed) for level in "ba" for seed in SEEDS]
    rows = RUNS[(RUNS["rank"] == 2) & (RUNS.alpha == 4) & (RUNS.targets == "all-linear")]
    bits = {row.seed: row.bits for row in rows.itertuples() if row.lr == 0.02}
    assert dict(question.scores(RUNS, "bits")["b"]) == bits and len(bits) == 5


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_level_has_five_seeds_and_every_difference_is_computed_again(name):
    question = QUESTIONS[name]
    scores = {level: list(found) for level, found in question.scores(RUNS).groupby("level")}
    assert scores.keys() == question.levels.keys()
    assert {len(found) for found in scores.values()} == {5}
    if question.beside:
        scores |= {level: list(s) for level, s in
                   QUESTIONS[question.beside].scores(RUNS).groupby("level")}  # fmt: skip
    answers = question.differences(RUNS)
    assert answers
    for words, found, word in answers:
        ours, theirs = (label.partition(" of “")[0] for label in words.split(", minus "))
        test = stats.ttest_rel(scores[ours], scores[theirs])
        if len(set(np.subtract(scores[ours], scores[theirs]))) > 1:
            assert found[1:] == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert found.mean == pytest.approx(np.mean(scores[ours]) - np.mean(scores[theirs]))
        assert word == in_a_word(found, THRESHOLD[question.score])


def test_a_level_with_a_rate_of_its_own_takes_no_other():
    given = Question("Which?", {"a": replace(lora(8), lr=2e-3)}).runs(RUNS)
    chosen = Question("Which?", {"a": lora(8)}).runs(RUNS)
    assert set(given.lr) == {2e-3} and set(chosen.lr) == {1e-2}


# --- statements ----------------------------------------------------------------------------------


def test_every_statement_is_judged_and_says_who_says_it():
    judged = statements.verdicts()
    assert len(judged) == 34 and {key for key, *_ in statements.COMPARISONS} <= set(judged.index)
    assert judged.notna().all(axis=None) and judged.source.ne("").all()
    assert set(judged.verdict) == {REPRODUCED, NOT_REPRODUCED, CANT_TELL}


def moved(run: Run, by: float):
    """The recorded runs with the exact match of one setting moved, in every script."""
    runs = load_runs()
    same = np.logical_and.reduce(
        [runs[n].isna() if v is None else runs[n].eq(v).fillna(False)
         for n, v in asdict(run).items() if n not in ("seed", "lr", "script")])  # fmt: skip
    runs.loc[same, "exact_match"] += by
    return runs


def verdict(key: str, measures) -> str:
    return statements.decide([measure for measure in measures if measure.statement == key])[0]


@pytest.mark.parametrize("key, run, by, expected", [
    ("as-good", lora(), 0.1, REPRODUCED),
    ("as-good", lora(), -0.1, NOT_REPRODUCED),
    ("small-rank", lora(1), 0.3, REPRODUCED),
    ("pretraining", method("scratch"), 0.5, NOT_REPRODUCED),
    ("alpha", lora(alpha=64.0), 0.1, NOT_REPRODUCED),
    ("attention-adds", lora(targets="feed-forward"), 0.1, CANT_TELL),  # at equal parameters
    ("attention-adds", lora(9, targets="blocks"), 0.1, NOT_REPRODUCED),
    ("enough-rank", lora(64, alpha=16.0), -0.1, NOT_REPRODUCED),  # α is chosen for each rank
    ("enough-rank", lora(64), -0.1, REPRODUCED),
])  # fmt: skip
def test_a_planted_difference_changes_the_verdict(key, run, by, expected, monkeypatch):
    mine = [comparison for comparison in statements.COMPARISONS if comparison[0] == key]
    monkeypatch.setattr(statements, "COMPARISONS", mine)
    measures = (
        statements.compare(moved(run, by)) if mine else statements.highest_rank(moved(run, by))
    )
    assert verdict(key, measures) == expected


def test_other_tracks_cuts_and_directions_give_other_verdicts():
    looks = load_table("forgetting")
    swap = {"LoRA r=8": "full fine-tuning", "full fine-tuning": "LoRA r=8"}
    swapped = looks.rate.ne("full's")
    looks.loc[swapped, "setting"] = looks.setting[swapped].replace(swap)
    assert verdict("forgetting", statements.forgotten(looks)) == REPRODUCED
    tables = {name: load_table(name) for name in ("cuts", "similarity", "intruders")}
    tables["cuts"].exact_match, tables["similarity"].phi = 0.5, 0.8
    measures = list(statements.what_changes(tables.get))
    assert verdict("low-rank", measures) == verdict("same-direction", measures) == REPRODUCED


def test_what_schulman_et_al_found_would_be_called_reproduced():
    runs = load_runs()
    batch = runs.batch_size.eq(512) & runs.method.eq("lora")
    runs.loc[batch, "bits"] = 2.4
    best = runs.lr.eq(runs.method.map({"lora": 0.02, "full": 0.002}))  # ten times
    runs.loc[best & runs.steps.eq(62) & runs.batch_size.eq(64), "validation_bits"] = 0.0
    levels = [replace(run, pairs=n) for run in CAPACITY.values() for n in COUNTS[1:]]
    for run in levels:
        names = load_pairs("georgian", "train")[: run.pairs]
        rows = runs_at({"": run}, runs)
        too_small = 2 * rows.trainable.iloc[0] < statements.letter_bits(names)
        mine = runs.merge(rows[SETTINGS], "left", indicator=True)._merge.eq("both")
        runs.loc[mine, "bits"] = 0.9 if too_small else 0.5
    measures = list(statements.without_regret(runs))
    for key in ("large-batches", "batch-any-rank", "short-runs", "capacity"):
        assert verdict(key, measures) == REPRODUCED, key


def test_the_intruder_test_is_judged_where_its_limit_is_far_from_chance():
    assert "in width 128 a random direction has a cosine of 0.2" in statements.doubt_of_intruders(
        128
    )
    assert statements.doubt_of_intruders(768) == ""
    measure = statements.Measure(
        "intruders", "flagged", Interval(19, 18, 20), Region("more", 1, 99)
    )
    assert statements.decide([measure._replace(doubt="chance")]) == (CANT_TELL, "chance")


def test_the_worst_of_several_measures_decides_and_is_named():
    good, bad = Interval(0.5, 0.4, 0.6), Interval(0.1, 0.05, 0.15)
    unsure, region = Interval(0.3, 0.1, 0.5), Region("more than 0.2", 0.2, 1)
    measures = [statements.Measure("x", name, found, region)
                for name, found in (("good", good), ("bad", bad), ("unsure", unsure))]  # fmt: skip
    assert statements.decide(measures) == (NOT_REPRODUCED, "wholly outside “more than 0.2”: bad")
    assert (
        statements.decide([measures[0], measures[2]])[1]
        == "across the limit of “more than 0.2”: unsure"
    )
    assert statements.decide(measures[:1]) == (REPRODUCED, "as said: more than 0.2")
    assert statements.about(10, "10")[1:] == (5, 20)
