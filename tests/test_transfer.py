"""What the transfer task stands on: its data, its base, and a solution without the library."""

import re
from pathlib import Path

import nbformat
import torch

from lora_course.exercises import transfer

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def test_towns_are_letters_and_countries():
    letters, countries = transfer.load_towns(("GR", "JP"), 40)
    assert letters.shape == (80, transfer.LENGTH) and countries.bincount().tolist() == [40, 40]
    assert letters.min() == 0 and letters.max() <= len(transfer.LETTERS)
    assert letters[:, 0].min() > 0  # no empty name
    assert countries[:10].unique().numel() == 2  # shuffled


def test_the_base_is_trained_once_and_every_copy_is_its_own():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    base = transfer.pretrained_mixer(steps=5)
    assert torch.equal(torch.rand(1), expected)
    model = transfer.with_new_head(base)
    assert model.head.out_features == len(transfer.NEW)
    assert base.head.out_features == len(transfer.OLD)
    with torch.no_grad():
        base.norm.weight.zero_()
    again = transfer.pretrained_mixer(steps=5)
    assert again.norm.weight.any() and model.norm.weight.any()


def test_the_base_knows_something():
    letters, countries = transfer.load_towns(transfer.OLD, 100)
    right = transfer.pretrained_mixer()(letters).argmax(dim=1) == countries
    assert right.float().mean() > 2 / len(transfer.OLD)


def test_it_is_solved_without_the_library():
    for path in (NOTEBOOKS / "transfer.ipynb", NOTEBOOKS / "solutions" / "transfer_solution.ipynb"):
        source = "\n".join(
            c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"
        )
        imported = set(re.findall(r"^from (lora_\S*)", source, re.MULTILINE))
        assert imported <= {"lora_course.exercises", "lora_course.claims", "lora_course.tables"}
        assert "lora_lib" not in source
