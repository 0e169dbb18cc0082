"""The checks of notebook 04: the training step, and the clinic: every broken run is broken."""

import pytest
import torch

from lora_lib.exercises import training


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


# --- a training step -----------------------------------------------------------------------------


def factors(model):
    return [p for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))]


def by_hand(model, compute_loss, lr):
    model.zero_grad()
    compute_loss().backward()
    with torch.no_grad():
        for parameter in factors(model):
            parameter -= lr * parameter.grad


def freeze_and_optimize(model, compute_loss, lr):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr)
    optimizer.zero_grad()
    compute_loss().backward()
    optimizer.step()


def without_backward(model, compute_loss, lr):
    gradients = torch.autograd.grad(compute_loss(), factors(model))
    for parameter, gradient in zip(factors(model), gradients, strict=True):
        parameter.data.sub_(lr * gradient)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("answer", [by_hand, freeze_and_optimize, without_backward])
def test_right_steps_pass(answer, seed, capsys):
    torch.manual_seed(seed)
    training.step(answer)
    assert capsys.readouterr().out.startswith("Right.")


@pytest.mark.parametrize("seed", [172, 242, 1169])
def test_a_right_step_passes_where_rounding_is_large_beside_it(seed):
    torch.manual_seed(seed)  # a factor's entry above 2 whose gradient is almost zero
    training.step.test(by_hand)


def stepping(choose, by=lambda parameter, lr: -lr * parameter.grad, clear=True):
    """An answer that adds `by` to the parameters that `choose(name)` picks."""

    def answer(model, compute_loss, lr):
        if clear:
            model.zero_grad()
        compute_loss().backward()
        for name, parameter in model.named_parameters():
            if choose(name):
                parameter.data += by(parameter, lr)

    return answer


def adapter(name):
    return "lora_" in name


def every_gradient(model, compute_loss, lr):
    torch.optim.SGD(model.parameters(), lr).zero_grad()
    compute_loss().backward()
    torch.optim.SGD(model.parameters(), lr).step()


def adam(model, compute_loss, lr):
    optimizer = torch.optim.AdamW(factors(model), lr)
    optimizer.zero_grad()
    compute_loss().backward()
    optimizer.step()


def rebinding(model, compute_loss, lr):
    model.zero_grad()
    compute_loss().backward()
    for parameter in factors(model):
        parameter = parameter - lr * parameter.grad


def recorded_by_autograd(model, compute_loss, lr):
    compute_loss().backward()
    for parameter in factors(model):
        parameter -= lr * parameter.grad


@pytest.mark.parametrize(
    "answer, message",
    [
        (every_gradient, "1.weight changed, and it is not part of the adapter"),
        (stepping(lambda name: adapter(name) or name == "3.bias"), "3.bias changed"),
        (lambda model, compute_loss, lr: compute_loss().backward(), "no parameter changed"),
        (rebinding, "no parameter changed"),
        (stepping(lambda name: "lora_B" in name), "0.lora_A did not change; both factors"),
        (stepping(lambda name: "lora_A" in name), "0.lora_B did not change; both factors"),
        (stepping(lambda name: adapter(name) and name[0] == "0"), "2.lora_A did not change"),
        (stepping(adapter, by=lambda p, lr: lr * p.grad), "you add the gradient"),
        (stepping(adapter, by=lambda p, lr: -p.grad), "is lr not used"),
        (stepping(adapter, clear=False), "zero_grad"),
        (adam, "not by −lr times the gradient"),
        (recorded_by_autograd, "in-place operation. at: parameter -= lr * parameter.grad"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_wrong_steps_are_diagnosed(answer, message, seed, capsys):
    torch.manual_seed(seed)
    training.step(answer)
    out = capsys.readouterr().out
    assert out.startswith("Not right yet") and message in out


def stub(model, compute_loss, lr):
    raise NotImplementedError


@pytest.mark.parametrize("answer", [stub, None, lambda model, compute_loss, lr: None])
def test_a_stub_was_not_attempted(answer, capsys):
    training.step(answer)
    assert capsys.readouterr().out.startswith("Not attempted")


# --- the clinic ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    """Every run of the clinic, cut to two steps: at the second one B has left zero."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "STEPS", 2)
        return {name: training.clinic_run(name) for name in training.RUNS}


WIDTH, RANK, BLOCKS = 128, 8, 4


def test_the_healthy_run_trains_both_factors_of_both_targets(runs):
    healthy = runs["healthy"]
    assert len(healthy["losses"]) == 2
    assert healthy["trainable"] == healthy["held"] == BLOCKS * 2 * RANK * 2 * WIDTH
    assert min(healthy["gradient_A"], healthy["gradient_B"]) > 0
    assert healthy["change_B"] == pytest.approx(2 * training.RATE, rel=0.1)


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
    model, _, _, held = training.RUNS["E"]()
    assert held is None
    assert not any(p.requires_grad for p in model.classifier.parameters())
    assert not torch.equal(model.classifier.weight, base.classifier.weight)


# --- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question, right",
    [
        *[(training.diagnose[run], cause) for run, cause in zip("ABCDE", "dceab", strict=True)],
        (training.few_seeds, "c"),
    ],
    ids=[*(f"run {run}" for run in "ABCDE"), "few_seeds"],
)
def test_choices_name_the_misconception(question, right, capsys):
    question(None)
    assert "Not attempted" in capsys.readouterr().out
    messages = set()
    for letter in question.options:
        question(letter)
        answer = capsys.readouterr().out.splitlines()[-1]
        assert answer.startswith("Right." if letter == right else "Not right yet")
        messages.add(answer)
    assert len(messages) == len(question.options)


def test_a_wrong_diagnosis_says_what_that_cause_would_show(capsys):
    training.diagnose["A"]("a")
    out = capsys.readouterr().out
    assert "the optimizer would hold the whole base's scalars" in out
    assert "Run A does not show that." in out
