"""What a training step of DoRA costs: `python -m lora_course.experiments.variant_costs`.

Beside LoRA, PEFT's DoRA and full fine-tuning, on two Llama-shaped blocks of width 4096 in bfloat16.
The methods take turns, step by step. Half a minute on a GPU, with nothing else on it; PEFT and
transformers come with the extra `test`. The table `variant_costs` has a row a method.
"""

import copy
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from lora_course.experiments.recording import record_tables
from lora_course.experiments.timed_models import TARGETS, Case, build, forward_pass
from lora_course.experiments.timing import Step, free_memory, sizes, take_turns
from lora_course.variants import add_magnitudes
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.model import default_device

BLOCKS = Case("decoder", width=4096, depth=2, batch=16, dtype="bfloat16", rank=8)


def lora(model: nn.Module, case: Case) -> nn.Module:
    add_lora_to_model(model, case.rank, 16.0, TARGETS["decoder"])
    freeze_non_lora_params(model)
    return model


def dora_of_peft(model: nn.Module, case: Case) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = list(TARGETS["decoder"])
    config = LoraConfig(r=case.rank, lora_alpha=16, target_modules=targets, use_dora=True)
    return get_peft_model(model, config)


METHODS: dict[str, Callable[[nn.Module, Case], nn.Module]] = {
    "LoRA": lora,
    "DoRA": lambda model, case: add_magnitudes(lora(model, case)),
    "full fine-tuning": lambda model, case: model.requires_grad_(),
    "DoRA, PEFT's": dora_of_peft,
}


def measure(case: Case, device: torch.device, seconds: float = 5.0) -> list[dict]:
    """A row a method: trainable parameters, the median milliseconds of a step, and on a GPU the
    most memory it takes, as if it were there alone."""
    base, run = build(case, device), forward_pass(case, device)
    rows, steps = {}, {}
    for method, make in METHODS.items():
        free_memory(device)
        step = steps[method] = Step(make(copy.deepcopy(base), case), case, run)
        facts = sizes(step, device)
        memory = facts["resident_bytes"] + facts.get("step_bytes", 0)
        rows[method] = {"method": method, "trainable": facts["trainable"], "peak_bytes": memory}
    for method, times in take_turns(steps, device, seconds).items():
        rows[method]["ms"] = round(median(times), 3)
    return list(rows.values())


def main() -> None:
    device = default_device()
    record_tables("variant_costs", device, {"variant_costs": measure(BLOCKS, device)})


if __name__ == "__main__":
    main()
