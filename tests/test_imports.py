"""Who imports whom: one way only, nothing private, and nothing happens on the way."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("lora_lib", "lora_course")
    for path in sorted((ROOT / package).rglob("*.py"))
}
# Below each package, what it must not import.
FORBIDDEN = {
    "lora_lib": "lora_course",
    "lora_course.experiments": "lora_course.exercises",
    "lora_course.exercises": "lora_course.experiments",
}


def imported(path: Path):
    """The dotted name of every import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


IMPORTS = [
    (importer, name)
    for importer, path in MODULES.items()
    for name in imported(path)
    if below(name, "lora_lib") or below(name, "lora_course")
]


def test_imports_go_one_way():
    wrong = [
        (importer, name)
        for importer, name in IMPORTS
        for package, other in FORBIDDEN.items()
        if below(importer, package) and below(name, other)
    ]
    assert wrong == []


def test_no_private_name_crosses_a_module():
    assert [(importer, name) for importer, name in IMPORTS if "._" in name] == []


def test_no_two_modules_share_a_name():
    names = Counter(name.rpartition(".")[2] for name in MODULES)
    assert [name for name, count in names.items() if count > 1 and name != "__init__"] == []


IMPORT_ALL = """
import importlib, random, sys
import numpy, safetensors, safetensors.torch, torch

opened = []
safetensors.safe_open = safetensors.torch.safe_open = None  # reads files without an audit event
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
for name in {modules}:
    importlib.import_module(name)
after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all()
read = [p for p in opened if p.startswith({root!r}) and not p.endswith((".py", ".pyc"))]
read = [p for p in read if "__pycache__" not in p and "site-packages" not in p]
assert not read, f"read on import: {{read}}"
"""


def test_importing_everything_reads_nothing_and_seeds_nothing():
    program = IMPORT_ALL.format(modules=list(MODULES), root=str(ROOT))
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
