"""`make publish`: the repository's address stands in every place, and only the last one given."""

import shutil
import tomllib
from pathlib import Path

import nbformat
import publish
from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(__file__).parent.parent
PAGE = "notebooks/going_deeper/few_pairs.ipynb"


def test_the_last_address_stands_everywhere_and_the_course_is_as_it_was_here(tmp_path):
    (tmp_path / PAGE).parent.mkdir(parents=True)
    for name in ("pyproject.toml", "CITATION.cff", "README.md", PAGE):
        shutil.copy(ROOT / name, tmp_path / name)
    for address in ("https://github.com/first/course", "https://github.com/you/lora"):
        files = publish.publish(address, tmp_path)
    assert len(files) == 4
    for file in files:
        text = file.read_text("utf-8")
        assert "you/lora" in text and "first/course" not in text
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["urls"] == {"Repository": "https://github.com/you/lora"}
    title, hosted, *rest = nbformat.read(tmp_path / PAGE, as_version=4).cells
    at = f"github.com/you/lora/blob/v{project['version']}/{PAGE}"
    assert title.source.count(f"src=https://{at}") == 1
    assert title.source.count(f"https://colab.research.google.com/{at.replace('.com', '')}") == 1
    assert [cell.id for cell in rest].count("hosted") == 0 and hosted.metadata.jupyter.source_hidden
    before = InteractiveShell.instance().run_cell(hosted.source)  # here it does nothing
    assert before.success and not Path("course").exists()
