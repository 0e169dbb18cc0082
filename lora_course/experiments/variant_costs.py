"""What a training step of each variant costs: `python -m lora_course.experiments.variant_costs`.

Two models: the course's base, on a batch of its pairs, and two Llama-shaped blocks of width 4096 in
bfloat16. The contestants of a model take turns, step by step. Half a minute on a GPU, with nothing
else on it; PEFT and transformers come with the extra `test`.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn

from lora_course.experiments.recording import record_tables
from lora_course.experiments.timed_models import Case, build, forward_pass
from lora_course.experiments.timing import Step, free_memory, sizes, take_turns
from lora_course.results import RESULTS
from lora_course.variants import add_magnitudes, lora_plus, start_at_strongest
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.lora import LoRALinear, lora_layers
from lora_lib.model import default_device

BASE = Case("course", batch=64, length=0, rank=8)
BLOCKS = Case("decoder", width=4096, depth=2, batch=16, dtype="bfloat16", rank=8)


def lora(model: nn.Module, case: Case, use_rslora: bool = False) -> nn.Module:
    add_lora_to_model(model, case.rank, 16.0, "all-linear", use_rslora=use_rslora)
    freeze_non_lora_params(model)
    return model


def dora(model: nn.Module, case: Case) -> nn.Module:
    return add_magnitudes(lora(model, case))


def pissa(model: nn.Module, case: Case) -> nn.Module:
    for layer in lora_layers(lora(model, case)):
        start_at_strongest(layer)
    return model


def peft(model: nn.Module, case: Case, **settings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = LoraConfig(r=case.rank, lora_alpha=16, target_modules=targets, **settings)
    return get_peft_model(model, config)


METHODS: dict[str, Callable[[nn.Module, Case], nn.Module]] = {
    "LoRA": lora,
    "rsLoRA": partial(lora, use_rslora=True),
    "DoRA": dora,
    "PiSSA": pissa,
    "LoRA+": lora,
    "full fine-tuning": lambda model, case: model.requires_grad_(),
    "LoRA, PEFT's": peft,
    "DoRA, PEFT's": partial(peft, use_dora=True),
}


def measure(case: Case, device: torch.device, seconds: float = 5.0) -> list[dict]:
    """A row a method: trainable parameters, the median milliseconds of a step, and on a GPU the
    most memory it takes, as if it were there alone."""
    base, run = build(case, device), forward_pass(case, device)
    rows, steps = {}, {}
    # From a decoder's W, PiSSA's start takes minutes; its steps are LoRA's.
    for method in [name for name in METHODS if case.model == "course" or name != "PiSSA"]:
        free_memory(device)
        step = Step(METHODS[method](copy.deepcopy(base), case), case, run)
        if method == "LoRA+":
            step.optimizer = lora_plus(step.model, 16.0)(step.parameters, 1e-6)
        facts = sizes(step, device)
        memory = facts["resident_bytes"] + facts.get("step_bytes", 0)
        size = {"model": case.model, "width": case.width, "method": method}
        rows[method] = size | {"trainable": facts["trainable"], "peak_bytes": memory}
        steps[method] = step
    for method, times in take_turns(steps, device, seconds).items():
        rows[method]["ms"] = round(median(times), 3)
    return list(rows.values())


def start_seconds(width: int, device: torch.device) -> float:
    """Seconds in which PiSSA starts one square layer of this width: the singular values of W."""
    layer = LoRALinear(nn.Linear(width, width, device=device), rank=8)
    torch.linalg.svd(layer.original.weight[:64, :64])  # the library is loaded here
    began = time.perf_counter()
    start_at_strongest(layer)
    layer.lora_B.sum().item()  # until it is done
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the tables")
    folder = parser.parse_args().out
    device = default_device()
    rows = measure(BASE, device)
    if device.type == "cuda":  # a CPU would take an hour
        rows += measure(BLOCKS, device)
    starts = [{"width": width, "seconds": start_seconds(width, device)} for width in (128, 4096)]
    tables = {"variant_costs": rows, "pissa_starts": starts}
    for row in rows + starts:
        print(row)
    record_tables("variant_costs", device, tables, folder)


if __name__ == "__main__":
    main()
