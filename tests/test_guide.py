"""What the instructor guide says about the notebooks and the exercises is true."""

import re
from pathlib import Path

import make_answers
import make_slides as slides
import nbformat
import pytest
import torch
from learners import CATALOGUE
from test_notebooks import SEVEN

from lora_course.exercises import everything, ex01, ex02, ex05, quiz
from lora_course.exercises.checker import Choice

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

GUIDE = (DOCS / "instructor_guide.md").read_text("utf-8")
HEADINGS = {
    path.name[:2]: {
        heading
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
        for heading in slides.HEADING.findall(cell.source)
    }
    for path in SEVEN
}
# Sections that have notes, with their notebooks.
NOTED = re.findall(r"^#{3,4} (.+) \(notebook (\d\d)[,)]", GUIDE, re.MULTILINE)


def section(title: str) -> str:
    return re.split(rf"^## {title}$", GUIDE, flags=re.MULTILINE)[1].split("\n## ")[0]


def table(title: str) -> list[list[str]]:
    rows = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def spans(rows: list[list[str]], column: int = 0) -> list[tuple[int, int]]:
    return [tuple(map(int, row[column].split(" to "))) for row in rows]


def follow_on(found: list[tuple[int, int]], total: int) -> bool:
    """Whether the spans begin at 0, have no gap, and end at the total."""
    return [0, *(end for _, end in found)] == [*(start for start, _ in found), total]


# --- minutes and headings ------------------------------------------------------------------------


def test_the_ninety_minutes_are_ninety():
    plan = slides.read_plan(GUIDE)
    assert [part.minutes for part in plan] == [10, 20, 25, 15, 10, 10]
    for part in plan:
        assert sum(step.minutes for step in part.steps) == part.minutes, part.title
    rows = table("Ninety minutes")
    assert follow_on(spans(rows), 90)
    assert [row[1] for row in rows] == [part.title for part in plan]
    for row, part, (start, end) in zip(rows, plan, spans(rows), strict=True):
        assert end - start == part.minutes, part.title
        assert row[2].split(", ") == sorted({step.notebook for step in part.steps}), part.title


def test_half_a_day_and_two_sessions_add_up():
    assert follow_on(spans(table("Half a day")), 210)
    rows = table("Two sessions")
    for session in ("1", "2"):
        assert follow_on(spans([row for row in rows if row[0] == session], column=1), 90)


@pytest.mark.parametrize("title", ["Half a day", "Two sessions"])
def test_the_sections_of_the_tables_are_in_the_notebooks(title):
    for *_, notebook, sections, learners in table(title):
        if learners == "break":
            continue
        assert set(sections.split("; ")) <= HEADINGS[notebook], notebook


def test_every_section_named_in_a_heading_is_in_its_notebook():
    headings = re.findall(r"^#{3,4} ", GUIDE, re.MULTILINE)
    assert len(NOTED) == len(headings) - len(slides.read_plan(GUIDE))
    assert [(heading, n) for heading, n in NOTED if heading not in HEADINGS[n]] == []


def test_every_section_that_a_plan_uses_has_notes():
    used = {
        (heading, notebook)
        for title in ("Half a day", "Two sessions")
        for *_, notebook, sections, learners in table(title)
        if learners != "break"
        for heading in sections.split("; ")
    }
    spoken_for = {  # an exercise's question is in the answers, recall questions are in the notebook
        ("Your turn: what follows?", "01"),
        ("Your turn: diagnose", "04"),
        ("Do you remember?", "04"),
    }
    assert used - set(NOTED) == spoken_for


def test_the_misconceptions_are_shown_where_the_table_says():
    places = re.findall(r'(\d\d), "([^"]+)"', section("Where misconceptions come up"))
    assert len(places) > 12
    assert [(n, h) for n, h in places if h not in HEADINGS[n]] == []


def test_the_numbers_in_the_guide_are_those_of_the_notebooks():
    measured = {  # in the guide, in the outputs of the notebook
        "112 GB against 14.6 GB": ("01", "full fine-tuning 112.0 GB, LoRA 14.6 GB"),
        "31 of 128 for Georgian": ("01", ">31.3<"),
        "49 for more pretraining": ("01", ">48.9<"),
        "65 for\n  noise": ("01", ">65.0<"),
        "about 70 % of the energy": ("01", "of W_q, block 1, hold: measured 0.7"),
        "2 in 100 at r = 8": ("02", "2.08 in 100"),
        "79,128, or 8 %": ("04", ">79,128<"),
        "0.53 of unseen towns. Cut to rank 8: 0.06": (
            "04",
            "trained at rank 8: 0.53; cut to rank 8: 0.06",
        ),
        "25 LoRA layers": ("05", "25 LoRA layers"),
        "all 856,448 weights": ("05", "merged: 856,448 of 856,448"),
    }
    for said, (notebook, output) in measured.items():
        assert said in GUIDE, said
        [path] = [path for path in SEVEN if path.name.startswith(notebook)]
        assert output in path.read_text("utf-8"), output


# --- what learners say ---------------------------------------------------------------------------


def test_what_to_watch_for_is_what_the_checks_say():
    said = [words for exercise in CATALOGUE.values() for words in exercise.wrong]
    choices = [item for item in everything() if isinstance(item, Choice)]
    for choice in (*choices, *quiz.before.questions, *quiz.after.questions):
        said += [*choice.options.values(), *choice.misconceptions.values()]
    for path in SEVEN:
        said += [cell.source for cell in nbformat.read(path, as_version=4).cells]
    items = re.findall(r"^- Watch for .*(?:\n  .*)*", GUIDE, re.MULTILINE)
    quoted = [" ".join(q.split()) for item in items for q in re.findall(r'"([^"]+)"', item)]
    assert len(quoted) > 20
    assert [q for q in quoted if not any(q in text for text in said)] == []


def test_the_solutions_in_the_guide_are_right():
    found = re.findall(r"Solution:\s+`return ([^`]+)`", GUIDE)
    exercises = {
        "x, weight, A, B, alpha": (ex02.forward, lambda s: s.replace("frozen", "x @ weight.T")),
        "d_out, d_in, rank": (ex02.initialise, str),
        "W, A, B, alpha": (ex05.merge, str),
        "values": (ex01.k90, str),
    }
    for (arguments, (exercise, given)), solution in zip(exercises.items(), found, strict=True):
        answer = eval(f"lambda {arguments}: ({given(solution)})", {"torch": torch})
        assert exercise.judge(answer) is None, solution


def test_the_answers_are_those_of_the_exercises():
    written = GUIDE.partition(make_answers.MARK)[2]
    assert written == make_answers.answers(), "run python docs/make_answers.py"
    for sitting in (quiz.before, quiz.after):
        key = "".join(question.right for question in sitting.questions)
        assert f"`{key}`" in written
        assert sitting.score(key) == 10


def test_links_resolve():
    titles = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in slides.HEADING.findall(GUIDE)
    }
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", GUIDE):
        file, _, anchor = target.partition("#")
        assert (DOCS / file).exists() if file else anchor in titles, target
