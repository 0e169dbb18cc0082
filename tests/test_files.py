"""Saving is atomic: whatever happens while an adapter is written, one can still be loaded."""

import io
import multiprocessing
import os
import sys

import pytest
import tiny_models
from safetensors import safe_open
from torch import nn

from lora_lib import add_lora_to_model, load_adapter, lora_layers, save_adapter
from lora_lib.adapters import CONFIG_FILE, WEIGHTS_FILE


def adapter(value, rank=4):
    """A model all of whose factors are `value`."""
    model, layers = add_lora_to_model(tiny_models.nested(), rank, 8.0, "all-linear")
    for layer in layers:
        nn.init.constant_(layer.lora_A, value)
        nn.init.constant_(layer.lora_B, value)
    return model


def value_in(directory):
    """The one value that every factor of the adapter in `directory` has."""
    layers = lora_layers(load_adapter(tiny_models.nested(), directory))
    [value] = {f.item() for m in layers for p in (m.lora_A, m.lora_B) for f in p.flatten()}
    return value


# --- a save that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["replace", "fsync"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_while_saving_leaves_the_old_adapter_and_no_rubbish(
    tmp_path, monkeypatch, fails, call
):
    directory = save_adapter(adapter(1.0), tmp_path)
    calls, original = [], getattr(os, fails)

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError("no space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(adapter(2.0), directory)
    assert sorted(path.name for path in directory.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert value_in(directory) == (1.0 if call == 1 else 2.0)  # the weights are the adapter


# --- a process that is killed --------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="copies the process by fork")


def start(function, *arguments):
    """A copy of this process, so that a kill does not cost the imports of a new one."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


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


@needs_fork
@pytest.mark.parametrize(("rank", "expected"), [(4, {1.0, 2.0}), (2, {1.0, "mixed", 2.0})])
def test_a_process_that_dies_between_any_two_steps_loses_nothing(tmp_path, rank, expected):
    """A save with other settings passes through a mixture, which is refused and can be mended."""
    outcomes = []
    for moment in range(1, 8):  # two files, three steps each, and then none left
        save_adapter(adapter(1.0), tmp_path)
        process = start(save_and_die, tmp_path, rank, moment)
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
