"""Is everything here that the course needs?

    make check                without make: python check.py; in a notebook: %run ../check.py

Each line says what was found; the first problem ends the check, with exit status 1. Until the rest
is known to be there this uses the standard library alone, and the grammar of Python 3.8.
"""

import re
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 11)
GIGABYTES = 2  # with the small build of torch; the usual one for Linux takes 7
MEND = "run `make -B lab` (without make: pip install -r requirements.txt -e .)"


def python():
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < OLDEST:
        raise OSError(
            f"{version}, and 3.11 or newer is needed: make lab PYTHON=/path/to/python3.11"
        )
    return f"{version}, {sys.executable}"


def disk():
    free = shutil.disk_usage(str(ROOT)).free / 1e9
    if free < GIGABYTES and not (ROOT / ".venv" / "installed").exists():
        raise OSError(f"{free:.1f} GB are free, and the set-up needs {GIGABYTES}: make room")
    return f"{free:.1f} GB free"


def packages():
    wrong = [complaint for complaint in map(complain, required()) if complaint]
    if wrong:
        raise ImportError(f"{', '.join(wrong)}; {MEND}")
    return "all there"


def required():
    """(name, sign, version) of what the notebooks need."""
    files = (ROOT / "requirements" / f"{file}.txt" for file in ("library", "names", "course"))
    text = "\n".join(file.read_text("utf-8") for file in files)
    return re.findall(r"^([\w-]+)([>=]=)([\d.]+)", text, re.MULTILINE)


def complain(requirement):
    name, sign, version = requirement
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is missing"
    numbers, least = ([int(n) for n in re.findall(r"\d+", v)[:3]] for v in (found, version))
    right = numbers == least if sign == "==" else numbers >= least
    return None if right else f"{name} is {found} instead of {sign}{version}"


def base():
    from lora_lib import count_parameters, load_pretrained

    return f"{count_parameters(load_pretrained()[0]):,} parameters"


def cache():
    from lora_lib.names import cache_folder

    cache_folder().mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=cache_folder()).close()
    return f"{cache_folder()} can be written to"


if __name__ == "__main__":
    before_set_up = "--before-set-up" in sys.argv
    for check in (python, disk) if before_set_up else (python, disk, packages, base, cache):
        try:
            print(f"ok       {check.__name__}: {check()}", flush=True)
        except Exception as error:  # of any kind: nothing is known to work here
            sys.exit(f"problem  {check.__name__}: {error}\ndocs/troubleshooting.md says more")
