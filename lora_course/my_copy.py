"""Your own copy of the notebooks, in my/, which git ignores; `make lab` opens it.

    python -m lora_course.my_copy       copy what is not there yet; what is there is yours
    python -m lora_course.my_copy 03    give notebook 03 back as it was; yours is kept beside it

Links and `%run ../check.py` work as they do in notebooks/, since the copy is as deep.
"""

import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import nbformat
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import KernelSpecManager
from nbformat.sign import NotebookNotary

ROOT = Path(__file__).parent.parent


def copy(source: Path, target: Path) -> None:
    """As JupyterLab would save it with this Python, or it would call the notebook unsaved."""
    notebook = nbformat.read(source, as_version=4)
    kernel = KernelSpecManager().get_kernel_spec(notebook.metadata.kernelspec.name)
    notebook.metadata.kernelspec.display_name = kernel.display_name
    notebook.metadata.language_info = IPythonKernel.language_info
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)


def trust(paths: Iterable[Path]) -> None:
    """JupyterLab strips the alt text of figures from notebooks that it does not trust."""
    with suppress(Exception):  # where it cannot store what it trusts, the course runs as well
        notary = NotebookNotary()
        for path in paths:
            notary.sign(nbformat.read(path, as_version=4))


def names(root: Path) -> list[str]:
    """Of all notebooks, such as "03_lora_transformer.ipynb" or "solutions/07_solutions.ipynb"."""
    paths = (path.relative_to(root / "notebooks") for path in root.glob("notebooks/**/*.ipynb"))
    return sorted(p.as_posix() for p in paths if ".ipynb_checkpoints" not in p.parts)


def copy_missing(root: Path = ROOT) -> list[str]:
    """Copy the notebooks that my/ does not have; returns their names."""
    missing = [name for name in names(root) if not (root / "my" / name).exists()]
    for name in missing:
        copy(root / "notebooks" / name, root / "my" / name)
    return missing


def give_back(begin: str, root: Path = ROOT) -> tuple[Path, Path | None]:
    """Copy the notebook whose name begins so, as in "03"; returns it, and where the learner's is
    now. Raises ValueError unless exactly one begins so."""
    found = [name for name in names(root) if name.startswith(begin)]
    if len(found) != 1:
        some = ", ".join(found) or "no notebook"
        raise ValueError(f"{begin!r} should begin the name of one notebook, as 03 does, of: {some}")
    target, kept = root / "my" / found[0], None
    if target.exists():
        kept = target.with_stem(f"{target.stem} {datetime.now():%Y-%m-%d %H.%M.%S}")
        target.rename(kept)
    copy(root / "notebooks" / found[0], target)
    return target, kept


def main() -> None:
    if len(sys.argv) == 1:
        new = len(copy_missing())
        trust(ROOT / "my" / name for name in names(ROOT))
        print(f"Your copy of the notebooks is my/: {new} new, the others are as you left them.")
        return
    try:
        target, kept = give_back(sys.argv[1])
    except ValueError as error:
        sys.exit(str(error))
    print(f"{target.relative_to(ROOT)} is as it was" + (f"; yours is {kept.name}" if kept else ""))


if __name__ == "__main__":
    main()
