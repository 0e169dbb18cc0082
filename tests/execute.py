"""Re-execute notebooks in place, in order: `python tests/execute.py [notebook …]`.

The only thing that writes committed outputs, and draws again what is in figures/. Nothing that
changes from run to run without reason is kept: timestamps, widgets, progress bars.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def run(notebook: nbformat.NotebookNode) -> None:
    """Run a notebook's cells from the top; it holds their outputs then.

    It runs in an empty folder: what it shows cannot depend on a file that another one has left.
    """
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _seen(cell.outputs)


def execute(path: Path) -> float:
    """Run a notebook from the top and write it back; returns the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    run(notebook)
    seconds = time.perf_counter() - start
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"],
                         "language_info": {"name": "python"}}  # fmt: skip
    nbformat.write(notebook, path)
    return seconds


def _seen(outputs: Iterable) -> list:
    """What is to be seen at the end. Not widgets, which are dead without their kernel, nor what a
    line has overwritten, as progress bars do; and neighbouring pieces of text as one, since where a
    kernel cuts its text is a matter of chance."""
    seen = []
    for output in outputs:
        last = seen[-1] if seen else {}
        if "application/vnd.jupyter.widget-view+json" in output.get("data", ()):
            continue
        if output.get("name", "no stream") == last.get("name"):
            last.text += output.text
        else:
            seen.append(output)
    for output in seen:
        if "text" in output:
            output.text = re.sub(r"[^\n]*\r", "", output.text)
    return [output for output in seen if output.get("text", "not empty")]


def main() -> None:
    chosen = [Path(name) for name in sys.argv[1:]]
    folders = (NOTEBOOKS, NOTEBOOKS / "solutions", NOTEBOOKS / "going_deeper")
    with tempfile.TemporaryDirectory() as drawn:
        os.environ |= {"LORA_LIB_STRICT": "1", "LORA_LIB_FIGURES": drawn}
        for path in chosen or [p for folder in folders for p in sorted(folder.glob("*.ipynb"))]:
            print(f"{path.name}: {execute(path):.0f} s", flush=True)
        for figure in (NOTEBOOKS.parent / "figures").glob("*.png"):
            if (new := Path(drawn) / figure.name).exists():
                shutil.copy(new, figure)


if __name__ == "__main__":
    main()
