"""The transfer task: its data and base, and LoRA of other makes in it."""

import re
from pathlib import Path

import nbformat
import torch
from torch import nn

from lora_course.exercises import transfer

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def test_the_base_knows_something_and_every_copy_is_its_own():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    base = transfer.pretrained_mixer()
    assert torch.equal(torch.rand(1), expected)
    letters, countries = transfer.load_towns(transfer.OLD, 100)
    assert (base(letters).argmax(dim=1) == countries).float().mean() > 2 / len(transfer.OLD)
    nn.init.zeros_(base.norm.weight)
    assert transfer.pretrained_mixer().norm.weight.any()


def test_it_is_solved_without_the_library():
    for path in (NOTEBOOKS / "transfer.ipynb", NOTEBOOKS / "solutions" / "transfer_solution.ipynb"):
        source = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code")
        imported = set(re.findall(r"^from (lora_\S*)", source, re.MULTILINE))
        assert imported <= {"lora_course.exercises", "lora_course.claims", "lora_course.tables"}
        assert "lora_lib" not in source
