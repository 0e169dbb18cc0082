"""The answers at the end of the instructor guide: `python docs/make_answers.py` writes them anew.

They are those of lora_course.exercises, and a test fails as long as the guide says something else.
"""

from pathlib import Path

from lora_course.exercises import everything, quiz
from lora_course.exercises.checker import Choice

GUIDE = Path(__file__).parent / "instructor_guide.md"
MARK = "<!-- What follows is written by `python docs/make_answers.py`. -->\n"


def answers() -> str:
    """The part of the guide below its mark."""
    return f"\n{_quizzes()}\n{_questions()}"


def _quizzes() -> str:
    before, after = ("".join(q.right for q in s.questions) for s in (quiz.before, quiz.after))
    lines = [
        "## Answers to the two quizzes\n",
        f"Before the course: `{before}`. Exit quiz: `{after}`. Question n of",
        "both is about the same idea. Below: what a wrong letter of the exit quiz stands for.\n",
    ]
    pairs = zip(quiz.IDEAS, quiz.before.questions, quiz.after.questions, strict=True)
    for number, ((idea, notebook), before, after) in enumerate(pairs, start=1):
        where = notebook.replace(", ", " and ")
        lines.append(f"{number}. **{idea}** (notebook {where}): {after.why}")
        lines += [f"   - {name}: {_option(q)}" for name, q in (("before", before), ("exit", after))]
        lines += [f"   - not {x}: {after.misconceptions[x]}" for x in sorted(after.misconceptions)]
    return "\n".join(lines) + "\n"


def _questions() -> str:
    lines = [
        "## Answers in the notebooks\n",
        "| notebook | question | right | because |",
        "|---|---|---|---|",
    ]
    for question in everything():
        if isinstance(question, Choice):
            notebook, _, name = question.name.partition(" ")
            lines.append(f"| {notebook} | `{name}` | {_option(question)} | {question.why} |")
    return "\n".join(lines) + "\n"


def _option(question: Choice) -> str:
    return f"**{question.right}**, {question.options[question.right]}"


def main() -> None:
    written = GUIDE.read_text("utf-8").partition(MARK)[0]
    GUIDE.write_text(written + MARK + answers(), "utf-8")


if __name__ == "__main__":
    main()
