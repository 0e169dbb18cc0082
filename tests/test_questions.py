"""How differences are measured, and that every question has answers. What is recorded is tested in
test_experiments."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats

from lora_course.experiments.answers import COMPARED, NoVerdict, answers, by_seed, difference
from lora_course.experiments.questions import (
    QUESTIONS,
    SEEDS,
    Difference,
    Question,
    lora,
    mean_interval,
    paired_difference,
)
from lora_course.experiments.runs import CENTRE, chosen_rate, load_results

ROWS = load_results()


# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 5, 30])
def test_a_paired_difference_is_that_of_scipys_paired_test(seeds):
    rng = np.random.default_rng(seeds)
    ours, theirs = rng.normal(0.5, 0.02, seeds), rng.normal(0.4, 0.02, seeds)
    found = paired_difference(list(ours), list(theirs))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found == pytest.approx((np.mean(ours - theirs), expected.low, expected.high))


def test_what_a_seed_adds_to_both_does_not_widen_the_interval():
    luck = [0.0, 0.3, -0.2, 0.1, 0.25]
    ours, theirs = [0.52 + x for x in luck], [0.5 + x for x in luck]
    assert paired_difference(ours, theirs) == pytest.approx((0.02, 0.02, 0.02))
    shuffled = paired_difference(ours, theirs[::-1])
    assert shuffled.mean == pytest.approx(0.02)
    assert shuffled.high - shuffled.low > 0.2


def test_the_interval_of_a_mean_is_students():
    values = [0.50, 0.53, 0.49, 0.55, 0.51]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((np.mean(values), expected.low, expected.high))


def test_about_95_of_100_intervals_hold_the_true_mean():
    rng = np.random.default_rng(0)
    found = [mean_interval(list(rng.normal(1.0, 1.0, 5))) for _ in range(1000)]
    assert 930 <= sum(interval.low <= 1.0 <= interval.high for interval in found) <= 970


@pytest.mark.parametrize("ours, theirs", [([1.0, 2.0], [1.0]), ([1.0], [1.0]), ([], [])])
def test_seeds_without_a_partner_are_refused(ours, theirs):
    with pytest.raises(ValueError, match=rf"{len(ours)} and {len(theirs)} scores .* two or more"):
        paired_difference(ours, theirs)


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="two or more seeds; 1 given"):
        mean_interval([0.5])


@pytest.mark.parametrize(
    "low, high, verdict",
    [
        (0.021, 0.9, "higher"),
        (-0.9, -0.021, "lower"),
        (-0.02, 0.02, "level"),
        (0.005, 0.015, "level"),  # surely above zero, and surely not worth a word
        (0.02, 0.03, "can't tell"),
        (-0.03, 0.0, "can't tell"),
        (-0.3, 0.3, "can't tell"),
    ],
)
def test_a_verdict_asks_where_the_whole_interval_lies(low, high, verdict):
    assert Difference((low + high) / 2, low, high).verdict(0.02) == verdict


def test_an_interval_is_written_with_three_digits_and_a_minus_sign():
    assert str(Difference(-0.03841, -0.0491, 10.0)) == "−0.0384 (−0.0491 to 10)"
    assert str(Difference(0.25, 0.25, 0.25)) == "0.25"


# --- scores by seed ------------------------------------------------------------------------------


def planted(run, scores: dict[int, float], lr: float = 0.01) -> list[dict]:
    """Rows of one setting: seed → exact match; bits are its complement, None means diverged."""
    return [
        asdict(replace(run, lr=lr, seed=seed))
        | {
            "validation": {"bits": 1.0},
            "test": None if score is None else {"exact_match": score, "bits": 1 - score},
        }
        for seed, score in scores.items()
    ]


QUESTION = Question("q", "Which?", {"a": lora(1), "b": lora(2)})


def test_scores_carry_their_seed_and_may_be_of_another_kind():
    rows = planted(lora(1), {3: 0.4, 0: 0.5}) + planted(lora(2), {0: 0.9})
    assert QUESTION.by_seed("a", rows) == {0: 0.5, 3: 0.4}
    assert QUESTION.by_seed("a", rows, "bits") == {0: 0.5, 3: 0.6}
    assert QUESTION.scores("a", rows) == [0.5, 0.4]


def test_a_level_without_any_run_has_no_scores():
    assert QUESTION.by_seed("b", planted(lora(1), {0: 0.5})) == {}


def test_a_run_that_diverged_gets_nothing_right():
    rows = planted(lora(1), {0: 0.5, 1: None})
    assert QUESTION.by_seed("a", rows) == {0: 0.5, 1: 0.0}
    assert QUESTION.by_seed("a", rows, "bits")[1] == float("inf")


def test_levels_are_compared_at_the_same_seed_whatever_the_order_of_the_rows():
    ranks = {1: [0.1, 0.2, 0.3, 0.4, 0.5], 2: [0.15, 0.27, 0.31, 0.44, 0.58]}
    rows = [row for r, s in ranks.items() for row in planted(lora(r), dict(enumerate(s)))]
    levels = [("rank", "r = 2")], [("rank", "r = 1")]
    found = difference(*levels, rows[::-1])
    assert found == paired_difference(ranks[2], ranks[1])
    both = [("rank", "r = 1"), ("rank", "r = 2")]
    assert by_seed(both, rows)[1] == pytest.approx(0.235)


@pytest.mark.parametrize("missing", [1, 4])
def test_fewer_than_all_seeds_give_no_answer_and_say_how_many_there_are(missing):
    left = {seed: 0.5 for seed in SEEDS[: 5 - missing]}
    rows = planted(lora(1), left) + planted(lora(2), {seed: 0.4 for seed in SEEDS})
    with pytest.raises(NoVerdict) as refused:
        difference([("rank", "r = 2")], [("rank", "r = 1")], rows)
    assert refused.value.args[0] == f"not recorded yet ({5 - missing} of 5 seeds)"
    [answer] = [a for a in answers(QUESTIONS["rank"], rows) if a[0] == "r = 2, minus r = 1"]
    assert answer[1:] == ["", f"not recorded yet ({5 - missing} of 5 seeds)"]


# --- answers -------------------------------------------------------------------------------------


def test_every_question_says_which_of_its_levels_answer_it():
    assert COMPARED.keys() == QUESTIONS.keys()
    for name, pairs in COMPARED.items():
        assert pairs
        for ours, theirs in pairs:
            assert ours != theirs
            assert name in (ours[0], theirs[0])
            for question, label in (ours, theirs):
                assert label in QUESTIONS[question].levels


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_is_answered_or_says_what_is_missing(name):
    found = answers(QUESTIONS[name], ROWS)
    assert len(found) == len(COMPARED[name])
    for _, interval, answer in found:
        assert answer in ("higher", "lower", "level", "can't tell") or (
            interval == "" and answer.startswith("not recorded yet (")
        )


def test_an_answer_is_the_difference_of_the_recorded_seeds():
    scores = {}
    for rank in (1, 2):
        lr = chosen_rate(ROWS, lora(rank))
        wanted = asdict(replace(CENTRE, rank=rank, alpha=2.0 * rank, lr=lr))
        del wanted["seed"]
        found = [row for row in ROWS if all(row[name] == x for name, x in wanted.items())]
        scores[rank] = {row["seed"]: row["test"]["exact_match"] for row in found}
    pairs = [(scores[2][seed], scores[1][seed]) for seed in range(5)]
    expected = paired_difference(*zip(*pairs, strict=True))
    answer = next(a for a in answers(QUESTIONS["rank"], ROWS) if a[0] == "r = 2, minus r = 1")
    assert answer == ["r = 2, minus r = 1", str(expected), expected.verdict(0.02)]
