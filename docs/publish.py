"""Say where the repository is: `make publish ADDRESS=https://github.com/you/lora-from-scratch`.

Writes the address into pyproject.toml and CITATION.cff, badges below the README's title, and into
each notebook badges and a folded cell that gets the course where it is not, as in Colab and Kaggle.
Another address replaces the one before. Tag the commit with the version, since they lead to it.
"""

import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).parent.parent
HOSTED = """# In Colab and Kaggle this gets the course; elsewhere it does nothing.
import os

if os.environ.keys() & {{"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"}}:
    !git clone -q --depth 1 -b {tag} {address} course
    %pip install -q -e "./course[course]"
    import sys

    sys.path.append("course")  # a path that pip adds counts from the next start on"""
BADGES = "<!-- badges -->"  # the line that holds them begins so


def badges(address: str, tag: str, page: str) -> str:
    """The line of badges for the notebook at this path of the repository."""
    at = f"{urlsplit(address).path.strip('/')}/blob/{tag}/{page}"
    colab = "https://colab.research.google.com"
    kaggle = "https://kaggle.com"
    return " ".join(
        [
            BADGES,
            f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{at})",
            f"[![Open in Kaggle]({kaggle}/static/images/open-in-kaggle.svg)]"
            f"({kaggle}/kernels/welcome?src=https://github.com/{at})",
        ]
    )


def below_title(text: str, line: str) -> str:
    """`text`, whose first line is its title, with this line of badges below it and no other."""
    title, rest = re.sub(rf"{BADGES}.*\n\n", "", text).split("\n\n", 1)
    return f"{title}\n\n{line}\n\n{rest}"


def publish(address: str, root: Path = ROOT) -> list[Path]:
    """Write the address everywhere under `root`; returns the files that hold it.

    Raises ValueError if it is not that of a repository on GitHub, which Colab and Kaggle read.
    """
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"{address!r} should look like https://github.com/you/lora-from-scratch")
    pyproject, citation, readme = (
        root / name for name in ("pyproject.toml", "CITATION.cff", "README.md")
    )
    text = pyproject.read_text("utf-8")
    tag = "v" + tomllib.loads(text)["project"]["version"]
    text = re.sub(r'\n\[project\.urls\]\nRepository = ".*"\n', "", text)
    pyproject.write_text(f'{text}\n[project.urls]\nRepository = "{address}"\n', "utf-8")
    text = re.sub(r"repository-code: .*\n", "", citation.read_text("utf-8"))
    citation.write_text(f"{text}repository-code: {address}\n", "utf-8")
    first = "notebooks/01_rank_intuition.ipynb"
    text = readme.read_text("utf-8")
    readme.write_text(below_title(text, badges(address, tag, first)), "utf-8")
    notebooks = sorted(root.glob("notebooks/**/*.ipynb"))
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        page = path.relative_to(root).as_posix()
        notebook.cells[0].source = below_title(notebook.cells[0].source, badges(address, tag, page))
        cells = [cell for cell in notebook.cells if cell.id != "hosted"]
        cell = new_code_cell(HOSTED.format(tag=tag, address=address), id="hosted")
        cell.metadata = {"tags": ["hosted", "hide-input"], "jupyter": {"source_hidden": True}}
        notebook.cells = [cells[0], cell, *cells[1:]]
        nbformat.write(notebook, path)
    return [pyproject, citation, readme, *notebooks]


if __name__ == "__main__":
    try:
        files = publish(*sys.argv[1:2] or [""])
    except ValueError as error:
        sys.exit(str(error))
    print(f"{len(files)} files hold the address; commit them, and tag the commit")
