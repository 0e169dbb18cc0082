"""LoRA on several GPUs of one host, timed: the course's base, and a decoder of Llama-2-7B's shape.

    for n in 1 2; do
        torchrun --standalone --nproc-per-node $n --local-ranks-filter 0 \\
            -m lora_course.experiments.many_gpus
    done

Each run adds its rows to results/many_gpus.csv: the model replicated, whole in every process (DDP),
and sharded, cut among them (FSDP2), at one batch size of all processes together. The 7B has random
weights in bfloat16 and factors in float32; nothing is offloaded or checkpointed.
"""

import gc
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from itertools import repeat
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_course.experiments.distributed import (
    join_the_others,
    lora_model,
    loss_of_all_rows,
    rows_of_this_process,
    shard,
)
from lora_course.experiments.recording import RESULTS, write_table
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.names import load_pairs
from lora_lib.scores import language_model_loss
from lora_lib.tokens import Batch, batches_by_length, pair_examples
from lora_lib.training import fit

STEPS, WARM_UP = 30, 5
Loss = Callable[[nn.Module, Batch], Tensor]


def course() -> tuple[nn.Module, Iterable[nn.Module], Iterator[Batch], Loss]:
    """The base with LoRA, its blocks, batches of 256 Georgian pairs, the loss."""
    model, tokenizer = lora_model()
    examples = pair_examples(load_pairs("georgian", "train"), tokenizer)
    return model, model.blocks, batches_by_length(examples, 256, seed=0), language_model_loss


def seven_b() -> tuple[nn.Module, Iterable[nn.Module], Iterator[Batch], Loss]:
    """The same for Llama-2-7B's shape, r = 16 on all linear layers of the blocks, and one batch of
    random tokens again and again, which it learns by heart."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(use_cache=False)  # its defaults are the 7B's
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ids = torch.randint(config.vocab_size, (16, 512))
    add_lora_to_model(model, rank=16, alpha=32.0, target_modules="all-linear")
    freeze_non_lora_params(model)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch.input_ids, labels=batch.labels).loss

    return model, model.model.layers, repeat(Batch(ids, ids)), loss


MODELS = {"course": course, "7B": seven_b}


def measure(
    name: str,
    way: str,
    model: nn.Module,
    blocks: Iterable[nn.Module],
    batches: Iterable[Batch],
    loss: Loss,
) -> dict:
    """Train with the course's `fit`; times are medians, memory is the peak."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        model.to(torch.device("cuda", torch.cuda.current_device()))
    model = shard(model, blocks) if way == "sharded" else DistributedDataParallel(model)
    starts, tokens = [], []

    def timed_loss(model: nn.Module, batch: Batch) -> Tensor:
        starts.append(time.perf_counter())  # `fit` reads every loss, so the step before is over
        tokens.append(batch.input_ids.numel())
        return loss_of_all_rows(model, batch, loss)

    gc.collect()  # what DDP wrapped before is held by references in a circle
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses = fit(model, rows_of_this_process(batches), STEPS, lr=1e-3, loss_function=timed_loss)
    ends = starts[1:]
    seconds = [end - start for start, end in zip(starts, ends, strict=False)][WARM_UP:]
    rates = [n / s for n, s in zip(tokens[WARM_UP:], seconds, strict=False)]
    mine = [losses[0], losses[-1], median(rates), torch.cuda.max_memory_allocated() / 1e9]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    first, last, rate, gigabytes = zip(*everyone, strict=True)
    return {
        "model": name,
        "way": way,
        "processes": len(everyone),
        "ms": round(1000 * median(seconds), 2),
        "tokens_per_second": round(sum(rate)),
        "gigabytes": round(max(gigabytes), 2),
        "first_loss": round(sum(first) / len(first), 6),
        "last_loss": round(sum(last) / len(last), 6),
    }


def main() -> None:
    join_the_others()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    facts = {"date": date.today(), "device": device, "torch": torch.__version__}
    for name, made in MODELS.items():
        for way in ("replicated", "sharded") if dist.get_world_size() > 1 else ("replicated",):
            row = measure(name, way, *made()) | facts
            if dist.get_rank() == 0:
                write_table(RESULTS / "many_gpus.csv", [row], "a")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
