"""The clinic of notebook 04: every broken run is broken, and in its own way."""

import pytest
import torch

from lora_course.exercises import ex04


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


# --- the clinic ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    """Every run of the clinic, cut to two steps: at the second one B has left zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ex04, "STEPS", 2)
        return {name: ex04.clinic_run(name) for name in ex04.RUNS}


WIDTH, RANK, BLOCKS = 128, 8, 4


def test_the_healthy_run_trains_both_factors_of_both_targets(runs):
    healthy = runs["healthy"]
    assert len(healthy["losses"]) == 2
    assert healthy["trainable"] == healthy["held"] == BLOCKS * 2 * RANK * 2 * WIDTH
    assert min(healthy["gradient_A"], healthy["gradient_B"]) > 0
    assert healthy["change_B"] == pytest.approx(2 * ex04.RATE, rel=0.1)


def test_run_a_starts_with_both_factors_zero_and_stays_there(runs):
    assert runs["A"]["gradient_A"] == runs["A"]["gradient_B"] == runs["A"]["change_B"] == 0
    assert runs["A"]["held"] == runs["healthy"]["held"]


def test_run_b_misses_one_of_two_targets(runs):
    assert runs["B"]["trainable"] == runs["B"]["held"] == runs["healthy"]["held"] // 2
    assert runs["B"]["change_B"] > 0


def test_run_c_takes_steps_far_too_large(runs):
    assert runs["C"]["change_B"] > 100 * runs["healthy"]["change_B"]
    assert runs["C"]["gradient_A"] > 10 * runs["healthy"]["gradient_A"]


def test_run_d_has_no_trainable_parameter_in_the_optimizer(runs, base):
    assert runs["D"]["held"] == sum(p.numel() for p in base.parameters())
    assert runs["D"]["trainable"] == runs["healthy"]["trainable"]
    assert runs["D"]["gradient_B"] > 0 and runs["D"]["change_B"] == 0


def test_run_e_freezes_a_new_head(runs, base):
    assert runs["E"]["trainable"] == runs["healthy"]["trainable"]  # the head is not among them
    assert runs["E"]["losses"][0] > runs["healthy"]["losses"][0] + 0.4
    model, _, _, held = ex04.RUNS["E"]()
    assert held is None
    assert not any(p.requires_grad for p in model.classifier.parameters())
    assert not torch.equal(model.classifier.weight, base.classifier.weight)


def test_a_wrong_diagnosis_says_what_that_cause_would_show(capsys):
    ex04.diagnose["A"]("a")
    out = capsys.readouterr().out
    assert "then the optimizer holds the whole base's scalars" in out
    assert "Run A does not show that." in out
