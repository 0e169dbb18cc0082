"""Every exercise: each of its mistakes gets its own message, and right answers pass."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_course.exercises import checker, everything, ex02
from lora_course.exercises.checker import Exercise, read_words
from lora_course.exercises.choices import Choice
from lora_course.tiny_lora import TinyLoRA
from lora_lib import LoRALinear
from lora_lib.targets import is_named

EXERCISES = {exercise.name: exercise for exercise in everything()}
CODING = {name: e for name, e in EXERCISES.items() if isinstance(e, Exercise)}
CHOICES = {name: e for name, e in EXERCISES.items() if isinstance(e, Choice)}
SEEDS = range(2)

every_coding = pytest.mark.parametrize("name", CODING)
every_choice = pytest.mark.parametrize("name", CHOICES)


@pytest.fixture(autouse=True)
def as_a_learner(monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)


@pytest.fixture
def said(capsys, monkeypatch):
    """What the exercise says to an answer, with the numbers of a seed."""

    def ask(name: str, answer, seed: int = 0) -> str:
        monkeypatch.setattr(checker, "new_seed", lambda: seed)
        EXERCISES[name](answer)
        return capsys.readouterr().out

    return ask


# --- the data of each exercise -------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@every_coding
def test_every_mistake_gets_its_message_and_the_reference_is_right(said, name, seed):
    assert said(name, CODING[name].reference, seed) == f"Right. {CODING[name].why}\n"
    for message, wrong in CODING[name].mistakes.items():
        assert said(name, wrong, seed).startswith(f"Not right yet: {message}"), message


@every_coding
def test_an_exercise_has_enough_to_say(name):
    hints = CODING[name].words["hints"]
    assert len(CODING[name].mistakes) >= 6
    assert len(hints) == len(set(hints)) >= 3
    assert 20 < len(CODING[name].why) < 200


def test_every_check_has_its_words_and_no_words_are_left_over():
    assert list(read_words("exercises.toml")) == list(EXERCISES)


def stub(*arguments):
    raise NotImplementedError


@every_coding
@pytest.mark.parametrize("answer", [None, stub, lambda *_: None], ids=["None", "stub", "pass"])
def test_what_was_not_begun_is_not_attempted(said, name, answer):
    assert said(name, answer).startswith("Not attempted yet.")


JUNK = [float("nan"), "words", True, [], {"a": 1}, (1, 2), object(), np.ones(3), torch.eye(4),
        nn.Linear(2, 2), (torch.zeros(2), torch.zeros(2)), len]  # fmt: skip


@every_coding
def test_whatever_is_returned_is_answered_without_blaming_the_learners_code(said, name):
    for junk in JUNK:
        out = said(name, lambda *_, junk=junk: junk)
        assert out.startswith(("Not right yet", "Not attempted")), (junk, out)
        assert "your code raised" not in out, (junk, out)


@every_coding
@pytest.mark.parametrize("answer", [3, "words", torch.zeros(2), lambda: None])
def test_what_is_no_fitting_function_is_answered(said, name, answer):
    assert said(name, answer).startswith("Not right yet")


# --- right answers written in another way; wrong ones that were once taken for right --------------


def k90_by_loop(values):
    total, held = sum(v * v for v in values.tolist()), 0.0
    for k, value in enumerate(values.tolist(), start=1):
        held += value**2
        if held >= 0.9 * total:
            return k


def k90_by_search(values):
    energy = values.square().cumsum(0) / values.square().sum()
    return torch.searchsorted(energy, torch.tensor(0.9, dtype=torch.float64)) + 1


def forward_in_functions(x, weight, A, B, alpha):
    return F.linear(x, weight) + F.linear(F.linear(x, A) * (alpha / len(A)), B)


def forward_by_einsum(x, weight, A, B, alpha):
    small = torch.einsum("...i,ri->...r", x, A)
    return x @ weight.T + torch.einsum("...r,or->...o", small, B) * alpha / B.shape[1]


def initialise_as_the_library(d_out, d_in, rank):
    layer = LoRALinear(nn.Linear(d_in, d_out), rank)
    return layer.lora_A, layer.lora_B


def initialise_as_the_lesson(d_out, d_in, rank):
    return [nn.Parameter(0.01 * torch.randn(rank, d_in)), nn.Parameter(torch.zeros(d_out, rank))]


class TinyInFunctions(nn.Module):
    def __init__(self, original, rank=8, alpha=16.0):
        super().__init__()
        self.original, self.scaling = original, torch.tensor(alpha / rank)
        for parameter in original.parameters():
            parameter.requires_grad = False
        d_out, d_in = original.weight.shape
        self.register_parameter("lora_A", nn.Parameter(torch.empty(rank, d_in)))
        self.register_parameter("lora_B", nn.Parameter(torch.empty(d_out, rank)))
        nn.init.normal_(self.lora_A, std=0.01)
        nn.init.zeros_(self.lora_B)

    def forward(self, x):
        return F.linear(F.linear(x * self.scaling, self.lora_A), self.lora_B) + self.original(x)


class TinyByEinsum(TinyLoRA):
    def forward(self, x):
        small = torch.einsum("...i,ri->...r", x, self.lora_A)
        return self.original(x) + torch.einsum("...r,or->...o", small, self.lora_B) * self.scaling


def inject_by_parents(model, target, rank, alpha):
    wanted = target.split(".")
    for parent_path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            pieces = [*parent_path.split("."), name]
            if isinstance(child, nn.Linear) and pieces[-len(wanted) :] == wanted:
                setattr(parent, name, LoRALinear(child, rank=rank, alpha=alpha))
    return model


def inject_and_freeze(model, target, rank, alpha):
    return inject_by_parents(model.requires_grad_(False), target, rank, alpha)


def freeze_by_type(model, saved):
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if isinstance(module, TinyLoRA):
            module.lora_A.requires_grad = module.lora_B.requires_grad = True
        if is_named(path, saved):
            module.requires_grad_(True)


def freeze_by_parameter(model, saved):
    for name, parameter in model.named_parameters():
        path, _, last = name.rpartition(".")
        kept = any(f".{path}.".find(f".{module}.") >= 0 for module in saved)
        parameter.requires_grad_(last in ("lora_A", "lora_B") or kept)


def step_with_an_optimizer(model, compute_loss, lr):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr)
    optimizer.zero_grad()
    compute_loss().backward()
    optimizer.step()


def step_without_backward(model, compute_loss, lr):
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    gradients = torch.autograd.grad(compute_loss(), factors)
    for parameter, gradient in zip(factors, gradients, strict=True):
        parameter.data.sub_(lr * gradient)


def merge_by_einsum(W, A, B, alpha):
    total = W.clone()
    total += torch.einsum("or,ri->oi", B, A).mul(alpha).div(B.shape[1])
    return total


def merge_in_float64(W, A, B, alpha):
    return W.double() + alpha / len(A) * B.double() @ A.double()


def rate_by_loop(rows):
    best, rate = float("inf"), None
    for row in rows:
        if row["validation"]["bits"] < best:  # false for nan
            best, rate = row["validation"]["bits"], row["lr"]
    return rate


def rate_by_sorting(rows):
    scored = [(r["validation"]["bits"], r["lr"]) for r in rows if r["validation"]["bits"] < 1e9]
    return np.float64(sorted(scored)[0][1])


RIGHT = {
    "01 k90": [k90_by_loop, k90_by_search, lambda values: float(k90_by_loop(values))],
    "02 forward": [forward_in_functions, forward_by_einsum],
    "02 initialise": [initialise_as_the_library, initialise_as_the_lesson],
    "02 tiny_lora": [TinyInFunctions, TinyByEinsum],
    "03 inject": [inject_by_parents, inject_and_freeze],
    "03 freeze": [freeze_by_type, freeze_by_parameter],
    "04 step": [step_with_an_optimizer, step_without_backward],
    "05 merge": [merge_by_einsum, merge_in_float64],
    "06 lora_parameters": [
        lambda shapes, rank: sum(rank * sum(shape) for shape in shapes),
        lambda shapes, rank: torch.tensor(shapes).sum() * rank,
    ],
    "06 choose_rate": [rate_by_loop, rate_by_sorting],
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name, answer", [(n, a) for n, group in RIGHT.items() for a in group])
def test_a_right_answer_passes_however_it_is_written(said, name, answer, seed):
    assert said(name, answer, seed).startswith("Right.")


def forward_with_b_a(x, weight, A, B, alpha):
    return x @ weight.T + alpha / len(A) * x @ (B @ A).T


def forward_in_numpy(x, weight, A, B, alpha):
    return ex02.forward_with()(x, weight, A, B, alpha).detach().numpy()


def initialise_with_whole_b(d_out, d_in, rank):
    return torch.randn(rank, d_in) / math.sqrt(d_in), torch.zeros(d_out, rank, dtype=torch.int64)


class TinyWithoutReturn(TinyLoRA):
    def forward(self, x):
        self.original(x)


class TinyOfACopy(TinyLoRA):
    def __init__(self, original, rank=8, alpha=16.0):
        super().__init__(copy.deepcopy(original), rank, alpha)


class TinyWithOtherNames(nn.Module):
    def __init__(self, original, rank=8, alpha=16.0):
        super().__init__()
        self.original = original.requires_grad_(False)
        self.A = nn.Parameter(0.01 * torch.randn(rank, original.in_features))
        self.B = nn.Parameter(torch.zeros(original.out_features, rank))


def inject_and_spoil(model, target, rank, alpha):
    model.head.weight.data += 1
    return inject_by_parents(model, target, rank, alpha)


def freeze_and_delete(model, saved):
    freeze_by_type(model, saved)
    del model.head


def step_of(make_optimizer, chosen="lora_"):
    def step(model, compute_loss, lr):
        parameters = [p for name, p in model.named_parameters() if chosen in name]
        optimizer = make_optimizer(parameters, lr)
        optimizer.zero_grad()
        compute_loss().backward()
        optimizer.step()

    return step


def step_into_new_tensors(model, compute_loss, lr):
    compute_loss().backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter = parameter - lr * parameter.grad


WRONG = [
    ("01 k90", lambda values: (k90_by_loop(values),), ", and (16"),
    ("01 k90", lambda values: values.mul_(0) is None or 3, "changed values, which it was given"),
    ("02 forward", forward_with_b_a, "a matrix as large as W"),
    ("02 forward", forward_in_numpy, "and a numpy array of shape (4, 5, 7) came"),
    ("02 initialise", initialise_with_whole_b, "expected [True, True], and [True, False] came"),
    ("02 initialise", lambda o, i, r: (0.0, 0.0), "expected 'two tensors', and (0.0, 0.0) came"),
    (
        "02 forward",
        lambda x, W, A, B, alpha: ex02.forward_with()(x, W + 0, A, B, alpha),
        "a copy",
    ),
    ("02 tiny_lora", TinyWithoutReturn, "the output at the start: expected"),
    ("02 tiny_lora", TinyOfACopy, "the layer it was given: expected True, and False came"),
    ("02 tiny_lora", TinyWithOtherNames, "'lora_A', 'lora_B'"),
    ("03 inject", inject_and_spoil, "the output at the start: expected 'as before', and 'moved'"),
    ("04 step", step_of(torch.optim.Adam), "as with Adam"),
    ("04 step", step_of(torch.optim.AdamW), "the first step, divided by lr: the shape (40,) is"),
    ("04 step", step_of(torch.optim.SGD, chosen=""), "what is not wrapped moved as well"),
    ("04 step", step_into_new_tensors, "no parameter moved"),
    ("03 freeze", freeze_and_delete, "names of the parameters: missing: head.bias"),
    ("05 merge", lambda W, A, B, alpha: (W + B @ A).numpy(), "a numpy array of shape (12, 12)"),
    ("06 choose_rate", lambda rows: rows.sort(key=str) or 0.1, "changed results, which it was"),
    ("06 choose_rate", lambda rows: 0.123, "and 0.123 came"),
    ("06 lora_parameters", lambda shapes, rank: "many", "and 'many' came"),
]


@pytest.mark.parametrize("name, answer, words", WRONG)
def test_a_wrong_answer_that_is_no_mistake_of_the_list_is_told_what_came(said, name, answer, words):
    out = said(name, answer)
    assert out.startswith("Not right yet: ") and words in out


def test_the_page_goes_on_with_the_learners_class_only_where_it_is_right(capsys):
    class WithoutForward(TinyLoRA):
        def forward(self, x):
            raise NotImplementedError

    for unfinished in (None, WithoutForward, ex02.with_plain_tensors, TinyLoRA):
        assert ex02.yours_or_complete(unfinished) is TinyLoRA
        assert capsys.readouterr().out == "The page goes on with a complete TinyLoRA.\n"
    assert ex02.yours_or_complete(TinyByEinsum) is TinyByEinsum
    assert capsys.readouterr().out == "The page goes on with your class.\n"


# --- questions -----------------------------------------------------------------------------------


@every_choice
def test_every_letter_gets_its_own_reply(said, name):
    words = CHOICES[name].words
    assert list(words["options"]) == list(words["because"]) == list("abcd")
    replies = words["because"] | {words["right"]: CHOICES[name].why}
    for letter, reply in replies.items():
        verdict = "Right." if letter == words["right"] else "Not right yet:"
        assert said(name, letter).splitlines()[-1] == f"{verdict} {reply}"
    assert len(set(replies.values())) == 4
    assert len(words["hints"][0]) > 20


def test_the_right_letters_do_not_give_themselves_away():
    words = [choice.words for choice in CHOICES.values()]
    letters = [w["right"] for w in words]
    longest = [max(w["options"].values(), key=len) == w["options"][w["right"]] for w in words]
    assert max(letters.count(letter) for letter in "abcd") <= len(letters) / 2
    assert sum(longest) <= len(longest) / 2
