"""LoRA broken on purpose, in six ways: what test_broken_lora.py breaks, and a plugin for pytest.

With `-p breakages` a test that TESTS names runs twice or more: unbroken, when it has to pass, and
under each breakage that it is there to notice, when it has to fail.
"""

import sys

import pytest
from torch import nn

from lora_lib import injection, lora, names
from lora_lib.lora import LoRALinear

# --- the breakages -------------------------------------------------------------------------------


def _after_init(patch, change):
    original = LoRALinear.__init__

    def broken(self, *arguments, **settings):
        original(self, *arguments, **settings)
        change(self)

    patch.setattr(LoRALinear, "__init__", broken)


def _replace(patch, function, replacement):
    """Wherever it was imported to."""
    name = function.__name__
    for module in list(sys.modules.values()):
        if vars(module).get(name) is function:
            patch.setattr(module, name, replacement)


def start_B_at_random(patch):
    _after_init(patch, lambda layer: nn.init.normal_(layer.lora_B))


def leave_out_the_scaling(patch):
    _after_init(patch, lambda layer: setattr(layer, "scaling", 1.0))


def leave_out_the_scaling_in_forward_only(patch):
    original = LoRALinear.forward

    def broken(self, x):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self, "scaling", 1.0)
            return original(self, x)

    patch.setattr(LoRALinear, "forward", broken)


def freeze_the_new_head(patch):
    def broken(model):
        model.requires_grad_(False)
        for layer in lora.lora_layers(model):
            layer.lora_A.requires_grad_()
            layer.lora_B.requires_grad_()

    _replace(patch, injection.freeze_non_lora_params, broken)


def drop_the_rank_path(patch):
    patch.setattr(LoRALinear, "forward", lambda self, x: self.original(x))


def train_the_base_too(patch):
    _replace(patch, injection.freeze_non_lora_params, lambda model: None)


def train_on_test_towns(patch):
    original = names.load_pairs

    def broken(script, split):
        more = original(script, "test") if split == "train" else []
        return original(script, split) + more

    _replace(patch, original, broken)


# --- the tests that notice -----------------------------------------------------------------------

_OUTPUT = "tests/test_lora.py::test_the_output_is_that_of_W_plus_s_B_A"
_FREEZING = (
    "tests/test_lora.py::test_after_freezing_exactly_the_factors_and_the_saved_modules_train"
)
TESTS = {
    start_B_at_random: "tests/test_lora.py::test_injection_is_in_place_and_changes_no_output",
    leave_out_the_scaling: _OUTPUT,
    leave_out_the_scaling_in_forward_only: _OUTPUT,
    freeze_the_new_head: _FREEZING,
    drop_the_rank_path: "tests/test_lora.py::test_unloading_keeps_what_was_learned",
    train_the_base_too: _FREEZING,
    train_on_test_towns: "tests/test_data.py::"
    "test_no_town_of_the_test_or_validation_split_is_trained_on_in_any_script",
}
_must_fail = pytest.mark.xfail(strict=True, raises=AssertionError)


def pytest_generate_tests(metafunc):
    name = f"::{metafunc.function.__name__}"
    broken = [
        pytest.param(breakage, marks=_must_fail, id=breakage.__name__)
        for breakage, test in TESTS.items()
        if test.endswith(name)
    ]
    metafunc.fixturenames.append("_break")
    metafunc.parametrize("_break", [pytest.param(None, id="unbroken"), *broken], indirect=True)


@pytest.fixture(autouse=True)
def _break(request, monkeypatch):
    if request.param:
        request.param(monkeypatch)
