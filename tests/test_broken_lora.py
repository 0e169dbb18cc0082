"""Whoever breaks LoRA hears of it: for each breakage there is a claim of a notebook, and a test,
that holds as the library is and fails as soon as it is broken."""

import os
import subprocess
import symtable
import sys
from pathlib import Path

import breakages
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
LAYER, TRANSFORMER, TRAINING, MERGING, SUMMARY = (
    "02_lora_from_scratch",
    "03_lora_transformer",
    "04_training",
    "05_merging",
    "07_summary_and_exercises",
)
CLAIMS = {
    breakages.start_B_at_random: [
        (LAYER, "a new LoRALinear differs from its nn.Linear by"),
        (TRANSFORMER, "largest difference of a score after injecting"),
    ],
    breakages.leave_out_the_scaling: [
        (LAYER, "LoRALinear differs from TinyLoRA by"),
        (SUMMARY, "formula and library differ by"),
    ],
    breakages.leave_out_the_scaling_in_forward_only: [
        (LAYER, "LoRALinear differs from TinyLoRA by"),
        (MERGING, "largest difference of a logit"),
    ],
    breakages.freeze_the_new_head: [
        (TRANSFORMER, "parameters of a head in modules_to_save that train"),
    ],
    breakages.drop_the_rank_path: [
        (LAYER, "LoRALinear differs from TinyLoRA by"),
        (MERGING, "largest difference of a logit"),
    ],
    breakages.train_the_base_too: [
        (TRANSFORMER, "parameters that train beside A and B"),
    ],
    breakages.train_on_test_towns: [
        (TRAINING, "test towns that are trained on"),
    ],
}


def cells_for(notebook: str, statement: str) -> list[str]:
    """The cell with that claim, and before it the cells that define what it needs, in order."""
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
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


@pytest.mark.parametrize(
    ("breakage", "notebook", "statement"),
    [
        pytest.param(breakage, *where, id=f"{breakage.__name__}-{where[0][:2]}-{where[1]}")
        for breakage, claims in CLAIMS.items()
        for where in claims
    ],
)
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


def test_tests_pass_and_fail_once_lora_is_broken():
    assert CLAIMS.keys() == breakages.TESTS.keys()
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests"))
    chosen = sorted(set(breakages.TESTS.values()))
    options = ["-p", "breakages", "-p", "no:cacheprovider", "-rxp", "-q"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *chosen],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout  # a broken test that passes is a failure there
    for test in chosen:
        assert f"PASSED {test}[unbroken" in result.stdout
    for breakage, test in breakages.TESTS.items():
        assert f"XFAIL {test}[{breakage.__name__}" in result.stdout
