"""Run the seven notebooks with other seeds, and list the claims that then fail: `make seeds`, or
`python tests/seeds.py [seed …]`.

A notebook's cell tagged `parameters` holds its seed; here it gets another value. Nothing is
written. The exit status is 1 if a claim fails or a notebook stops.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from execute import NOTEBOOKS, run

from lora_course.claims import FAILS


def failures(path: Path, seed: int) -> list[str]:
    """The claims of a notebook that do not hold under this seed, or why it stopped."""
    notebook = nbformat.read(path, as_version=4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    cell.source = f"seed = {seed}"
    try:
        run(notebook)
    except Exception as error:  # of a cell, or of the kernel
        return [f"stopped: {str(error)[-600:]}"]
    outputs = [output for c in notebook.cells for output in c.get("outputs", ())]
    lines = "".join(output.get("text", "") for output in outputs).splitlines()
    return [line for line in lines if line.startswith(FAILS)]


def main() -> None:
    seeds = list(map(int, sys.argv[1:])) or [1, 2, 3, 4, 5]
    os.environ |= {"LORA_LIB_STRICT": "0", "OMP_NUM_THREADS": "1"}
    failed = 0
    with ProcessPoolExecutor() as pool:
        jobs = {(p, s): pool.submit(failures, p, s)
                for p in sorted(NOTEBOOKS.glob("0*.ipynb")) for s in seeds}  # fmt: skip
        for (path, seed), job in jobs.items():
            found = job.result()
            print(f"{path.stem}, seed {seed}: {len(found)} failed", *found, sep="\n  ", flush=True)
            failed += len(found)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
