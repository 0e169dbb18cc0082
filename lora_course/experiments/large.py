"""LoRA on seven billion parameters, on one GPU: `python -m lora_course.experiments.large`.

The model has the shape of Llama-2-7B and random weights in bfloat16: time and memory do not depend
on what the weights are. LoRA has rank 16 on all linear layers but the output. In one process:
`lora_lib` beside PEFT on the same weights, with and without activation checkpointing; and full
fine-tuning of the deepest model of that width that fits into the GPU's memory. Two minutes on an
H100. `--quick` does the same with a tiny model.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from lora_course.experiments.benchmark import (
    RESULTS,
    describe,
    facts_of_this_run,
    free_memory,
    measure,
    milliseconds,
    resident_bytes,
    run_jobs,
    step_bytes,
)
from lora_course.experiments.contestants import CEILING, Case, Contestant, build, forward_pass
from lora_lib.lora import count_parameters
from lora_lib.model import default_device

OUT = RESULTS / "large.jsonl"
SEVEN_B = Case("decoder", 4096, 32, batch=16, length=512, vocabulary=32000, dtype="bfloat16")
TINY = replace(SEVEN_B, width=128, depth=3, batch=2, length=16, vocabulary=64, rank=2)

# How full fine-tuning may keep its numbers: bytes a parameter → dtype of weight, gradient and
# Adam's two means. Either way products are computed in bfloat16.
FULL_RECIPES = {16: "float32", 8: "bfloat16"}


# --- the arithmetic ------------------------------------------------------------------------------


def decoder_parameters(case: Case, depth: int | None = None) -> int:
    """Parameters of a Llama-shaped decoder: embedding, blocks, norms and output layer."""
    d, inner = case.width, case.width * 11008 // 4096
    block = 4 * d * d + 3 * d * inner + 2 * d
    return (case.depth if depth is None else depth) * block + 2 * case.vocabulary * d + d


def lora_parameters(case: Case) -> int:
    """r (d_in + d_out) for each of the seven linear layers of every block."""
    d, inner = case.width, case.width * 11008 // 4096
    return case.depth * case.rank * (4 * 2 * d + 3 * (d + inner))


def lora_bytes(case: Case) -> int:
    """A frozen base in 16 bits; factors, their gradients and Adam's means in 32. No activations."""
    return 2 * decoder_parameters(case) + 16 * lora_parameters(case)


def full_bytes(case: Case, bytes_each: int) -> int:
    return bytes_each * decoder_parameters(case)


# --- full fine-tuning ----------------------------------------------------------------------------


def train_full(case: Case, bytes_each: int, device: torch.device, depth: int) -> dict | None:
    """A record of a few checkpointed steps that train all weights; None where memory runs out."""
    free_memory(device)
    dtype = FULL_RECIPES[bytes_each]
    case = replace(case, depth=depth, dtype=dtype, mode="checkpointed")
    try:
        model, run = build(case, device).requires_grad_(), forward_pass(case, device)
        cast = torch.autocast(device.type, torch.bfloat16) if dtype == "float32" else nullcontext()

        def run_in_bfloat16(model):
            with cast:
                return run(model)

        contestant = Contestant(model, case, run_in_bfloat16)
        contestant.step()
        facts = {
            "trainable": count_parameters(model, only_trainable=True),
            "resident_bytes": resident_bytes(contestant),
            "step_bytes": step_bytes(contestant, device),
            "ms": [float(f"{milliseconds(contestant, device):.4g}") for _ in range(5)],
        }
    except torch.OutOfMemoryError:
        return None
    return {
        "case": asdict(case),
        "contestants": {CEILING: facts},
        "failed": {},
    }


def deepest(attempt: Callable[[int], dict | None], guess: int, most: int) -> dict:
    """The result of `attempt` at the largest depth from 1 to `most` where it does not return None.

    Raises RuntimeError if not even depth 1 fits.
    """
    depth = max(1, min(guess, most))
    result = attempt(depth)
    if result is not None:
        while depth < most and (deeper := attempt(depth + 1)) is not None:
            result, depth = deeper, depth + 1
    while result is None:
        depth -= 1
        if depth == 0:
            raise RuntimeError("not even one block fits into this device's memory")
        result = attempt(depth)
    return result


def guess_depth(case: Case, bytes_each: int, memory: int, activations: float = 8e9) -> int:
    """How many blocks the arithmetic lets one expect in `memory` bytes."""
    outside = decoder_parameters(case, depth=0)
    block = decoder_parameters(case, depth=1) - outside
    return int(((memory - activations) / bytes_each - outside) // block)


def deepest_full(case: Case, bytes_each: int, device: torch.device, memory: int) -> dict:
    """`train_full` at the largest depth that fits, at most that of `case`."""
    attempt = partial(train_full, case, bytes_each, device)
    return deepest(attempt, guess_depth(case, bytes_each, memory), case.depth)


# --- all of it -----------------------------------------------------------------------------------


def load_large(path: Path = OUT) -> list[dict]:
    """The recorded measurements, one dict each (see `benchmark.measure` and `train_full`)."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=900, help="start nothing after this time")
    parser.add_argument("--quick", action="store_true", help="the same with a tiny model")
    parser.add_argument("--out", type=Path, default=OUT, help="results file")
    arguments = parser.parse_args()
    device = default_device()
    case = TINY if arguments.quick else SEVEN_B
    checkpointed = replace(case, mode="checkpointed")
    seconds, rounds = (0, 2) if arguments.quick else (4, 5)
    memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else 16e9
    jobs = {
        describe(case): lambda: measure(case, device, seconds, rounds),
        "full, 16 bytes a parameter": lambda: deepest_full(case, 16, device, memory),
        describe(checkpointed): lambda: measure(checkpointed, device, seconds, rounds),
        "full, 8 bytes a parameter": lambda: deepest_full(case, 8, device, memory),
    }
    facts = facts_of_this_run("python -m lora_course.experiments.large", device)
    run_jobs(jobs, arguments.out, device, arguments.seconds, facts | {"device_bytes": memory})


if __name__ == "__main__":
    main()
