"""LoRA in many processes, a worked example. Two processes on this machine:

    torchrun --standalone --nproc-per-node 2 --local-ranks-filter 0 \\
        -m lora_course.experiments.distributed

The training loop is the course's own `fit`. Every process holds the whole model, and only the
factors' gradients are exchanged (DistributedDataParallel, DDP); with `--sharded` every process
holds a part of every weight (FSDP2, `fully_shard`). Started with plain `python -m`, the same
training runs in one process. Process 0 prints a report as JSON and, given `--out`, saves the
adapter there.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_lib.adapters import save_adapter
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.model import SmallTransformer
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained
from lora_lib.scores import language_model_loss
from lora_lib.tokens import IGNORE, Batch, Tokenizer, batches_by_length, pair_examples
from lora_lib.training import fit


def lora_model() -> tuple[SmallTransformer, Tokenizer]:
    """The course's base with LoRA on all linear layers, the same in every process; without dropout,
    for which every process would draw masks of its own."""
    model, tokenizer = load_pretrained(dropout=0.0)
    torch.manual_seed(0)  # A is random
    add_lora_to_model(model, rank=8, target_modules="all-linear")
    freeze_non_lora_params(model)
    return model, tokenizer


def rows_of_this_process(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Every batch is the same in all processes; each takes its rows of it. All skip a batch with
    fewer rows than processes: the mean loss of no rows is not a number."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    for ids, labels in batches:
        if len(ids) >= processes:
            yield Batch(ids[rank::processes], labels[rank::processes])


def loss_of_all_rows(
    model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Batch], Tensor] = language_model_loss
) -> Tensor:
    """The loss, weighted so that its mean over the processes is the mean over all labelled
    positions. In a plain mean, labels of a process that has few would count for more."""
    mine = (batch.labels != IGNORE).sum().to(next(model.parameters()).device)
    everyone = mine.clone()
    dist.all_reduce(everyone)
    return loss(model, batch) * mine * dist.get_world_size() / everyone


class WireBytes(TorchDispatchMode):
    """Counts the bytes that a process hands to collective operations, by operation; a gathered or
    reduced tensor at its full size."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            name = function.__name__.split(".")[0].strip("_")
            self.bytes[name] += max(t.nbytes for t in tensors)
        return function(*args, **(kwargs or {}))


def shard(model: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """Cut every parameter among the processes, one block at a time: a block's weights are gathered
    just before it computes, and let go after."""
    for module in (*blocks, model):
        fully_shard(module)
        # Sum, then divide: asked for a mean, Gloo in PyTorch 2.8 gives the sum without a word.
        module.set_force_sum_reduction_for_comms(True)
    return model


def save(model: nn.Module, directory: Path) -> None:
    """Process 0 saves the adapter; the others help to gather it if it is sharded."""
    if isinstance(model, DistributedDataParallel):
        whole = model.module
    else:
        options = dict(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        factors = get_model_state_dict(model, options=StateDictOptions(**options))
        whole = lora_model()[0]
        whole.load_state_dict(factors, strict=False)  # in process 0; the others hold none
    if dist.get_rank() == 0:
        save_adapter(whole, directory)


def train(sharded: bool, steps: int, batch_size: int, out: Path | None = None) -> dict:
    """Train in this process and the others of the group; `batch_size` is that of all together.

    Returns the losses of all rows, and the bytes that this process hands to collectives in a step.
    Raises ValueError if a batch would have fewer rows than there are processes.
    """
    processes = dist.get_world_size()
    if batch_size < processes:
        raise ValueError(
            f"batch_size is {batch_size}, but there are {processes} processes, each of which needs "
            f"a row of its own; give at least {processes}"
        )
    model, tokenizer = lora_model()
    if torch.cuda.is_available():
        model.to(torch.device("cuda", torch.cuda.current_device()))
    model = shard(model, model.blocks) if sharded else DistributedDataParallel(model)
    examples = pair_examples(load_pairs("georgian", "train"), tokenizer)
    mine = rows_of_this_process(batches_by_length(examples, batch_size, seed=0))
    with WireBytes() as wire:
        losses = fit(model, mine, steps, lr=5e-3, loss_function=loss_of_all_rows)
    losses = torch.tensor(losses, device=next(model.parameters()).device)
    dist.all_reduce(losses)
    if out:
        save(model, out)
    sent = {name: n / steps for name, n in wire.bytes.items()}
    return {"losses": (losses / processes).tolist(), "wire_bytes_per_step": sent}


def join_the_others() -> None:
    """Take a GPU of one's own, if there are any, and enter the group of torchrun's processes; a
    process that was started alone is a group of one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if dist.is_torchelastic_launched():
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sharded", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="of all processes together")
    parser.add_argument("--out", type=Path, help="where process 0 saves the adapter")
    arguments = parser.parse_args()
    join_the_others()
    report = train(**vars(arguments))
    if dist.get_rank() == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
