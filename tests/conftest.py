"""Shared by the tests: no network, a cache of their own, and one way to check a refusal."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from contextlib import contextmanager

import pytest
import torch

from lora_lib.lora import lora_layers
from lora_lib.model import load_pretrained

torch.set_num_threads(1)  # more of them crawl as soon as anything else runs on the machine


@pytest.fixture(scope="session", autouse=True)
def names_cache(tmp_path_factory):
    """The prepared names lie in a temporary folder, also for programs that a test starts."""
    os.environ["LORA_LIB_CACHE"] = str(tmp_path_factory.mktemp("names"))


@pytest.fixture
def base():
    """The shipped base, fresh."""
    return load_pretrained()[0]


@pytest.fixture(scope="session")
def tokenizer():
    return load_pretrained()[1]


@pytest.fixture
def set_factors():
    """Give every LoRA factor a random value, as training would: ΔW is then not zero."""

    def fill(model, size=0.1):
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in lora_layers(model):
                for factor in (layer.lora_A, layer.lora_B):
                    factor.copy_(size * torch.randn(factor.shape, generator=generator))
        return model

    return fill


def _state(model):
    return {
        "modules": [(path, type(module)) for path, module in model.named_modules()],
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": getattr(model, "lora_config", None),
        "training": model.training,
    }, {name: t.clone() for name, t in model.state_dict().items()}


@pytest.fixture
def refuses():
    """`with refuses(model, ValueError, "word", …):` an error with these words, and the model
    is afterwards as before."""

    @contextmanager
    def check(model, error, *words):
        facts, tensors = _state(model)
        with pytest.raises(error) as raised:
            yield
        assert not [word for word in words if word not in str(raised.value)], str(raised.value)
        facts_after, tensors_after = _state(model)
        assert facts_after == facts
        assert tensors_after.keys() == tensors.keys()
        assert all(torch.equal(tensors_after[name], tensors[name]) for name in tensors)

    return check
