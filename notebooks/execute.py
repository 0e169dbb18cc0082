"""Re-execute notebooks in place, in order: `python notebooks/execute.py [notebook …]`.

The only thing that writes committed outputs, and draws again what is in figures/. Nothing that
changes from run to run without reason is kept: timestamps, widgets, progress bars.
"""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent


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


def execute(path: Path) -> float:
    """Run a notebook from the top and write it back; returns the seconds it took."""
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    run(notebook)
    seconds = time.perf_counter() - start
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(
                output for output in cell.outputs if _keep(output)
            )
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"],
                         "language_info": {"name": "python"}}  # fmt: skip
    nbformat.write(notebook, path)
    return seconds


def _keep(output) -> bool:
    """Neither progress bars (stderr) nor widgets, which are dead without their kernel."""
    is_widget = "application/vnd.jupyter.widget-view+json" in output.get(
        "data", {}
    )
    return not is_widget and output.get("name") != "stderr"


def _joined(outputs: Iterable) -> list:
    """Neighbouring pieces of text as one: where a kernel cuts its text is a matter of chance."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if (
            output.output_type == last.get("output_type") == "stream"
            and output.name == last.name
        ):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def main() -> None:
    chosen = [Path(name) for name in sys.argv[1:]]
    folders = (HERE, HERE / "solutions", HERE / "going_deeper")
    with tempfile.TemporaryDirectory() as drawn:
        os.environ |= {"LORA_LIB_STRICT": "1", "LORA_LIB_FIGURES": drawn}
        for path in chosen or [
            p for folder in folders for p in sorted(folder.glob("*.ipynb"))
        ]:
            print(f"{path.name}: {execute(path):.0f} s", flush=True)
        for figure in (HERE.parent / "figures").glob("*.png"):
            if (new := Path(drawn) / figure.name).exists():
                shutil.copy(new, figure)


if __name__ == "__main__":
    main()
