"""`make seeds` shifts the seeds of live runs, and says how near each claim came to its bound."""

import sys
from pathlib import Path

import nbformat
import pytest

sys.path.append(str(Path(__file__).parent.parent / "notebooks"))

import seeds
from seeds import Claim, claims_of, shifted, table

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("0*.ipynb"))


def test_seeds_of_live_runs_are_shifted_and_those_of_recorded_ones_are_not():
    source = (
        "torch.manual_seed(42)\nRun(steps=9, seed=42)\nrows(seed=0)\nGenerator().manual_seed(0)"
    )
    assert shifted(source, 100) == (
        "torch.manual_seed(142)\nRun(steps=9, seed=142)\nrows(seed=0)\nGenerator().manual_seed(100)"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_claim_of_a_notebook_is_understood(path):
    """Each printed line is read back; none is lost to the way a number is written."""
    printed = "\n".join(
        output.text
        for cell in nbformat.read(path, as_version=4).cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    )
    lines = [line for line in printed.splitlines() if ", claimed " in line]
    found = list(seeds.REPORT.finditer(printed))
    assert len(found) == len(lines) > 0
    for report in found:
        claim = Claim("", report["statement"], report["word"], seeds.number(report["bound"]))
        assert claim.margin(seeds.number(report["value"])) >= 0


@pytest.mark.parametrize(
    "word, value, margin", [("at least", 3, 1), ("at most", 3, -1), ("exactly", 3, -1)]
)
def test_a_margin_is_negative_outside_the_bound(word, value, margin):
    assert Claim("01", "so large", word, 2).margin(value) == margin


def test_claims_nearest_to_their_bounds_come_first():
    near, far = Claim("01", "near", "at least", 1), Claim("01", "far", "at most", 9)
    exact = Claim("01", "exact", "exactly", 4)
    first, second, rest = table({far: [1, 2, 3], exact: [4, 4, 4], near: [2, 3, 4]})
    assert first.split() == ["1.0", "sd", "01", "near:", "2", "to", "4,", "at", "least", "1"]
    assert second.startswith("    6.0 sd  01  far")
    assert rest == "and 1 claims that measure the same under every seed"


NOTEBOOK = """
import torch
from lora_course.claims import claim

torch.manual_seed(42)
claim("a number below one half", torch.rand(1).item(), at_most=0.5)
claim("one thousand two hundred", 1200, equals=1200)
"""


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)
    path = tmp_path / "01_small.ipynb"
    cells = [nbformat.v4.new_code_cell(NOTEBOOK)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_a_claim_is_measured_under_another_seed_and_nothing_is_written(notebook):
    before = notebook.read_bytes()
    (drawn, first), (exact, number) = claims_of(notebook, 0)
    (again, second), _ = claims_of(notebook, 5)
    assert drawn == again == Claim("01_small", "a number below one half", "at most", 0.5)
    assert first != second
    assert (exact.bound, number) == (1200, 1200)
    assert notebook.read_bytes() == before


def test_a_claim_that_fails_under_one_seed_ends_with_an_error(notebook, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["seeds.py", str(notebook), "--workers=1", "--shifts", "0", "5"]
    )
    with pytest.raises(SystemExit) as ended:
        seeds.main()
    assert "01_small  a number below one half: 0.88" in str(ended.value)
    assert "2 claims, 2 seeds: 1 failed" in capsys.readouterr().out
