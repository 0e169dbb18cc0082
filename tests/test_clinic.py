"""The clinic of notebook 04: every broken run is broken, and in its own way."""

import math

import pytest
import torch

from lora_course.exercises import ex04

WIDTH, RANK, BLOCKS = 128, 8, 4


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


@pytest.fixture(scope="module")
def runs():
    """Every run of the clinic, cut to two steps: at the second one B has left zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ex04, "STEPS", 2)
        return {name: ex04.clinic_run(name) for name in ex04.RUNS}


def test_the_healthy_run_trains_both_factors_of_both_targets(runs):
    healthy = runs["healthy"]
    assert len(healthy["losses"]) == 2
    assert healthy["trainable"] == healthy["held"] == BLOCKS * 2 * RANK * 2 * WIDTH
    assert min(healthy["gradient_A"], healthy["gradient_B"]) > 0
    assert healthy["change_B"] == pytest.approx(2 * ex04.RATE, rel=0.1)


def test_every_broken_run_shows_the_sign_of_its_fault(runs, base, tokenizer):
    healthy, a, b, c, d, e = runs.values()
    assert a["gradient_A"] == a["gradient_B"] == a["change_B"] == 0 and a["held"] == healthy["held"]
    assert b["trainable"] == b["held"] == healthy["held"] // 2 and b["change_B"] > 0
    assert c["change_B"] > 100 * healthy["change_B"]
    assert c["gradient_A"] > 10 * healthy["gradient_A"]
    assert d["held"] == sum(p.numel() for p in base.parameters())
    assert d["trainable"] == healthy["trainable"] and d["gradient_B"] > 0 == d["change_B"]
    assert e["losses"][0] > healthy["losses"][0] + 0.4
    assert e["trainable"] == e["held"] == healthy["trainable"]  # the new head is not among them
    assert a["reads"] == d["reads"] == "Батман"  # what the base writes
    assert f"about {math.log(base.classifier.out_features):.1f} nats" in ex04.diagnose.why


def test_a_run_leaves_the_learners_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(ex04, "STEPS", 1)
    state = torch.get_rng_state()
    ex04.clinic_run("E")
    assert torch.equal(torch.get_rng_state(), state)


RIGHT = {"A": "d", "B": "c", "C": "e", "D": "a", "E": "b"}
EMPTY = dict.fromkeys(RIGHT)
VERDICTS = [
    (None, "Not attempted yet. Give each run the letter of a cause"),
    (dict.fromkeys(RIGHT, ""), "Not attempted yet. Give each run"),
    (RIGHT, "Right. The signs that decide. A: the gradients of A and of B are both exactly zero;"),
    ({run: letter.upper() for run, letter in RIGHT.items()}, "Right. "),
    (RIGHT | {"A": "a"}, "Not right yet: 4 of 5 runs are right.\n  A: if the optimizer was "
     "built before the injection, then the optimizer holds the whole base's scalars"),
    (RIGHT | {"B": "z", "C": 3}, "  B: 'z' is not an option; give one of a, b, c, d, e.\n  C: 3"),
    (EMPTY | {"A": "d"}, "  A: right: the gradients of A and of B are both exactly zero\n"
     "  B: not answered"),
    ("dceab", "Not right yet: give a letter for each run"),
    ({1: "a"}, "Not right yet: give a letter for each run"),
]  # fmt: skip


@pytest.mark.parametrize("answer, words", VERDICTS)
def test_a_diagnosis_gets_a_reply_for_every_run(capsys, answer, words):
    ex04.diagnose(answer)
    said = capsys.readouterr().out
    assert words in said and said.startswith("  a) the optimizer was built before the injection\n")
