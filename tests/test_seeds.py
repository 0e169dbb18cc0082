"""`make seeds` runs the notebooks with other seeds, and says which claims then fail."""

import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parent.parent
CODE = """
import torch
from lora_course.claims import claim

torch.manual_seed(seed)
claim("a number below one half", torch.rand(1).item(), at_most=0.5)
"""


def test_a_claim_that_fails_under_one_seed_is_named_and_nothing_is_written(tmp_path):
    cells = [new_code_cell("seed = 0", metadata={"tags": ["parameters"]}), new_code_cell(CODE)]
    path = tmp_path / "small.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    before = path.read_bytes()
    command = [sys.executable, ROOT / "notebooks" / "seeds.py", path, "--seeds", "0", "5"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    holds, fails, claim = ran.stdout.splitlines()
    assert ran.returncode == 1
    assert (holds, fails) == ("small, seed 0: 0 failed", "small, seed 5: 1 failed")
    assert "a number below one half: measured 0.83" in claim
    assert path.read_bytes() == before
