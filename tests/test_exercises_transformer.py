"""The checks of notebook 03: a stub, right answers written differently, typical wrong ones."""

import copy

import pytest
from torch import nn

from lora_lib.exercises import transformer as exercises
from lora_lib.lora import LoRALinear, _matches, add_lora_to_model, freeze_non_lora_params


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


def said(capsys, exercise, answer) -> str:
    exercise(answer)
    return capsys.readouterr().out


def stub(*arguments):
    raise NotImplementedError


@pytest.mark.parametrize("name", ["inject", "freeze"])
def test_a_stub_is_not_attempted(capsys, name):
    assert said(capsys, getattr(exercises, name), stub).startswith("Not attempted")


@pytest.mark.parametrize("name", ["target_match", "frozen_head"])
def test_a_question_without_answer_is_not_attempted(capsys, name):
    assert "Not attempted" in said(capsys, getattr(exercises, name), None)


# --- injection -----------------------------------------------------------------------------------


def linears(model):
    return [(p, m) for p, m in list(model.named_modules()) if isinstance(m, nn.Linear)]


def injecting(matches):
    """An answer that replaces what `matches(path, target)`."""

    def answer(model, target, rank, alpha):
        for path, module in linears(model):
            if matches(path, target):
                model.set_submodule(path, LoRALinear(module, rank, alpha))

    return answer


def by_parents(model, target, rank, alpha):
    """Another way: over parents and their attributes, comparing pieces of the path."""
    wanted = target.split(".")
    for parent_path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            pieces = [*parent_path.split("."), name]
            if isinstance(child, nn.Linear) and pieces[-len(wanted) :] == wanted:
                setattr(parent, name, LoRALinear(child, rank=rank, alpha=alpha))
    return model


def by_the_library(model, target, rank, alpha):
    return add_lora_to_model(model, rank, alpha, [target])


@pytest.mark.parametrize("answer", [injecting(_matches), by_parents, by_the_library])
def test_right_injections(capsys, answer):
    assert said(capsys, exercises.inject, answer).startswith("Right.")


def only_made(model, target, rank, alpha):
    return [LoRALinear(m, rank, alpha) for p, m in linears(model) if _matches(p, target)]


def on_a_copy(model, target, rank, alpha):
    return by_parents(copy.deepcopy(model), target, rank, alpha)


def children_only(model, target, rank, alpha):
    for name, child in list(model.named_children()):
        if name == target:
            setattr(model, name, LoRALinear(child, rank, alpha))


def around_a_new_linear(model, target, rank, alpha):
    for path, module in linears(model):
        if _matches(path, target):
            new = nn.Linear(module.in_features, module.out_features)
            model.set_submodule(path, LoRALinear(new, rank, alpha))


def with_default_rank(model, target, rank, alpha):
    for path, module in linears(model):
        if _matches(path, target):
            model.set_submodule(path, LoRALinear(module))


def twice(model, target, rank, alpha):
    by_parents(model, target, rank, alpha)
    injecting(lambda p, t: p.endswith(t + ".original"))(model, target, rank, alpha)


def random_b(model, target, rank, alpha):
    by_parents(model, target, rank, alpha)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B)


def unfrozen(model, target, rank, alpha):
    by_parents(model, target, rank, alpha).requires_grad_(True)


@pytest.mark.parametrize(
    "answer, message",
    [
        (only_made, "set_submodule"),
        (on_a_copy, "changed a copy"),
        (injecting(lambda path, target: target in path), "contains 'q' somewhere"),
        (injecting(lambda path, target: path.endswith(target)), "dot in front"),
        (injecting(lambda path, target: True), "compare each path"),
        (injecting(lambda path, target: path.endswith("." + target)), "compare for equality"),
        (injecting(lambda path, target: path.split(".")[-1] == target), "whole path, not with"),
        (children_only, "visits every depth"),
        (around_a_new_linear, "another nn.Linear"),
        (with_default_rank, "pass them on"),
        (twice, "LoRA inside LoRA"),
        (random_b, "output moved"),
        (unfrozen, "LoRALinear had frozen it"),
    ],
)
def test_wrong_injections_are_diagnosed(capsys, answer, message):
    out = said(capsys, exercises.inject, answer)
    assert out.startswith("Not right yet") and message in out


# --- freezing ------------------------------------------------------------------------------------


def by_type(model, modules_to_save):
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            module.lora_A.requires_grad = module.lora_B.requires_grad = True
        if any(_matches(path, name) for name in modules_to_save):
            module.requires_grad_(True)


def by_parameter_name(model, modules_to_save):
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        saved = any(f".{path}.".find(f".{m}.") >= 0 for m in modules_to_save)
        parameter.requires_grad_(last in ("lora_A", "lora_B") or saved)


def freeze_by_the_library(model, modules_to_save):
    freeze_non_lora_params(model)


@pytest.mark.parametrize("answer", [by_type, by_parameter_name, freeze_by_the_library])
def test_right_freezes(capsys, answer):
    assert said(capsys, exercises.freeze, answer).startswith("Right.")


def trains_if(wanted):
    """An answer that sets every parameter by `wanted(name, modules_to_save)`."""

    def answer(model, modules_to_save):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted(name, modules_to_save))

    return answer


def factor(name):
    return name.endswith(("lora_A", "lora_B"))


def only_switches_off(model, modules_to_save):
    for name, parameter in model.named_parameters():
        if not factor(name) and not any(f"{m}." in name[:5] for m in modules_to_save):
            parameter.requires_grad_(False)


def zeroes(model, modules_to_save):
    by_type(model, modules_to_save)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            parameter.data.zero_()


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda model, saved: None, "nothing was frozen"),
        (lambda model, saved: model.requires_grad_(False), "nothing trains now"),
        (trains_if(lambda n, saved: n.startswith("head.")), "factors are frozen"),
        (trains_if(lambda n, saved: n.endswith("lora_B") or n.startswith("head.")), "both factors"),
        (trains_if(lambda n, saved: factor(n) or "original" in n), "wrapped weight"),
        (trains_if(lambda n, saved: factor(n) or any(s in n for s in saved)), '"subhead" trains'),
        (trains_if(lambda n, saved: "lora" in n or n.startswith("head.")), '"flora" trains'),
        (trains_if(lambda n, saved: factor(n) or "norm" in n), "still trains"),
        (trains_if(lambda n, saved: factor(n)), "named in modules_to_save, is frozen"),
        (trains_if(lambda n, saved: factor(n) or n == "head.weight"), "head.bias is frozen"),
        (trains_if(lambda n, saved: factor(n) or n.startswith("head.")), "was empty"),
        (only_switches_off, "as after load_adapter"),
        (zeroes, "another value"),
    ],
)
def test_wrong_freezes_are_diagnosed(capsys, answer, message):
    out = said(capsys, exercises.freeze, answer)
    assert out.startswith("Not right yet") and message in out


# --- questions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, right, fragments",
    [
        ("target_match", "c", {"a": "after a dot", "b": "searched for", "d": "is enough"}),
        ("frozen_head", "b", {"a": "too little", "c": "at random", "d": "every head"}),
    ],
)
def test_questions_name_the_misconception(capsys, name, right, fragments):
    question = getattr(exercises, name)
    assert "Right." in said(capsys, question, right)
    for letter, fragment in fragments.items():
        out = said(capsys, question, letter)
        assert "Not right yet" in out and fragment in out
