"""Run the seven notebooks with seeds that were never used, and see whether their claims hold:
`make seeds`, or `python notebooks/seeds.py [--shifts 100 200 …] [--workers N] [notebook …]`.

Every seed of a live run is shifted; nothing is written. Then a table says how near each claim came
to its bound, nearest first: the distance of the worst seed, in standard deviations over the seeds.
Claims on recorded results, and exact ones, measure the same under every seed; they are counted
only. Shift 0 runs the notebooks as they are. The exit status is 1 if any claim fails.
"""

import argparse
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import stdev
from typing import NamedTuple

import nbformat
from execute import HERE, run
from tqdm import tqdm

SHIFTS = (100, 200, 300, 400, 500)
REPORT = re.compile(
    r"^(?:Holds\.|Does not hold under your settings\.) (?P<statement>.*): measured (?P<value>\S+), "
    r"claimed (?P<word>at least|at most|exactly) (?P<bound>\S+)$",
    re.MULTILINE,
)
# The order of the batches has a seed of its own, a default of `adapt`.
FIRST_CELL = """
from lora_lib import adapt
adapt.__kwdefaults__["seed"] = {seed}
"""


class Claim(NamedTuple):
    notebook: str
    statement: str
    word: str
    bound: float

    def margin(self, value: float) -> float:
        """How far inside its bound a value is; negative outside."""
        if self.word == "exactly":
            return -abs(value - self.bound)
        return value - self.bound if self.word == "at least" else self.bound - value


def shifted(source: str, shift: int) -> str:
    """A cell's source with the seeds of its live runs shifted: every manual_seed, and seed=42,
    which only live runs have; recorded ones have the seeds 0 to 4."""
    source = re.sub(
        r"manual_seed\((\d+)\)", lambda found: f"manual_seed({int(found[1]) + shift})", source
    )
    return re.sub(r"\bseed=42\b", f"seed={42 + shift}", source)


def claims_of(path: Path, shift: int) -> list[tuple[Claim, float]]:
    """The claims of a notebook, in order, with what they measured under shifted seeds."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = shifted(cell.source, shift)
    if shift:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST_CELL.format(seed=42 + shift)))
    run(notebook, path.parent)
    text = "\n".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.get("name") == "stdout"
    )
    return [
        (Claim(path.stem, found["statement"], found["word"], number(found["bound"])),
         number(found["value"]))
        for found in REPORT.finditer(text)
    ]  # fmt: skip


def number(text: str) -> float:
    return {"yes": 1.0, "no": 0.0}[text] if text in ("yes", "no") else float(text.replace(",", ""))


def table(measured: dict[Claim, list[float]]) -> list[str]:
    """One line a claim that depends on the seed, nearest to its bound first; then the others'
    number."""
    varying = {claim: values for claim, values in measured.items() if len(set(values)) > 1}

    def distance(claim: Claim) -> float:
        return min(map(claim.margin, varying[claim])) / stdev(varying[claim])

    lines = [
        f"{distance(claim):7.1f} sd  {claim.notebook[:2]}  {claim.statement}: "
        f"{min(varying[claim]):g} to {max(varying[claim]):g}, {claim.word} {claim.bound:g}"
        for claim in sorted(varying, key=distance)
    ]
    others = len(measured) - len(varying)
    return [*lines, f"and {others} claims that measure the same under every seed"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shifts", type=int, nargs="+", default=SHIFTS, help="one run for each")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="notebooks at once")
    parser.add_argument("notebooks", type=Path, nargs="*", help="the seven if none is named")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "LORA_LIB_PROGRESS": "off"}
    paths = arguments.notebooks or sorted(HERE.glob("0*.ipynb"))
    measured: dict[Claim, list[float]] = defaultdict(list)
    broken = []
    with ProcessPoolExecutor(arguments.workers) as pool:
        jobs = {
            pool.submit(claims_of, path, shift): f"{path.stem}, shift {shift}"
            for path in paths
            for shift in arguments.shifts
        }
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="notebook"):
            try:
                for claim, value in job.result():
                    measured[claim].append(value)
            except Exception as error:
                broken.append(f"{jobs[job]} stopped: {str(error)[-600:]}")
    failed = [
        f"{claim.notebook}  {claim.statement}: {value:g}, {claim.word} {claim.bound:g}"
        for claim, values in measured.items()
        for value in values
        if claim.margin(value) < 0
    ]
    print("\n".join(table(measured)))
    print(f"{len(measured)} claims, {len(arguments.shifts)} seeds: {len(failed)} failed")
    sys.exit("\n".join(broken + failed) or None)


if __name__ == "__main__":
    main()
