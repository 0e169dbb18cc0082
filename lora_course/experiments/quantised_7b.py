"""LoRA on Llama-2-7B's shape in four bits: `python -m lora_course.experiments.quantised_7b`.

Random weights, in bfloat16 and in NF4: through the kernels of bitsandbytes, if it can be imported,
and through our own readable layer. LoRA of r = 16 by lora_lib on all linear layers of the blocks,
factors in float32; 1 to 4 rows of 512 tokens, with and without gradient checkpointing. About a
minute on a GPU of 24 GB or more. The table `bits_7b` has a row a case.
"""

import gc
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from statistics import median

import torch
from torch import nn

from lora_course.experiments.recording import RESULTS, write_table
from lora_course.experiments.timed_models import SEVEN_B, TARGETS, Case, build, forward_pass
from lora_course.four_bits import FORMATS, QuantisedLinear, replace_linears
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import count_parameters
from lora_lib.model import default_device
from lora_lib.training import adamw, trainable_parameters

WARM_UP, STEPS = 2, 5
ROWS = (1, 2, 4)


def bitsandbytes_layer(linear: nn.Linear) -> nn.Linear:
    """NF4 with double quantisation, on the device of `linear`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype, device = linear.weight.dtype, linear.weight.device
    layer = Linear4bit(
        linear.in_features, linear.out_features, False, dtype, quant_type="nf4", device="meta"
    )
    weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight, layer.bias = weight.to(device), linear.bias  # quantised as it is moved
    return layer


KINDS: dict[str, Callable[[nn.Linear], nn.Module] | None] = {
    "bfloat16": None,
    "NF4, bitsandbytes": bitsandbytes_layer,
    "NF4, ours": lambda linear: QuantisedLinear(linear, FORMATS["NF4"]),
}


def build_model(kind: str, case: Case) -> nn.Module:
    """The decoder with LoRA on a base of this kind; the same weights for all of them."""
    model = build(case, default_device())
    if make := KINDS[kind]:
        replace_linears(model.model.layers, make)
    add_lora_to_model(model, case.rank, 2.0 * case.rank, TARGETS["decoder"])
    freeze_non_lora_params(model)
    gc.collect()
    return model


def measure(model: nn.Module, case: Case) -> dict:
    """Median milliseconds of a training step, gigabytes that stay and at the peak (0 without a
    GPU), and the loss before the first step."""
    device = default_device()
    on_gpu = device.type == "cuda"
    if case.mode == "checkpointed":  # these come last: it stays on
        model.gradient_checkpointing_enable({"use_reentrant": False})
    run = forward_pass(case, device)
    optimizer = adamw(trainable_parameters(model), lr=1e-6)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stays = torch.cuda.memory_allocated() if on_gpu else 0
    losses, stamps = [], [time.perf_counter()]
    for _ in range(WARM_UP + STEPS):
        optimizer.zero_grad()
        loss, _ = run(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the GPU
        stamps.append(time.perf_counter())
    optimizer.zero_grad()
    seconds = [b - a for a, b in pairwise(stamps)][WARM_UP:]
    return {
        "rows": case.batch,
        "length": case.length,
        "mode": case.mode,
        "ms": round(1000 * median(seconds), 1),
        "stays_gb": round(stays / 1e9, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0, 3),
        "loss": round(losses[0], 6),
        "trainable": count_parameters(model, only_trainable=True),
    }


def main() -> None:
    device = default_device()
    on_gpu = device.type == "cuda"
    facts = {
        "date": date.today(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "bitsandbytes": version("bitsandbytes") if find_spec("bitsandbytes") else "",
    }
    cases = [replace(SEVEN_B, batch=rows) for rows in ROWS]
    cases += [replace(case, mode="checkpointed") for case in (cases[0], cases[-1])]
    rows = []
    for kind in KINDS:
        if kind == "NF4, bitsandbytes" and not facts["bitsandbytes"]:
            print("bitsandbytes is not there, and left out", flush=True)
            continue
        try:
            model = build_model(kind, SEVEN_B)
            for case in cases:
                rows.append({"base": kind} | measure(model, case) | facts)
                print(rows[-1], flush=True)
        except (RuntimeError, ImportError, OSError) as error:  # out of memory; no kernels
            print(f"{kind} failed: {error!r}", flush=True)
        model = None
        gc.collect()
    write_table(RESULTS / "bits_7b.csv", rows)


if __name__ == "__main__":
    main()
