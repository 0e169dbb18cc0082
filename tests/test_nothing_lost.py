"""What was trained is in the file, and what stays behind is said; nothing that is refused, or fails
half-way, changes a model or a file."""

import copy
import io
import math
import multiprocessing
import os
import re
import sys
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from safetensors import safe_open
from tiny_models import fill, nested, same, seeded, small, with_lora
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_lib import (
    adapter_disabled,
    add_lora_to_model,
    freeze_non_lora_params,
    load_adapter,
    lora_layers,
    merge_lora_weights,
    save_adapter,
    unload_lora,
    unmerge_lora_weights,
)
from lora_lib.adapters import CONFIG_FILE, WEIGHTS_FILE
from lora_lib.files import write_atomically


@pytest.fixture
def adapted():
    return with_lora(small(), modules_to_save=["classifier"])


# --- what is not in the file ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "unfreeze, words",
    [
        (lambda m: None, None),
        (lambda m: m.requires_grad_(), r"\['token_embedding.weight'.*call freeze_non_lora_params"),
        (lambda m: m.blocks[0].norm1.weight.requires_grad_(), r"norm1.weight'\] \(1 in all\)"),
    ],
)
def test_what_trains_and_is_not_saved_is_named(adapted, recwarn, tmp_path, unfreeze, words):
    unfreeze(adapted)
    save_adapter(adapted, tmp_path)
    messages = [str(warning.message) for warning in recwarn.list]
    assert len(messages) == (words is not None)
    assert not words or re.search(words, messages[0])


@pytest.mark.parametrize(
    "norm, saved, warned",
    [
        (lambda: nn.BatchNorm1d(4), (), True),
        (lambda: nn.BatchNorm1d(4), ("1",), False),
        (lambda: nn.BatchNorm1d(4, track_running_stats=False), (), False),
        (lambda: nn.InstanceNorm1d(5, track_running_stats=True), (), True),
    ],
)
def test_running_statistics_that_moved_are_named(norm, saved, warned, recwarn, tmp_path):
    model = with_lora(nn.Sequential(nn.Linear(6, 4), norm()), ["0"], modules_to_save=saved)
    for training in (False, True):
        model.train(training)(torch.randn(5, 6))
        save_adapter(model, tmp_path)
        statistics = [w for w in recwarn.list if "running statistics of ['1']" in str(w.message)]
        assert bool(statistics) == (warned and training)


def test_a_merged_state_dict_loads_into_a_merged_model_alone(adapted):
    unmerged = copy.deepcopy(adapted)
    merged = merge_lora_weights(copy.deepcopy(adapted))
    state = merge_lora_weights(adapted).state_dict()
    with pytest.raises(RuntimeError, match="_weight_before_merge"):
        unmerged.load_state_dict(state)
    merged.load_state_dict(state)


def test_tensors_that_are_not_contiguous_are_saved(adapted, tmp_path):
    adapted.classifier.weight = nn.Parameter(torch.randn(24, 3).T)
    next(lora_layers(adapted)).lora_A.data = torch.randn(24, 4).T
    loaded = load_adapter(small(), save_adapter(adapted, tmp_path / "new" / "folder"))
    assert same(loaded.state_dict(), adapted.state_dict())


# --- parts that were wrapped after the injection -------------------------------------------------


def part(path, wrap):
    def act(model):
        model.set_submodule(path, wrap(model.get_submodule(path)))
        return model

    return act


WRAPPED = {
    "a compiled block": part("blocks.0", torch.compile),
    "a checkpointed block": part("blocks.1", checkpoint_wrapper),
    "a compiled layer": part("blocks.0.attention.W_q", torch.compile),
    "a head in a container": part("classifier", nn.Sequential),
    "all in a container": nn.Sequential,
    "all replicated": nn.DataParallel,
    "all compiled": torch.compile,
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_wrapped_later_keeps_its_names_and_may_stand_for_the_model(
    adapted, ids, tmp_path, name
):
    output, wrapped = adapted(ids), WRAPPED[name](adapted)
    freeze_non_lora_params(wrapped)
    unmerge_lora_weights(merge_lora_weights(wrapped))
    assert torch.equal(load_adapter(small(), save_adapter(wrapped, tmp_path))(ids), output)
    unload_lora(wrapped)
    assert not any(lora_layers(adapted)) and all(p.requires_grad for p in adapted.parameters())


# --- strength ------------------------------------------------------------------------------------


TURNS = {  # of which layers, what is set to which value
    "scaling of all": (slice(None), "scaling", 1.0),
    "alpha of all": (slice(None), "alpha", 3.0),
    "scaling of one": (slice(1), "scaling", 7.0),
    "rule of all": (slice(None), "use_rslora", True),
}


@pytest.mark.parametrize(("which", "name", "value"), TURNS.values(), ids=TURNS)
def test_a_strength_that_was_turned_is_saved_and_reset_by_the_next_adapter(
    adapted, ids, tmp_path, which, name, value
):
    first, outputs = save_adapter(adapted, tmp_path / "first"), adapted(ids)
    layers = list(lora_layers(adapted))
    for layer in layers[which]:
        setattr(layer, name, value)
    assert not torch.equal(adapted(ids), outputs)
    second = save_adapter(adapted, tmp_path / "second")
    torch.testing.assert_close(load_adapter(small(), second)(ids), adapted(ids))
    assert torch.equal(load_adapter(adapted, first)(ids), outputs)
    assert list(lora_layers(adapted)) == layers


# --- what is saved whole, and a load that is interrupted ------------------------------------------


class Head(nn.Module):
    """With a causal mask of −inf, and two views of one memory."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
        both = torch.arange(8.0)
        self.register_buffer("front", both[:4])
        self.register_buffer("all", both)

    def forward(self, x):
        return self.linear(x) + self.mask.exp().sum() + self.front.sum()


def test_buffers_of_a_head_are_saved_whatever_they_hold(tmp_path):
    def plain():
        return seeded(lambda: nn.Sequential(nn.Linear(6, 4), Head()))

    model, x = with_lora(plain(), ["0"], modules_to_save=["1"]), torch.randn(3, 6)
    nn.init.ones_(model[1].linear.bias)
    model[1].all += 1
    loaded = load_adapter(plain(), save_adapter(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded[1].mask, model[1].mask)


@pytest.mark.parametrize("plain", [False, True])
def test_a_load_that_is_interrupted_leaves_the_model_as_before(
    adapted, tmp_path, monkeypatch, plain
):
    directory = save_adapter(adapted, tmp_path)
    model = small() if plain else fill(adapted, 0.2)
    state, copy_, calls = copy.deepcopy(model.state_dict()), torch.Tensor.copy_, []

    def interrupted(self, other):
        calls.append(self)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return copy_(self, other)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, directory)
    assert len(calls) > 4 and same(model.state_dict(), state)


# --- a save that fails, or is killed -------------------------------------------------------------


def adapter(value, rank=4):
    """A model all of whose factors are `value`."""
    model, layers = add_lora_to_model(nested(), rank, 8.0, "all-linear")
    for layer in layers:
        nn.init.constant_(layer.lora_A, value)
        nn.init.constant_(layer.lora_B, value)
    return model


def value_in(directory):
    """The one value that every factor of the adapter in `directory` has."""
    layers = lora_layers(load_adapter(nested(), directory))
    [value] = {f.item() for m in layers for p in (m.lora_A, m.lora_B) for f in p.flatten()}
    return value


@pytest.mark.parametrize("fails", ["replace", "fsync"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_while_saving_leaves_the_old_adapter_and_no_rubbish(
    tmp_path, monkeypatch, fails, call
):
    directory = save_adapter(adapter(1.0), tmp_path)
    effects = [*[DEFAULT] * (call - 1), OSError("no space left on device")]
    monkeypatch.setattr(os, fails, Mock(wraps=getattr(os, fails), side_effect=effects))
    with pytest.raises(OSError, match="no space left"):
        save_adapter(adapter(2.0), directory)
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert value_in(directory) == (1.0 if call == 1 else 2.0)  # the weights are the adapter


def save_and_die(directory, rank, moment):
    """Die at the n-th time that a file is opened, written out or moved."""
    left = [moment]

    def deadly(original):
        def act(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                os._exit(1)
            return original(*arguments, **named)

        return act

    model = adapter(2.0, rank)
    io.open = deadly(io.open)  # what Path.open calls
    for name in ("fsync", "replace"):
        setattr(os, name, deadly(getattr(os, name)))
    save_adapter(model, directory)
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="copies the process by fork")
@pytest.mark.parametrize(("rank", "expected"), [(4, {1.0, 2.0}), (2, {1.0, "mixed", 2.0})])
def test_a_process_that_dies_between_any_two_steps_loses_nothing(tmp_path, rank, expected):
    """A save with other settings passes through a mixture, which is refused and can be mended."""
    outcomes, copied = [], multiprocessing.get_context("fork")
    for moment in range(1, 8):  # two files, three steps each, and then none left
        save_adapter(adapter(1.0), tmp_path)
        process = copied.Process(target=save_and_die, args=(tmp_path, rank, moment), daemon=True)
        process.start()
        process.join()
        assert process.exitcode == (0 if moment == 7 else 1)
        try:
            outcomes.append(value_in(tmp_path))
        except ValueError as error:
            outcomes.append("mixed")
            assert "mixes two saves" in str(error)
            with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
                (tmp_path / CONFIG_FILE).write_text(file.metadata()[CONFIG_FILE])
            assert value_in(tmp_path) == 2.0
    assert set(outcomes) == expected
    assert outcomes == sorted(outcomes, key=[1.0, "mixed", 2.0].index)  # old, then new


def test_a_file_has_the_permissions_of_any_other_new_file(tmp_path):
    (tmp_path / "other").touch()
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


# --- swapping, switching off, inference mode -----------------------------------------------------


def test_an_adapter_that_is_off_stays_off_in_an_error_and_is_on_after_it(adapted, ids):
    output = adapted(ids)
    with pytest.raises(KeyError), adapter_disabled(adapted):
        with adapter_disabled(adapted):
            assert not torch.equal(adapted(ids), output)
        assert not torch.equal(adapted(ids), output)  # still off: that was the inner one's end
        raise KeyError
    assert torch.equal(adapted(ids), output)


def test_a_graph_that_was_made_before_survives_the_look_at_the_base(adapted, ids):
    ours = adapted(ids)
    with torch.no_grad(), adapter_disabled(adapted):
        bases = adapted(ids)
    (ours - bases).square().sum().backward()
    assert adapted.classifier.weight.grad.any()


def test_whoever_still_holds_a_layer_gets_the_original(ids):
    model = small()
    model.alias = model.blocks[0].attention
    model.blocks[0].attention.twin = model.blocks[0].attention.W_k
    before = model(ids)
    with_lora(model)
    model.blocks[1].attention.W_q = torch.compile(model.blocks[1].attention.W_q, backend="eager")
    merge_lora_weights(model)
    unload_lora(model, merge=False)
    assert torch.equal(model(ids), before)


def test_a_layer_whose_path_begins_as_that_of_a_head_is_no_part_of_it():
    model = nn.ModuleDict({"out": nn.Linear(3, 3), "out2": nn.Linear(3, 3)})
    add_lora_to_model(model, 2, 4.0, "all-linear", modules_to_save=["out"])
    assert list(lora_layers(model)) == [model["out2"]]


UNDER_INFERENCE = {
    "add": lambda model, directory: add_lora_to_model(unload_lora(model), 4, 8.0),
    "merge and unmerge": lambda model, directory: unmerge_lora_weights(merge_lora_weights(model)),
    "unload": lambda model, directory: unload_lora(model),
    "unload and load": lambda model, directory: load_adapter(unload_lora(model, False), directory),
    "load": load_adapter,
}


@pytest.mark.parametrize("name", UNDER_INFERENCE)
def test_under_inference_mode_tensors_are_made_that_train_later(adapted, ids, tmp_path, name):
    directory = save_adapter(adapted, tmp_path)
    with torch.inference_mode():
        UNDER_INFERENCE[name](adapted, directory)
    assert not any(p.is_inference() for p in adapted.parameters())
    adapted.requires_grad_().train()(ids).square().sum().backward()
    assert [path for path, p in adapted.named_parameters() if p.grad is None] == []


def test_a_model_made_under_inference_mode_merges_loads_and_unloads_there(ids, tmp_path):
    adapted, _ = add_lora_to_model(small(), modules_to_save=["classifier"])
    directory = save_adapter(adapted, tmp_path)
    with torch.inference_mode():
        model = small()
        before = model(ids)
        merge_lora_weights(load_adapter(model, directory))
        torch.testing.assert_close(model(ids), before)
        with adapter_disabled(model):
            assert torch.equal(model(ids), before)
        assert torch.equal(unload_lora(unmerge_lora_weights(model), merge=False)(ids), before)
