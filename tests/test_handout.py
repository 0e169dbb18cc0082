"""A class's copy: the checks work, and what is graded has no answers in it."""

import subprocess
import sys

import make_handout
import nbformat

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
    assignment = make_handout.ROOT / "notebooks" / "transfer.ipynb"
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
