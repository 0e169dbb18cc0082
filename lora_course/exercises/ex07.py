"""Checks of notebook 07: five exercises, and what their results support."""

import copy
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_course.exercises.checker import Choice, Exercise, Wrong
from lora_lib.adapters import load_adapter, save_adapter
from lora_lib.lora import (
    LoRALinear,
    add_lora_to_model,
    count_parameters,
    lora_layers,
    merge_lora_weights,
)
from lora_lib.model import SmallTransformer
from lora_lib.pretrained import load_pretrained
from lora_lib.rank import k90, singular_values, weight_changes

# --- 1: other target modules ---------------------------------------------------------------------

LINEAR_NAMES = ("W_q", "W_k", "W_v", "W_o", "linear1", "linear2")


def _test_lora_on(learner) -> None:
    rank = random.choice((2, 3, 5, 7))
    model = _check_lora_on(learner, ("W_k", "W_o"), rank)
    second = _check_lora_on(learner, tuple(random.sample(LINEAR_NAMES, 3)), rank + 1)
    if second is model:
        raise Wrong("two calls returned one and the same model; take a fresh base inside")


def _check_lora_on(learner, names: tuple[str, ...], rank: int) -> nn.Module:
    try:
        result = learner(names, rank)
    except ValueError as error:
        if "has LoRA layers already" in str(error):
            raise Wrong(
                "the model has the LoRA layers of an earlier call: take a fresh base inside the "
                "function, with load_pretrained()"
            ) from None
        raise
    if result is None:
        raise NotImplementedError
    pair = isinstance(result, tuple | list) and len(result) == 2
    if not (pair and isinstance(result[0], nn.Module)):
        raise Wrong("return two things, the model and its number of trainable parameters")
    model, count = result
    layers = {p: m for p, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise Wrong("the model you returned has no LoRA layers")
    found = {path.rpartition(".")[2] for path in layers}
    if found != set(names):
        more = " (the default targets: names was not passed on)" if found == {"W_q", "W_v"} else ""
        raise Wrong(f"asked for {sorted(names)}, LoRA sits on {sorted(found)}{more}")
    ranks = {layer.rank for layer in layers.values()}
    if ranks != {rank}:
        raise Wrong(f"asked for rank {rank}, found {sorted(ranks)}; pass rank on")
    scaling = next(iter(layers.values())).scaling
    if abs(scaling - 2) > 1e-6:
        raise Wrong(
            f"alpha / rank is {scaling:.3g} and should be 2: alpha has to be computed from the "
            "rank, or two ranks differ in step size too"
        )
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    loose = [n for n in trainable if not n.endswith((".lora_A", ".lora_B"))]
    if loose:
        raise Wrong(f"{loose[0]} still trains, so this is not LoRA alone; freeze the base")
    if len(trainable) != 2 * len(layers):
        raise Wrong("some LoRA factors do not require a gradient, so they cannot be trained")
    expected = sum(rank * sum(layer.weight.shape) for layer in layers.values())
    if count == count_parameters(model):
        raise Wrong("you counted every parameter; count those with requires_grad only")
    if count != expected:
        raise Wrong(f"the factors hold {expected:,} parameters, you returned {count!r}")
    base, tokenizer = load_pretrained()
    prompt = torch.tensor([tokenizer.prompt("Hrazdan")])
    with torch.inference_mode():
        same = torch.allclose(model.cpu().eval()(prompt), base(prompt), atol=1e-4)
    if not same:
        raise Wrong("untrained LoRA changes nothing, but this model does not answer as the base")
    return model


lora_on = Exercise(
    "07 lora_on",
    _test_lora_on,
    contract="lora_on(names, rank) returns the model and a whole number.",
    why="The choice of targets is one argument; what it is worth is a measurement.",
    hints=[
        "Three steps: a fresh base, LoRA on the named layers, everything else frozen.",
        "add_lora_to_model(model, rank, alpha, names), with alpha = 2 * rank, changes the model in "
        "place.",
        "After freeze_non_lora_params(model), count_parameters(model, only_trainable=True).",
    ],
)

conclude_targets = Choice(
    "07 conclude_targets",
    question="Q and V against K and O: equal counts, one learning rate, one seed, a short "
    "training. Which conclusion does your result support?",
    options={
        "a": "Whichever pair ended with fewer errors is the better one for LoRA on such tasks.",
        "b": "Both pairs can learn this task; which is better stays open.",
        "c": "It does not matter which layers are adapted, as long as the counts are equal.",
        "d": "K and O learned because this model is small; in larger ones Q and V carry the task.",
    },
    right="b",
    why="One run shows that a choice works at all; a ranking needs several seeds and a learning "
    "rate tuned for each choice.",
    misconceptions={
        "a": "one seed, one rate and one task were measured, and each of them can turn the order; "
        "notebook 06 shows it.",
        "c": "the counts were equal in one comparison only; notebook 06 spends equal budgets on "
        "other layers, with other results.",
        "d": "no larger model was measured; Q and V are the paper's habit, not a law.",
    },
)


# --- 2: an equal budget --------------------------------------------------------------------------


def _test_rank_for_budget(learner) -> None:
    for round_number in range(4):
        d = 8 * random.randint(1, 5)
        model = SmallTransformer(random.randint(20, 60), d, 4, random.randint(2, 3), 5)
        names = tuple(random.sample(LINEAR_NAMES, random.randint(2, 4)))
        if round_number == 0:
            names = ("W_q", "linear1")
        cost = _check_rank_for_budget(learner, model, names, exact=round_number == 1)
    _check_lookalikes(learner)
    try:
        answer = learner(model, names, cost - 1)
    except ValueError:
        return
    raise Wrong(f"a budget below rank 1 must raise ValueError; your function returned {answer}")


def _check_rank_for_budget(learner, model: nn.Module, names: tuple, exact: bool) -> int:
    """Compare one answer with the right one; returns what rank 1 costs."""
    shapes = [
        tuple(m.weight.shape)
        for p, m in model.named_modules()
        if isinstance(m, nn.Linear) and p.rpartition(".")[2] in names
    ]
    one = sum(d_out + d_in for d_out, d_in in shapes)  # parameters of rank 1
    rank = random.randint(3, 20)
    budget = rank * one if exact else rank * one + one - random.randint(1, one // 4)
    before = _facts(model)
    try:
        answer = learner(model, names, budget)
    except ZeroDivisionError:
        raise Wrong(
            "no layer matched, so rank 1 costs 0: a path such as blocks.0.attention.W_q is longer "
            'than a name; compare its last piece, path.split(".")[-1]'
        ) from None
    except ValueError as error:
        raise Wrong(
            f"rank {rank} fits the budget of {budget:,}, and your function raises ValueError "
            f"({error}). Perhaps your cost of rank 1 is too high: d_out · d_in, weight.numel(), "
            "counts the full weights; the factors hold r · (d_out + d_in)"
        ) from None
    if answer is None:
        raise NotImplementedError
    if _facts(model) != before:
        raise Wrong("your function changed the model it was given; work on its shapes or a copy")
    if answer == rank:
        return one
    if answer == rank + 1:
        raise Wrong(
            f"rank {answer} takes {answer * one:,} parameters, over the budget of {budget:,}: "
            "round down"
        )
    if exact and answer == rank - 1:
        raise Wrong(f"rank {rank} takes {rank * one:,}, exactly the budget; it still fits")
    if answer == budget // sum(shapes[0]):
        raise Wrong("you counted one layer; every layer with a matching name gets factors")
    if answer == budget // sum(d_out * d_in for d_out, d_in in shapes):
        raise Wrong(
            "d_out · d_in, weight.numel(), counts the full weights; the factors hold "
            "r · (d_out + d_in)"
        )
    raise Wrong(f"for {names} and {budget:,} parameters the rank is {rank}, not {answer!r}")


def _check_lookalikes(learner) -> None:
    """A model in which only the last piece of a path, and the type, tell which layers count."""
    d = 8 * random.randint(2, 5)
    layer = nn.ModuleDict({name: nn.Linear(d, d, bias=False) for name in ("W_q", "W_k", "old_W_q")})
    inside = nn.ModuleDict({"inner": nn.Linear(d, d, bias=False)})
    model = nn.ModuleDict({"layer": layer, "other": nn.ModuleDict({"W_q": inside})})
    rank, cost = random.randint(8, 20), 2 * d  # of one layer, at rank 1
    try:
        answer = learner(model, ("W_q",), rank * cost)
    except (AttributeError, TypeError):  # none on the models before, whose W_q are all linear
        raise Wrong(
            "a module called W_q need not be an nn.Linear; only nn.Linear counts: ask "
            "isinstance(module, nn.Linear)"
        ) from None
    last_piece = 'compare the last piece of the path, path.split(".")[-1]'
    if answer == rank // 2:
        raise Wrong(f"old_W_q only ends like W_q and is another name; {last_piece}")
    if answer == rank // 3:
        raise Wrong(f"old_W_q and W_q.inner have W_q in their paths, not as name; {last_piece}")
    if answer != rank:
        raise Wrong(
            f"beside layer.W_q the model has old_W_q and W_q.inner, which are not called W_q; the "
            f"rank is {rank}, not {answer!r}; {last_piece}"
        )


def _facts(model: nn.Module) -> list:
    modules = [(path, type(module)) for path, module in model.named_modules()]
    return modules + [(name, p.requires_grad) for name, p in model.named_parameters()]


rank_for_budget = Exercise(
    "07 rank_for_budget",
    _test_rank_for_budget,
    contract="rank_for_budget(model, names, budget) returns a whole number, or raises ValueError.",
    why="Targets can now be compared at one price, so what differs is where the rank is spent.",
    hints=[
        "How many parameters does rank 1 take? Rank r takes r times that.",
        'Look at named_modules() for nn.Linear where path.split(".")[-1] is one of the names; a '
        "layer costs d_out + d_in.",
        "budget // cost, and ValueError if that is 0.",
    ],
)

conclude_budget = Choice(
    "07 conclude_budget",
    question="One budget, spent in four ways: at rank 8 on all layers, and at higher ranks on "
    "fewer of them. Which conclusion do the recorded results support?",
    options={
        "a": "A higher rank on fewer layers is the better use of a budget: rank is what learns.",
        "b": "Feed-forward layers matter more than attention, in this model and in others.",
        "c": "Here a budget does more over all layers than in W_q and W_v.",
        "d": "All layers win because they have more trainable parameters than the others.",
    },
    right="c",
    why="The price is equal and the result is not, so it matters where the rank is spent.",
    misconceptions={
        "a": "the highest rank stands on W_q and W_v, which came out last in the table.",
        "b": "their ranges just overlap, and only one task and one model were measured.",
        "d": "the counts are within three per cent of each other; that is what your function is "
        "for.",
    },
)


# --- 3: two tasks, two adapters ------------------------------------------------------------------


def _test_swap(learner) -> None:
    base = SmallTransformer(20, 16, 2, 2, 20, dropout=0.0, language_model=True).eval()
    model = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder:
        one = _random_adapter(base, Path(folder) / "one", 2, ("W_q", "W_v"))
        other = _random_adapter(base, Path(folder) / "other", 5, "all-linear")
        third = _random_adapter(base, Path(folder) / "third", 2, ("W_q", "W_v"))
        _check_swap(learner, base, model, one, "a plain model")
        _check_swap(learner, base, model, third, "an adapter of the same configuration on it")
        _check_swap(learner, base, model, other, "an adapter of another rank and targets on it")
        merge_lora_weights(model)
        _check_swap(learner, base, model, one, "a merged adapter on it")


def _random_adapter(base: nn.Module, directory: Path, rank: int, targets) -> Path:
    model, layers = add_lora_to_model(copy.deepcopy(base), rank, 4.0, targets)
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    return save_adapter(model, directory)


def _check_swap(learner, base, model, directory: Path, state: str) -> None:
    ids = torch.randint(5, 20, (3, 6))
    try:
        result = learner(model, directory)
    except ValueError as error:
        if "has no LoRA layers" in str(error):
            raise Wrong(
                "the model may be plain: there is nothing to take off on the first call, so ask "
                "whether it has LoRA layers"
            ) from None
        if "has LoRA layers" in str(error) or "unmerge" in str(error):
            said = str(error) if len(str(error)) < 150 else f"{str(error)[:150]} …"
            raise Wrong(
                f"with {state}, load_adapter refused: take off what is there first ({said})"
            ) from None
        if "does not fit this model" in str(error):
            raise Wrong(
                "the adapter does not fit the model it was put on: put the adapter on the model "
                "you were given, not on a new base"
            ) from None
        raise
    if result is None and not any(lora_layers(model)):
        raise NotImplementedError
    if result is None:
        raise Wrong("return the model")
    if result is not model:
        raise Wrong(
            "you returned another model, and one base in memory is the point of swapping: put the "
            "adapter on the model you were given, not on a new base or a copy"
        )
    _check_base_bits(base, model, state)
    with torch.inference_mode():
        written, plain = model.eval()(ids), base(ids)
        wanted = load_adapter(copy.deepcopy(base), directory)(ids)
    if torch.allclose(written, wanted, atol=1e-4):
        return
    if torch.allclose(written, plain, atol=1e-4):
        raise Wrong("the model answers as the bare base: the new adapter is not on it")
    raise Wrong(f"with {state}, the outputs are not those of the base with the new adapter alone")


def _check_base_bits(base: nn.Module, model: nn.Module, state: str) -> None:
    state_dict = {n.replace(".original.", "."): t for n, t in model.state_dict().items()}
    moved = {
        name: (state_dict[name] - tensor).abs().max().item()
        for name, tensor in base.state_dict().items()
        if not torch.equal(state_dict[name], tensor)
    }
    if not moved:
        return
    name, size = max(moved.items(), key=lambda item: item[1])
    if size < 1e-5:
        raise Wrong(
            f"with {state}, {name} is off by {size:.0e}: W + ΔW − ΔW is not W in floating point; "
            "put the kept weight back instead of subtracting"
        )
    raise Wrong(
        f"with {state}, the base weight {name} moved by {size:.2g}: an adapter was merged into it. "
        "unload_lora merges unless you say merge=False, and a swap merges nothing"
    )


swap = Exercise(
    "07 swap",
    _test_swap,
    contract="swap(model, directory) returns the model, with the new adapter on.",
    why="One base serves any number of tasks, and nothing of one task leaks into the next.",
    hints=[
        "Two steps: take off what is on the model, then load the new adapter.",
        "unload_lora(model, merge=False) puts the original weights back, also after a merge; it "
        "raises on a plain model.",
        "any(isinstance(m, LoRALinear) for m in model.modules()) says whether there is something "
        "to take off.",
    ],
)

conclude_swap = Choice(
    "07 conclude_swap",
    question="You wrote towns in two scripts with one base and found its weights unchanged bit for "
    "bit. Which conclusion does this support?",
    options={
        "a": "Both adapters can be on at once, one added to the other, without harm to either.",
        "b": "Adapters make full fine-tuning unnecessary, as swapping loses no quality.",
        "c": "Training two adapters takes as long as training one, since they share the base.",
        "d": "Another task costs an adapter's memory, and harms no task before it.",
    },
    right="d",
    why="Each adapter is loaded onto the same untouched base, so tasks stay apart.",
    misconceptions={
        "a": "you had one adapter on at a time; the sum of two is a third model, not measured.",
        "b": "swapping says nothing about quality; in the recorded results full fine-tuning stays "
        "ahead.",
        "c": "each adapter was trained in a run of its own.",
    },
)


# --- 4: SVD of the merged change -----------------------------------------------------------------


def _test_change_ranks(learner) -> None:
    before = nn.ModuleDict(
        {
            "first": nn.Linear(40, 56),
            "same": nn.Linear(30, 30),
            "last": nn.Linear(64, 32),
            "tiny": nn.Linear(24, 24),
        }
    )
    with torch.no_grad():
        before["tiny"].weight.mul_(1024).round_().div_(1024)  # so that the change below is exact
    after = copy.deepcopy(before)
    with torch.no_grad():
        after["tiny"].weight += torch.tensor([1.0, -1.0]).repeat(12) * 2.0**-14
        after["same"].bias += 1.0
        for name in ("first", "last"):
            after[name].weight += _planted(*after[name].weight.shape, decay=0.8, rank=24)
    answer = _ask_for_ranks(learner, copy.deepcopy(before), copy.deepcopy(after))
    changes = {
        path: change for path, change in weight_changes(before, after).items() if change.any()
    }
    spectra = {path: singular_values(change) for path, change in changes.items()}
    right = {name: k90(values) for name, values in spectra.items()}
    of_weight = {n: k90(singular_values(after[n].weight)) for n in spectra}
    if {n: answer.get(n) for n in spectra} == of_weight:
        raise Wrong("you measured the weight after training; the question is its change")
    if any(str(key).endswith((".weight", ".bias")) for key in answer):
        raise Wrong('keys are paths of layers such as "first", not names of parameters')
    if "same" in answer:
        raise Wrong('the weight of "same" did not change (its bias did), so leave it out')
    if right.keys() - answer.keys() == {"tiny"}:
        raise Wrong(
            'the weight of "tiny" did change, by little and with a sum of zero; ask change.any()'
        )
    if answer.keys() != right.keys():
        raise Wrong(f"the changed layers are {sorted(right)}; your keys are {[*answer]}")
    answer = {name: float(value) for name, value in answer.items()}
    if answer == right:
        return
    of_sigma = {n: k90(values.sqrt()) for n, values in spectra.items()}
    if answer == {n: k90(change) for n, change in changes.items()}:
        raise Wrong("k90 takes singular values, not a matrix: k90(singular_values(change))")
    if answer == of_sigma:
        raise Wrong("you add up σ; energy is σ², so square the singular values")
    if answer == {n: k - 1 for n, k in right.items()}:
        raise Wrong("one too few: the value that crosses 90 % counts too")
    if all(answer[n] >= 24 for n in ("first", "last")):
        raise Wrong(
            "you counted all directions that are not zero; k90 counts those that hold 90 % of the "
            "energy"
        )
    raise Wrong(f"the answer is {right}, and you returned {answer}")


def _ask_for_ranks(learner, before: nn.Module, after: nn.Module) -> dict:
    try:
        answer = learner(before, after)
    except ValueError as error:
        if "every singular value is zero" in str(error):
            raise Wrong(
                "one layer did not change, and k90 of nothing is undefined; leave it out"
            ) from None
        raise
    if answer is None:
        raise NotImplementedError
    if not isinstance(answer, dict):
        raise Wrong(f"return a dict from path to k90; you returned a {type(answer).__name__}")
    return answer


def _planted(d_out: int, d_in: int, decay: float, rank: int) -> Tensor:
    """A (d_out, d_in) matrix whose singular values are 1, decay, decay², …: `rank` of them."""
    u = torch.linalg.qr(torch.randn(d_out, rank)).Q
    v = torch.linalg.qr(torch.randn(d_in, rank)).Q
    return u * decay ** torch.arange(rank) @ v.T


change_ranks = Exercise(
    "07 change_ranks",
    _test_change_ranks,
    contract="change_ranks(before, after) returns a dict from a layer's path to a whole number.",
    why="You can now ask any pair of checkpoints how many directions training used.",
    hints=[
        "weight_changes, singular_values and k90 of lora_lib.rank do most of it; "
        "`from lora_lib import analysis; help(analysis)` shows them.",
        "weight_changes(before, after) is a dict from path to change; skip a change without any "
        "non-zero entry.",
        "k90(singular_values(change)) for each of the others, in a dict with the same paths.",
    ],
)

conclude_ranks = Choice(
    "07 conclude_ranks",
    question="Merged adapter: k90 of every change at most 8. Full fine-tuning: k90 of attention "
    "changes between noise and 8. On unseen towns the exact matches stand close. Which conclusion "
    "do these results support?",
    options={
        "a": "A rank of 8 can suffice without being what full fine-tuning finds.",
        "b": "Training the adapter discovered that this task has a rank of 8 at most.",
        "c": "Full fine-tuning's change is noise beyond its first 8 directions; cut them off.",
        "d": "LoRA cannot come near full fine-tuning, since the ranks differ so much.",
    },
    right="a",
    why="The adapter's change has a low rank by construction, full fine-tuning's has not, and yet "
    "they do nearly the same.",
    misconceptions={
        "b": "B·A has rank 8 at most, whatever the data; you found what was put in.",
        "c": "its k90 lies well below that of noise of the same shape; and cut to rank 8 it wrote "
        "far fewer towns right, as the table before the exercises says.",
        "d": "the exact matches stand close while the ranks do not: two different changes can do "
        "nearly the same.",
    },
)


# --- 5: a quantised base -------------------------------------------------------------------------


def _test_quantise(learner) -> None:
    for bits in (8, 4, random.choice((3, 5, 6))):
        d_out, d_in = random.randint(20, 30), random.randint(40, 60)
        weight = torch.randn(d_out, d_in) * 10 ** torch.linspace(-2, 1, d_out)[:, None]
        weight[3] = 0
        _check_quantise(learner, weight, bits)


def _check_quantise(learner, weight: Tensor, bits: int) -> None:
    given = weight.clone()
    try:
        result = learner(given, bits)
    except RuntimeError as error:
        if "must match the size" in str(error):
            raise Wrong(
                "weight and scales do not go together: one scale a row has shape (d_out, 1); "
                "amax(dim=1, keepdim=True) keeps that dimension"
            ) from None
        raise
    if result is None:
        raise NotImplementedError
    if not torch.equal(given, weight):
        raise Wrong("your function changed the weight it was given")
    pair = isinstance(result, tuple | list) and len(result) == 2
    if not (pair and all(isinstance(tensor, Tensor) for tensor in result)):
        raise Wrong("return two tensors, integers and scales")
    integers, scales = result
    if integers.is_floating_point():
        raise Wrong(
            f"the integers have dtype {integers.dtype}, which saves no memory; use torch.int8"
        )
    if integers.dtype != torch.int8 or integers.shape != weight.shape:
        raise Wrong(
            f"the integers should be int8 of shape {tuple(weight.shape)}; you returned "
            f"{integers.dtype}, {tuple(integers.shape)}"
        )
    if scales.numel() == 1:
        raise Wrong("one scale for all: the row with the largest weights spoils every other row")
    if scales.numel() == weight.shape[1]:
        raise Wrong("one scale per input channel, a column of W; an output channel is a row")
    if scales.shape != (len(weight), 1):
        raise Wrong(
            f"scales should have shape {(len(weight), 1)}, so that integers * scales works; yours "
            f"is {tuple(scales.shape)} (keepdim=True helps)"
        )
    _check_scales(weight, scales, 2 ** (bits - 1) - 1)
    _check_restored(weight, integers, scales, bits)


def _check_scales(weight: Tensor, scales: Tensor, top: int) -> None:
    used = weight.any(dim=1)
    largest, size = (t[used].amax(dim=1, keepdim=True) for t in (weight, weight.abs()))
    found = scales[used].to(weight.dtype)
    if torch.allclose(found, top / size, rtol=1e-3, atol=0):
        raise Wrong("integers * scales must give the weight back; is your scale the inverse?")
    if torch.allclose(found, largest / top, rtol=1e-3, atol=0) and not largest.equal(size):
        raise Wrong(
            "a row's largest weight can be negative: is the scale taken from the largest size, "
            "weight.abs()?"
        )
    if scales.isinf().any():
        raise Wrong("a row of zeros needs a finite, positive scale; yours is inf")
    if not (scales > 0).all():  # also if it is NaN
        raise Wrong("a row of zeros gives 0 / 0; a scale must be positive there too")


def _check_restored(weight: Tensor, integers: Tensor, scales: Tensor, bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    step = (weight.abs().amax(dim=1, keepdim=True) / top).clamp_min(1e-12)
    error = ((integers * scales - weight).abs() / step).max().item()
    used = integers.int().abs().max().item()
    if not error <= 0.51:  # also if it is NaN
        for name, cut in (("floor", torch.floor), ("trunc", torch.trunc)):
            if torch.equal(integers, cut(weight / scales).to(torch.int8)):
                raise Wrong(
                    f"an entry is off by a whole step, as {name} does: round, do not cut off"
                )
    if error > 2 * top - 2:
        raise Wrong(
            f"the largest weight of a row came back with the wrong sign or size: at {bits} bits "
            f"the integers must stay within ±{top}, or they wrap round; is your top "
            "2**(bits − 1) − 1?"
        )
    if used > top:
        raise Wrong(
            f"an integer is {used} in size; {bits} bits hold at most ±{top}, which is "
            "2**(bits − 1) − 1"
        )
    if not error <= 0.51:
        raise Wrong(
            f"an entry is off by {error:.1f} steps of max / {top}; half a step is possible. Look "
            f"at the scale: is it a row's largest size over {top}?"
        )


quantise = Exercise(
    "07 quantise",
    _test_quantise,
    contract="quantise(weight, bits) returns two tensors, integers and scales.",
    why="A base can be kept in a quarter of its bytes or fewer, and each row has its own step.",
    hints=[
        "bits give integers from −top to top with top = 2**(bits − 1) − 1; a row's scale is its "
        "largest size over top.",
        "weight.abs().amax(dim=1, keepdim=True) / top has shape (d_out, 1).",
        "(weight / scale).round().to(torch.int8), with a scale of 1 where the row is all zero.",
    ],
)

conclude_quantise = Choice(
    "07 conclude_quantise",
    question="The Georgian adapter, trained on the float32 base, on a base of 8, 4 and 2 bits. "
    "Which conclusion do your results support?",
    options={
        "a": "Fewer bits are always free, since the float32 adapter repairs what the base loses.",
        "b": "The adapter was quantised, which is why the file of an adapter is so small.",
        "c": "8 and 4 bits cost little beside what they save; 2 bits cost too much.",
        "d": "A quantised base trains faster, since integers are multiplied faster than floats.",
    },
    right="c",
    why="How many bits a base can lose is a measurement, for each model and each scheme.",
    misconceptions={
        "a": "at 2 bits no town is right; the adapter was not made for that base.",
        "b": "the base was quantised; the factors stayed float32.",
        "d": "speed was not measured, and the weights are turned back into floats to multiply.",
    },
)
