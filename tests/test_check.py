"""`make check` says what is missing, and `make lab` asks it before it sets anything up."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = ROOT / "check.py"


def run(before: str = "") -> tuple[int, str]:
    """Exit status and output of check.py in a Python that `before` has changed."""
    program = f"import runpy\n{before}\nrunpy.run_path({str(CHECK)!r}, run_name='__main__')"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    return ran.returncode, ran.stdout + ran.stderr


def test_where_nothing_is_missing():
    status, said = run()
    assert status == 0, said
    assert re.findall(r"^ok +(\w+)", said, re.M) == ["python", "disk", "packages", "base", "cache"]


@pytest.mark.parametrize(
    "before, says",
    [
        ("import sys; sys.version_info = (3, 8, 18)", "python: 3.8.18, and 3.11 or newer is"),
        ("from importlib import metadata as m; m.version = lambda n: '1'", "torch is 1 instead of"),
        ("import sys; sys.modules['lora_lib'] = None", "base: "),
        ("import os; os.environ['LORA_LIB_CACHE'] = os.devnull + '/x'", "cache: "),
    ],
)
def test_what_is_wrong_is_said_and_the_status_is_1(before, says):
    status, said = run(before)
    assert status == 1 and re.search(f"^problem  .*{says}", said, re.M), said


def test_an_old_python_can_read_the_file():
    ast.parse(CHECK.read_text("utf-8"), feature_version=(3, 8))


def test_make_lab_stops_where_the_check_finds_a_problem(tmp_path):
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "check.py").write_text("import sys; sys.exit('problem')")
    ran = subprocess.run(["make", "lab"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode and "problem" in ran.stderr and not (tmp_path / ".venv").exists()
