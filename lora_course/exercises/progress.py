"""What you have done so far, in one file on your own computer that nothing sends anywhere.

`progress.json` lies in the course's folder, ignored by git: which exercises are right, after how
many attempts, and what the checks said before. `off()` stops it, for good; so does the environment
variable LORA_LIB_PROGRESS=off, and another value is the path of another file. Nothing here ever
raises because of the file: one that cannot be read or written is done without.
"""

import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lora_course.tables import show_table

COURSE = Path(__file__).parents[2]


def file() -> Path | None:
    """Where progress is kept; None if the environment says not to."""
    setting = os.environ.get("LORA_LIB_PROGRESS")
    if setting == "off" or "NBGRADER_EXECUTION" in os.environ:  # a class being graded
        return None
    if setting:
        return Path(setting)
    folder = COURSE if (COURSE / "notebooks").is_dir() else Path.cwd()
    return folder / "progress.json"


def off() -> None:
    """Record nothing from now on, in later sessions too; what is recorded stays in the file."""
    _update(lambda state: state.update(recording=False))
    print("Progress is no longer recorded; on() records it again.")


def on() -> None:
    _update(lambda state: state.update(recording=True), whatever=True)
    print("Progress is recorded on this computer; off() stops it.")


def record_attempt(name: str, mistake: str | None) -> None:
    """An answer to the exercise `name`, and what the check said; nothing once it was right."""

    def add(state: dict) -> None:
        entry = state["exercises"].setdefault(name, {"done": False, "attempts": 0, "mistakes": []})
        if entry["done"]:
            return
        entry["attempts"] += 1
        entry["done"] = mistake is None
        if mistake and _kind(mistake) not in map(_kind, entry["mistakes"]):
            entry["mistakes"].append(mistake)

    _update(add)


def _kind(mistake: str) -> str:
    """The message without its numbers, which are others at every call."""
    return re.sub(r"[\d.,]+", "", mistake)


def record_quiz(name: str, answers: str) -> None:
    """The letters given in a quiz; a later sitting replaces an earlier one."""
    _update(lambda state: state["quizzes"].update({name: answers}))


def quiz_answers(name: str) -> str | None:
    """The letters recorded for a quiz, None if there are none."""
    state = _read() if file() else None
    return state["quizzes"].get(name) if state else None


def show() -> None:
    """What is done, in how many attempts, and what the check had said before."""
    from lora_course import exercises
    from lora_course.exercises import quiz

    path = file()
    if path is None:
        print("Progress is not recorded here: LORA_LIB_PROGRESS is off.")
        return
    state, names = _read(), [exercise.name for exercise in exercises.everything()]
    if state is None:
        print(f"{path.name} holds something else; move it away, and progress is recorded anew.")
        return
    entries = {name: state["exercises"][name] for name in names if name in state["exercises"]}
    done = sum(entry["done"] for entry in entries.values())
    note = "" if state["recording"] else " Recording is off."
    print(f"{done} of {len(names)} exercises and questions are right.{note}")
    for sitting in (quiz.before, quiz.after):
        if sitting.name in state["quizzes"]:
            print(f"Quiz {sitting.name}: {sitting.score(state['quizzes'][sitting.name])} of 10.")
    if entries:
        show_table(
            ["exercise", "attempts", "now", "what the check said on the way"],
            [_row(name, entry) for name, entry in entries.items()],
        )


def _row(name: str, entry: dict) -> list:
    said = "; then: ".join(entry["mistakes"]) or "—"
    return [name, entry["attempts"], "right" if entry["done"] else "not right yet", said]


def _empty() -> dict:
    return {"recording": True, "exercises": {}, "quizzes": {}}


def _read() -> dict | None:
    """What is recorded; None if the file holds something else, which is then left alone."""
    try:
        state = json.loads(file().read_text("utf-8"))
        entries = state["exercises"].values()
        ours = all({"done", "attempts", "mistakes"} == entry.keys() for entry in entries)
        same = all(type(state[key]) is type(value) for key, value in _empty().items())
        return state if ours and same else None
    except FileNotFoundError:
        return _empty()
    except (AttributeError, LookupError, OSError, TypeError, ValueError):
        return None


def _update(change: Callable[[dict], object], whatever: bool = False) -> None:
    """Change what is recorded; if recording is off, only `whatever` it is."""
    path = file()
    state = _read() if path else None
    if state is None or not (state["recording"] or whatever):
        return
    change(state)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(json.dumps(state, indent=1), "utf-8")
        os.replace(new, path)  # at once: a kernel that dies leaves the old file whole
    except OSError:  # a folder that cannot be written to: the course works without
        with suppress(OSError):
            new.unlink(missing_ok=True)
