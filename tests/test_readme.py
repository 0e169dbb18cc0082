"""What the README and the other documents show and promise is true."""

import json
import re
from pathlib import Path

import nbformat
import pytest

import lora_lib
from lora_course.exercises import quiz
from lora_course.experiments.questions import QUESTIONS
from lora_course.results import load_runs, load_table
from lora_lib.pretrained import ADAPTERS, read_metadata
from lora_lib.scores import transliterate

ROOT = Path(__file__).parent.parent
README_FILE = ROOT / "README.md"
README = README_FILE.read_text("utf-8")
TOWN = "Bremen"


def row(script: str) -> str:
    model, tokenizer = lora_lib.load_pretrained()
    if script == lora_lib.BASE_SCRIPT:
        score = read_metadata()["provenance"]["scores"]["cyrillic test"]["exact_match"]
    else:
        lora_lib.load_adapter(model, ADAPTERS / script)
        facts = json.loads((ADAPTERS / script / "provenance.json").read_text("utf-8"))
        score = facts["test"]["exact_match"]
    [written] = transliterate(model, tokenizer, [TOWN])
    recorded = " or ".join(lora_lib.load_spellings(script, "test")[TOWN])
    return f"| {script.capitalize()} | {written} | {recorded} | {score:.0%} |"


def test_the_table_of_one_town_is_what_the_models_write():
    expected = "\n".join(row(script) for script in (lora_lib.BASE_SCRIPT, *lora_lib.SCRIPTS))
    assert expected in README, f"the table should be\n{expected}"


def test_the_opening_picture_is_told_as_it_is_drawn():
    [alt] = re.findall(r"!\[([^]]*)\]\(figures/lora_in_one_picture.png\)", README)
    rows = re.findall(r"^\| (\w+) \| (\S+) \| (.+?) \|", README, re.MULTILINE)
    for script, written, recorded in rows:
        if script in ("Cyrillic", "Greek", "Georgian", "Armenian", "Hebrew"):
            assert written in alt
            assert (written in recorded.split(" or ")) == (script != "Greek")
    runs = QUESTIONS["methods"].runs(load_runs()).query("targets == 'all-linear'")
    scores = runs.groupby("method").exact_match.mean()
    for method, name in (("full", "full fine-tuning"), ("lora", "LoRA"), ("scratch", "same steps")):
        assert f"{name} {scores[method]:.0%}" in alt.replace("\n", " ")
    counting = load_table("counting").query("table == 'context' and pairs.isna()")
    assert f"in context {counting.exact_match.mean():.0%}" in alt.replace("\n", " ")
    trained = runs.groupby("method").trainable.first()["lora"]
    share = trained / lora_lib.count_parameters(lora_lib.load_pretrained()[0])
    assert f"{share:.1%} of the parameters" in alt


@pytest.mark.parametrize("path", [README_FILE, *sorted((ROOT / "docs").glob("*.md"))], ids=str)
def test_links_and_commands_exist(path):
    text = path.read_text("utf-8")
    titles = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
              for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}  # fmt: skip
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists() if file else anchor in titles, target
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    assert {t for t in re.findall(r"(?:`|^)make (?:-B )?([\w-]+)", text, re.M)} <= targets


def test_every_command_that_makes_recorded_results_is_on_their_page():
    page = (ROOT / "docs" / "recorded_results.md").read_text("utf-8")
    modules = (ROOT / "lora_course" / "experiments").glob("*.py")
    commands = {path.stem for path in modules if "__main__" in path.read_text("utf-8")}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == commands


def test_the_map_says_the_minutes_that_the_notebooks_say():
    rows = re.findall(r"\((notebooks/0\S+)\) \|.*\| (\d+) min, (\d+) min \| (\d+) s \|", README)
    assert len(rows) == 7
    for name, reading, exercises, seconds in rows:
        times = f"About {reading} minutes to read, {exercises} for the exercises, {seconds} seconds"
        assert times in nbformat.read(ROOT / name, as_version=4).cells[0].source, name
    reading, exercises = (sum(map(int, column)) for column in list(zip(*rows, strict=True))[1:3])
    assert f"{reading} minutes to read and {exercises} for the exercises" in README


def test_the_guide_names_sections_that_are_there_and_answers_that_are_right():
    guide = (ROOT / "docs" / "instructor_guide.md").read_text("utf-8")
    named = re.findall(r"^#{3,4} (.+) \(notebook (\d\d)[,)]", guide, re.MULTILINE)
    rows = re.findall(r"\| (0\d) \| ((?!from)[^|]+; [^|]+) \|", guide)
    named += [(section, number) for number, sections in rows for section in sections.split("; ")]
    assert len(named) > 40
    sections = {
        (section, path.name[:2])
        for path in (ROOT / "notebooks").glob("0*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        for section in re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)
    }
    assert set(named) <= sections
    assert {s for s in sections if s[0].startswith("★")} <= set(named)  # the class does all of it
    before, after = re.search(r"`([a-d]{10})`. Exit quiz: `([a-d]{10})`", guide).groups()
    assert (quiz.score("before", before), quiz.score("after", after)) == (10, 10)
