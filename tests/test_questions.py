"""How differences are measured and judged, and that every question is answered."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lora_course.experiments.questions import (
    CANT_TELL,
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
    mean_interval,
    paired_difference,
)
from lora_course.results import load_runs

RUNS = load_runs()


@pytest.mark.parametrize("ours, theirs", [([1.0, 2.0], [1.0]), ([1.0], [1.0]), ([], [])])
def test_seeds_without_a_partner_are_refused(ours, theirs):
    with pytest.raises(ValueError, match=rf"{len(ours)} and {len(theirs)} scores .* two or more"):
        paired_difference(ours, theirs)
    with pytest.raises(ValueError, match="two or more seeds; 1 given"):
        mean_interval([0.5])


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
