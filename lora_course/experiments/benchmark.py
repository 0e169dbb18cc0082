"""What a LoRA step costs, beside its rivals: `python -m lora_course.experiments.benchmark`.

Every case is one model and one input. In one process, several contestants get the same weights,
the same input and the same values in their factors; that their outputs and gradients agree is
checked first. Then they take turns at whole training steps, optimizer included. A benchmark that
was stopped goes on where it was: a case that stands in the results file is not done again.

On a GPU, minutes. On a CPU it uses one thread and counts CPU time, so that what else the machine
does matters little; a quarter of an hour. `--quick` runs every kind of case at a small size, to see
that it works.
"""

import argparse
import gc
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports a missing GPU as an error

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lora_course.experiments.contestants import (
    FLOOR,
    LORA,
    Case,
    Contestant,
    Disagreement,
    build,
    differences,
    entrants,
    factors,
    forward_pass,
    make,
)
from lora_course.experiments.recording import provenance
from lora_lib.lora import count_parameters
from lora_lib.model import default_device

RESULTS = Path(__file__).parent / "results"


# --- what is measured ----------------------------------------------------------------------------


def resident_bytes(contestant: Contestant) -> int:
    """Weights and optimizer state: what stays between two steps."""
    tensors = list(contestant.model.parameters())
    if contestant.optimizer:
        tensors += [t for state in contestant.optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def step_bytes(contestant: Contestant, device: torch.device) -> int:
    """The most that a step holds beyond that: activations, gradients, intermediate results."""
    contestant.clear_gradients()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        contestant.step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":  # its bytes are negative where memory is freed
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def saved_bytes(contestant: Contestant) -> int:
    """Activations that the forward pass keeps for the backward pass, each storage once.

    Parameters are not counted; factors cast to the base's dtype are.
    """
    parameters = {p.untyped_storage().data_ptr() for p in contestant.model.parameters()}
    sizes = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: a node that saves its own output would then hold itself, and the
        # whole graph would stay in memory.
        return tensor.detach()

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output, _ = contestant.run(contestant.model)
    del output
    return sum(sizes.values())


def flops(contestant: Contestant) -> int:
    """Floating point operations of a step's matrix products and attention."""
    with FlopCounterMode(display=False) as counter:
        contestant.step()
    return counter.get_total_flops()


PROFILED = (FLOOR, LORA, "lora_lib, fused", "PEFT")


def profile_step(contestant: Contestant, device: torch.device) -> dict[str, float]:
    """Milliseconds of one step by kind of operation (see `_kind`)."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        contestant.step()
    spent: Counter = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type == torch.autograd.DeviceType.CPU and event.key.startswith("aten::"):
            on_cpu = device.type == "cpu"
            us = event.self_cpu_time_total if on_cpu else event.self_device_time_total
            spent[_kind(event.key, event.input_shapes, contestant.case.rank)] += us / 1000
    return dict(spent)


def _kind(name: str, shapes: list, rank: int) -> str:
    if "attention" in name:
        return "attention"
    if "adamw" in name:
        return "optimizer"
    if name.removeprefix("aten::") in ("mm", "addmm", "bmm", "linear", "matmul"):
        thin = {rank * n for n in (1, 2, 3)}  # one layer's factor, or those of 2 or 3 layers
        is_thin = any(set(shape) & thin for shape in shapes)
        return "products with A or B" if is_thin else "products with W"
    if name in ("aten::copy_", "aten::to", "aten::_to_copy"):
        return "casts and copies"
    if name in ("aten::add", "aten::add_"):
        return "sums"
    return "norms, activations and the rest"


def milliseconds(contestant: Contestant, device: torch.device) -> float:
    """One step: on a GPU by its own clock, on a CPU in CPU time."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        contestant.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    start = time.process_time()
    contestant.step()
    return 1000 * (time.process_time() - start)


def take_turns(
    contestants: dict[str, Contestant], device: torch.device, seconds: float, at_least: int
) -> dict[str, list[float]]:
    """Milliseconds of single steps, one of every contestant a round, in an order that changes."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    start, rounds = time.monotonic(), 0
    gc.collect()
    while rounds < at_least or (rounds < 50 and time.monotonic() - start < seconds):
        shuffle(order)
        for name in order:
            times[name].append(float(f"{milliseconds(contestants[name], device):.4g}"))
        rounds += 1
    return times


# --- a case --------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, seconds: float, at_least: int = 9) -> dict:
    """Every contestant of a case, as one record; one that cannot run is listed under `failed`.

    They take turns for so many seconds, and at least so many rounds.

    Raises Disagreement if two of them do not compute the same.
    """
    base, run = build(case, device), forward_pass(case, device)
    ready: dict[str, Contestant] = {}
    measured: dict[str, dict] = {}
    failed: dict[str, str] = {}
    reference = None
    for name in entrants(case):
        try:
            contestant = Contestant(make(name, base, case), case, run)
            facts = {"trainable": count_parameters(contestant.model, only_trainable=True)}
            if case.mode != "inference" and factors(contestant.model):
                if reference is None:
                    reference = contestant.outputs_and_gradients()
                else:
                    facts["differences"] = differences(contestant, reference)
            facts |= _sizes(contestant, device)
            ready[name], measured[name] = contestant, facts
        except Disagreement:
            raise
        except Exception as error:  # out of memory, not installed: the others still take their turn
            failed[name] = repr(error)[:200]
        contestant = None
        free_memory(device)
    reference = None
    for name, times in take_turns(ready, device, seconds, at_least).items():
        measured[name]["ms"] = times
    record = {"case": asdict(case), "contestants": measured, "failed": failed}
    if case.model == "decoder" and case.mode == "train" and not case.vocabulary:
        try:
            profiled = [name for name in PROFILED if name in ready]
            record["profile"] = {name: profile_step(ready[name], device) for name in profiled}
        except RuntimeError as error:  # no profiler on this machine: the times stand without it
            failed["profile"] = repr(error)[:200]
    return record


def _sizes(contestant: Contestant, device: torch.device) -> dict[str, int]:
    for _ in range(2):
        contestant.step()  # the optimizer makes its state; a compiler its code
    if contestant.case.mode == "inference":
        return {}
    sizes = {
        "resident_bytes": resident_bytes(contestant),
        "step_bytes": step_bytes(contestant, device),
    }
    if contestant.case.mode == "train":
        sizes |= {"saved_bytes": saved_bytes(contestant), "flops": flops(contestant)}
    contestant.clear_gradients()
    return sizes


def free_memory(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# --- which cases ---------------------------------------------------------------------------------

WIDTHS = (4096, 2048, 1024, 512, 256, 128)


def cases(device: torch.device) -> list[Case]:
    """The most important first."""
    gpu = device.type == "cuda"
    batch = 16 if gpu else 1
    float32, bfloat16 = (
        [Case("projections", w, 1 if w > 1024 else 4, batch, dtype=dtype) for w in WIDTHS]
        for dtype in ("float32", "bfloat16")
    )
    if not gpu:  # a processor without bfloat16 products needs a hundred times as long
        bfloat16 = [case for case in bfloat16 if case.width <= 256]
    some = [case for case in float32 + bfloat16 if case.width in (256, 1024)]
    dropout = [replace(case, dropout=0.1) for case in some]
    course = [
        Case("course", batch=64, length=0, rank=8, dtype=dtype) for dtype in ("float32", "bfloat16")
    ]
    course.append(replace(course[0], dropout=0.1))
    inference = [replace(some[0], mode="inference"), replace(course[0], mode="inference")]
    rest = dropout + course + inference
    if not gpu:
        return float32 + bfloat16 + rest
    decoder = Case("decoder", width=4096, depth=8, batch=16, dtype="bfloat16")
    return [decoder, *bfloat16, replace(decoder, mode="compiled"), *rest, *float32]


def turns_seconds(case: Case, device: torch.device) -> float:
    """How long the contestants of a case take turns."""
    if case.model == "decoder":
        return 10
    return 1.5 if device.type == "cuda" else 25


def quick_cases() -> list[Case]:
    """Every kind of case, small."""
    stack = Case("projections", width=32, depth=1, length=16, rank=2)
    decoder = Case("decoder", width=128, depth=2, batch=2, length=16, rank=2, dtype="bfloat16")
    whole = replace(decoder, vocabulary=64)
    return [
        decoder,
        whole,
        replace(whole, mode="checkpointed"),
        stack,
        replace(stack, dtype="bfloat16", dropout=0.1),
        replace(stack, mode="inference"),
        Case("course", batch=4, length=0, rank=2),
    ]


# --- results -------------------------------------------------------------------------------------


def load_benchmark(device: str, folder: Path = RESULTS) -> list[dict]:
    """The recorded cases on "cpu" or "cuda", one dict each (see `measure`)."""
    lines = (folder / f"benchmark_{device}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def find(rows: list[dict], **settings) -> dict:
    """The one case with these settings; raises ValueError unless there is exactly one."""
    found = [row for row in rows if settings.items() <= row["case"].items()]
    if len(found) != 1:
        raise ValueError(f"{len(found)} of {len(rows)} cases have the settings {settings}")
    return found[0]


def middle(row: dict, name: str) -> float:
    """Median milliseconds of a contestant's step."""
    return median(row["contestants"][name]["ms"])


def ratio(row: dict, name: str, other: str) -> float:
    """Median over the rounds of one contestant's step time over another's in the same round."""
    times = (row["contestants"][n]["ms"] for n in (name, other))
    return median(a / b for a, b in zip(*times, strict=True))


def peak_bytes(row: dict, name: str) -> int:
    facts = row["contestants"][name]
    return facts["resident_bytes"] + facts["step_bytes"]


def _tenth(times: list[float]) -> float:
    return sorted(times)[len(times) // 10]


def table(record: dict) -> Iterator[str]:
    """A case as lines to print."""
    yield record["name"]
    for name, facts in record["contestants"].items():
        line = f"  {name:20} {middle(record, name):9.2f} ms (10 % below {_tenth(facts['ms']):.2f})"
        if "step_bytes" in facts:
            line += f"  peak {peak_bytes(record, name) / 1e9:.3f} GB"
        if "flops" in facts:
            line += f"  saved {facts['saved_bytes'] / 1e6:.2f} MB  {facts['flops'] / 1e9:.2f} GFLOP"
        yield line
    yield from (f"  {name:20} failed: {reason}" for name, reason in record["failed"].items())


def facts_of_this_run(command: str, device: torch.device) -> dict:
    """{"provenance": …}, with the versions of the rivals (None where one is not installed)."""

    def version_of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    rivals = {name: version_of(name) for name in ("peft", "loralib", "transformers")}
    facts = provenance(command, device) | {"threads": torch.get_num_threads()} | rivals
    return {"provenance": facts}


def describe(case: Case) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(case).items() if value)


def run_jobs(
    jobs: dict[str, Callable[[], dict]], path: Path, device: torch.device, seconds: float, facts
) -> None:
    """Do the jobs that are not in `path` yet; each record is appended, with `facts`, as it comes.

    After `seconds` no job is started. One that fails does not keep the next from running; the
    first error is raised at the end.
    """
    start, errors = time.monotonic(), []
    path.touch()
    done = {json.loads(line)["name"] for line in path.read_text("utf-8").splitlines()}
    for name, job in jobs.items():
        if name in done:
            continue
        if time.monotonic() - start > seconds:
            print(f"stopped after {seconds:.0f} s, before {name}")
            break
        try:
            record = {"name": name} | job()
        except Exception as error:
            print(f"{name} failed: {error!r}", file=sys.stderr, flush=True)
            traceback.clear_frames(error.__traceback__)  # they hold the models of the failed job
            errors.append(error)
        else:
            with path.open("a") as file:
                file.write(json.dumps(record | facts) + "\n")
            print("\n".join(table(record)), f"({time.monotonic() - start:.0f} s)", flush=True)
        free_memory(device)
    if errors:
        raise errors[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=900, help="start no case after this time")
    parser.add_argument("--quick", action="store_true", help="every kind of case, small")
    parser.add_argument("--out", type=Path, help="results file, one line a case")
    arguments = parser.parse_args()
    device = default_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    out = arguments.out or RESULTS / f"benchmark_{device.type}.jsonl"
    if arguments.quick:
        jobs = {describe(case): partial(measure, case, device, 0, 2) for case in quick_cases()}
    else:
        jobs = {
            describe(case): partial(measure, case, device, turns_seconds(case, device))
            for case in cases(device)
        }
    facts = facts_of_this_run("python -m lora_course.experiments.benchmark", device)
    run_jobs(jobs, out, device, arguments.seconds, facts)


if __name__ == "__main__":
    main()
