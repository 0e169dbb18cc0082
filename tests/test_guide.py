"""The instructor guide speaks of sections that are there, and of answers that are right."""

import re
from pathlib import Path

import nbformat

from lora_course.exercises import quiz

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "instructor_guide.md").read_text("utf-8")


def test_the_minutes_add_up():
    parts = re.split(r"^### \d\. .+ \((\d+) minutes\)$", GUIDE, flags=re.MULTILINE)[1:]
    minutes = [int(n) for n in parts[::2]]
    assert sum(minutes) == 60
    for total, text in zip(minutes, parts[1::2], strict=True):
        text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
        assert sum(map(int, re.findall(r"^#### .+, (\d+) minutes?\)$", text, re.M))) == total


def test_every_section_that_it_names_is_in_its_notebook():
    named = re.findall(r"^#{3,4} (.+) \(notebook (\d\d)[,)]", GUIDE, re.MULTILINE)
    rows = re.findall(r"\| (0\d) \| ((?!from)[^|]+; [^|]+) \|", GUIDE)
    named += [(section, number) for number, sections in rows for section in sections.split("; ")]
    assert len(named) > 40
    for section, number in named:
        [path] = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
        assert re.search(rf"^#+ {re.escape(section)}$", text, re.MULTILINE), (number, section)
    starred = {(n, s) for s, n in named if s.startswith("★")}
    for path in (ROOT / "notebooks").glob("0*.ipynb"):  # the class does all of the core
        for cell in nbformat.read(path, as_version=4).cells:
            for section in re.findall(r"^#+ (★ .+)$", cell.source, re.MULTILINE):
                assert (path.name[:2], section) in starred, section


def test_its_answers_to_the_quizzes_are_right():
    before, after = re.search(r"`([a-d]{10})`. Exit quiz: `([a-d]{10})`", GUIDE).groups()
    assert (quiz.score("before", before), quiz.score("after", after)) == (10, 10)
