"""Whoever breaks LoRA hears of it: for each breakage there is a claim of a notebook that holds as
the library is and fails as soon as it is broken."""

import symtable
import sys
from pathlib import Path

import nbformat
import pytest
from torch import nn

from lora_lib import injection, lora, names
from lora_lib.lora import LoRALinear

ROOT = Path(__file__).parent.parent


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


# --- the claims that notice ----------------------------------------------------------------------

CLAIMS = [  # what is broken, the number of a notebook, and a claim of it that fails then
    (start_B_at_random, "02", "a new LoRALinear differs from its nn.Linear by"),
    (start_B_at_random, "03", "largest difference of a score after injecting"),
    (leave_out_the_scaling, "02", "LoRALinear differs from TinyLoRA by"),
    (leave_out_the_scaling, "07", "formula and library differ by"),
    (leave_out_the_scaling_in_forward_only, "02", "LoRALinear differs from TinyLoRA by"),
    (leave_out_the_scaling_in_forward_only, "05", "largest difference of a logit"),
    (freeze_the_new_head, "03", "parameters of a head in modules_to_save that train"),
    (drop_the_rank_path, "02", "LoRALinear differs from TinyLoRA by"),
    (drop_the_rank_path, "05", "largest difference of a logit"),
    (train_the_base_too, "03", "parameters that train beside A and B"),
    (train_on_test_towns, "04", "test towns that are trained on"),
]


def cells_for(notebook: str, statement: str) -> list[str]:
    """The cell with that claim, and before it the cells that define what it needs, in order."""
    [path] = (ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    [last] = [i for i, source in enumerate(sources) if f'claim("{statement}"' in source]
    chosen, needed = [], set()
    for source in reversed(sources[: last + 1]):
        used, defined = names_in(source)
        if defined & needed or not chosen:
            chosen.insert(0, source)
            needed |= used - defined
    return chosen


def names_in(source: str) -> tuple[set[str], set[str]]:
    """The global names that a cell uses, and those that it defines."""
    top = symtable.symtable(source, "cell", "exec")
    names = top.get_symbols()
    defined = {name.get_name() for name in names if name.is_assigned() or name.is_imported()}
    used, inner = {name.get_name() for name in names if name.is_referenced()}, top.get_children()
    while inner:
        table = inner.pop()
        inner += table.get_children()
        used |= {name.get_name() for name in table.get_symbols() if name.is_global()}
    return used, defined


def run(cells: list[str]) -> None:
    space = {}
    for source in cells:
        exec(compile(source, "cell", "exec"), space)


@pytest.mark.parametrize(("breakage", "notebook", "statement"), CLAIMS)
def test_a_claim_holds_and_fails_once_lora_is_broken(
    breakage, notebook, statement, monkeypatch, capsys
):
    monkeypatch.setenv("LORA_LIB_STRICT", "1")
    cells = cells_for(notebook, statement)
    run(cells)
    assert f"✓ {statement}: " in capsys.readouterr().out
    breakage(monkeypatch)
    with pytest.raises(AssertionError) as failed:
        run(cells)
    assert str(failed.value).startswith(f"{statement}: ")
