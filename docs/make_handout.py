"""What a class gets: `make handout` writes it into handout/, as a folder, as a zip, and as a site.

It is the repository without solutions, guide, tests and answer keys, with the assignment that
nbgrader made. What is graded (conclusions and exit quiz) is recorded and not judged on its page,
and its right answers are nowhere. The other checks need theirs: these are packed into a zip that
Python reads, so that nobody comes upon them by accident; they are not secret.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

from lora_course.exercises.release import ASSIGNMENT, assigned_source

ROOT = Path(__file__).parent.parent
RELEASED = ROOT / "grading" / "release" / ASSIGNMENT / f"{ASSIGNMENT}.ipynb"
KEPT_BACK = r"""notebooks/solutions/ | tests/ | grading/ | lora_course/exercises/release
 | docs/(instructor|make_(handout|slides)|publish|slides_)
 | CONTRIBUTING | \.ci/ | \.github/ | \.gitignore"""
LEFT_OUT = re.compile(
    r"(<!--|#) not in a handout( -->|)\n.*?\1 end\2\n", re.DOTALL
)  # of a page, and of the Makefile
LINK = re.compile(r"(?<!!)\[([^]]+)\]\(((?!\w+:)[^)#\s]+)[^)]*\)")
PACKED = (
    '\n\n__path__.append(f"{__path__[0]}/exercises.zip")  # a class gets the exercises packed\n'
)


def copy(folder: Path) -> None:
    """The files under version control that learners get, and nothing else that lies here."""
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if not re.match(KEPT_BACK, name, re.VERBOSE) and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def without_dead_links(text: str, here: Path) -> str:
    """`text` of a page in the folder `here`: links to what is kept back are only their text, and
    what a page says of it is left out."""
    return LINK.sub(
        lambda link: link[0] if (here / link[2]).exists() else link[1], LEFT_OUT.sub("", text)
    )


def adapt_pages(folder: Path) -> None:
    makefile = folder / "Makefile"
    makefile.write_text(LEFT_OUT.sub("", makefile.read_text("utf-8")), "utf-8")
    for path in folder.rglob("*.md"):
        path.write_text(without_dead_links(path.read_text("utf-8"), path.parent), "utf-8")
    for path in folder.rglob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            source = assigned_source(cell.source)
            if cell.cell_type == "markdown":
                cell.source = without_dead_links(source, path.parent)
            elif source != cell.source:
                cell.source, cell.outputs, cell.execution_count = source, [], None
        nbformat.write(notebook, path)


def without_graded_answers(words: str) -> str:
    """The text of exercises.toml or quiz.toml without what is right of what is graded, and why."""
    parts = re.split(r"^(?=\[)", words, flags=re.MULTILINE)
    graded = (part.startswith(('["07 conclude', "[ideas.after]")) for part in parts)
    key = re.compile(r"^(right|cautious|because\.\w) = .*\n", re.MULTILINE)
    return "".join(key.sub("", p) if g else p for p, g in zip(parts, graded, strict=True))


def pack_answers(folder: Path) -> None:
    package = folder / "lora_course" / "exercises"
    for path in package.glob("*.toml"):
        path.write_text(without_graded_answers(path.read_text("utf-8")), "utf-8")
    shutil.make_archive(str(package), "zip", folder / "lora_course", "exercises")
    shutil.rmtree(package)
    with (folder / "lora_course" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(PACKED)


def write(target: Path) -> Path:
    """Write the class's copy under `target`, and return it. Raises FileNotFoundError if there is
    no assignment yet: `make assignment` makes it."""
    folder = target / "lora_from_scratch"
    shutil.rmtree(target, ignore_errors=True)
    copy(folder)
    shutil.copy(RELEASED, folder / "notebooks" / "assignment.ipynb")
    adapt_pages(folder)
    pack_answers(folder)
    shutil.make_archive(str(folder), "zip", target, folder.name)
    return folder


if __name__ == "__main__":
    folder = write(ROOT / "handout")
    site = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-c", "docs"]
    doctrees = ["-d", "docs/_build/doctrees", ".", str(folder.parent / "site")]
    subprocess.run([*site, *doctrees], cwd=folder, check=True)
    for left_behind in (folder / "docs" / "_build", folder.parent / "jupyter_execute"):
        shutil.rmtree(left_behind, ignore_errors=True)
    print(f"{folder.parent.relative_to(ROOT)}/: a folder, the same as a zip, and a site to read")
