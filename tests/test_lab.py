"""`make lab` opens the learner's own copy of the course, and nothing of it is ever lost."""

import json
import shutil

import pytest
from jupyter_lab import TOKEN, fetch, make_lab

from lora_course.my_copy import ROOT, copy_missing, give_back


def test_make_lab_answers_on_its_page_within_a_minute(tmp_path):
    with make_lab(tmp_path) as address:
        assert b"JupyterLab" in fetch(f"{address}/lab?token={TOKEN}")
        page = fetch(f"{address}/api/contents/my/01_rank_intuition.ipynb?token={TOKEN}")
        cells = [c for c in json.loads(page)["content"]["cells"] if c["cell_type"] == "code"]
        assert all(cell["metadata"]["trusted"] for cell in cells)  # or figures lose their alt text


def test_a_learners_notebook_is_left_alone_and_kept_when_it_is_given_back(tmp_path):
    for name in ("03_lora_transformer", "07_summary_and_exercises", "solutions/07_solutions"):
        target = tmp_path / "notebooks" / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "notebooks" / f"{name}.ipynb", target)
    assert len(copy_missing(tmp_path)) == 3
    mine = tmp_path / "my" / "07_summary_and_exercises.ipynb"
    fresh = mine.read_bytes()
    mine.write_text("my answers")
    assert copy_missing(tmp_path) == [] and mine.read_text() == "my answers"
    target, kept = give_back("07", tmp_path)
    assert target == mine and mine.read_bytes() == fresh and kept.read_text() == "my answers"
    for wrong in ("0", "9"):
        with pytest.raises(ValueError, match="the name of one notebook"):
            give_back(wrong, tmp_path)
