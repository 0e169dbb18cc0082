"""The quizzes before and after the course: the questions are in quiz.toml, beside this file.

Both take ten letters, one a question, "-" where you cannot tell, and never raise.
"""

from lora_course.claims import say
from lora_course.exercises.checker import read_words
from lora_course.exercises.choices import ask
from lora_course.tables import show_table

UNTOUCHED = "-" * 10


def before(answers: str, explain: bool = False) -> None:
    """Show the questions and your score; with `explain`, which option is right, and why."""
    _ask("before", answers, explain)


def after(answers: str) -> None:
    """Show the other questions on the same ideas, your score, which option is right, and why."""
    _ask("after", answers, explain=True)


def record(sitting: str, answers: str) -> None:
    """For an assignment: show the questions of "before" or "after", and say what is kept."""
    for number, question in enumerate(questions(sitting), start=1):
        ask(f"{number}. {question['question']}", question["options"])
        print()
    letters = _ten_letters(answers)
    say(f"Recorded: {letters}" if letters not in (None, UNTOUCHED) else _to_do(answers))


def score(sitting: str, answers: str) -> int:
    """How many of the ten letters are right in the sitting "before" or "after"."""
    letters = _ten_letters(answers) or UNTOUCHED
    return sum(x == q["right"] for x, q in zip(letters, questions(sitting), strict=True))


def questions(sitting: str) -> list[dict]:
    """Of each: idea, notebooks, question, options, right, because (of each letter)."""
    return [idea | idea[sitting] for idea in read_words("quiz.toml")["ideas"]]


def _ask(sitting: str, answers: str, explain: bool) -> None:
    letters, rows = _ten_letters(answers), []
    attempted = letters not in (None, UNTOUCHED)
    for number, question in enumerate(questions(sitting), start=1):
        right, letter = question["right"], (letters or UNTOUCHED)[number - 1]
        mark = "—" if letter == "-" else "right" if letter == right else "not right"
        rows.append([question["idea"], question["notebooks"], mark])
        ask(f"{number}. {question['question']}", question["options"])
        if attempted and explain:
            if mark == "not right":
                say(f"You chose {letter}. Not right: {question['because'][letter]}")
            say(f"Right is {right}. {question['because'][right]}")
        print()
    if not attempted:
        say(_to_do(answers))
    else:
        say(f"{score(sitting, letters)} of 10 are right; guessing gives two or three.")
        show_table(["idea", "notebook", sitting], rows)


def _to_do(answers: object) -> str:
    given = "" if _ten_letters(answers) else f" This is {answers!r}."
    return f'Not attempted yet. Write ten letters from a to d, "-" where you cannot tell.{given}'


def _ten_letters(answers: object) -> str | None:
    """The answers without spaces, in small letters; None if they are not ten from a to d or "-"."""
    letters = "".join(answers.lower().split()) if isinstance(answers, str) else ""
    return letters if len(letters) == 10 and set(letters) <= set("abcd-") else None
