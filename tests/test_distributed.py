"""Two processes train as one does: the same losses, and only the factors' gradients are sent.

The tests start this file under torchrun; each of its processes then runs `work` and writes down
what it saw.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from lora_course.experiments import distributed
from lora_course.experiments.distributed import lora_model, rows_of_this_process, train
from lora_lib.adapters import WEIGHTS_FILE, load_adapter
from lora_lib.lora import count_parameters, lora_layers
from lora_lib.names import load_pairs
from lora_lib.pretrained import load_pretrained
from lora_lib.tokens import Batch, batches_by_length, pair_examples
from lora_lib.training import adapt, evaluate, fit

STEPS, BATCH_SIZE = 4, 16


def checksum(model) -> float:
    return sum(layer.lora_B.detach().double().abs().sum().item() for layer in lora_layers(model))


def work(folder: Path) -> dict:
    """What one of the processes does and sees."""
    saved, save_adapter = [], distributed.save_adapter

    def noting(model, directory):
        saved.append(directory.name)
        return save_adapter(model, directory)

    distributed.save_adapter = noting
    reports = {
        name: train(name == "sharded", STEPS, BATCH_SIZE, folder / name)
        for name in ("replicated", "sharded")
    }
    # `fit` and `adapt` with nothing of ours: plain losses, and every process its own pairs
    model, tokenizer = lora_model()
    pairs = load_pairs("georgian", "train")
    batches = batches_by_length(pair_examples(pairs, tokenizer), BATCH_SIZE, seed=0)
    plain = DistributedDataParallel(copy.deepcopy(model))
    plain_losses = torch.tensor(fit(plain, rows_of_this_process(batches), STEPS, lr=5e-3))
    dist.all_reduce(plain_losses)
    adapted = DistributedDataParallel(model)
    mine = pairs[dist.get_rank() :: dist.get_world_size()]
    losses = adapt(adapted, tokenizer, mine, steps=STEPS, lr=5e-3, batch_size=BATCH_SIZE // 2)
    return {
        "reports": reports,
        "saved": saved,
        "plain_losses": (plain_losses / 2).tolist(),
        "adapt": {"losses": losses, "checksum": checksum(adapted.module)},
        "scores": evaluate(adapted.module, tokenizer, "georgian", limit=4),
    }


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = work(folder)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two processes under torchrun have worked here."""
    path = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, __file__, str(path)], env=environment, check=True, timeout=120)
    return path


@pytest.fixture(scope="module")
def two(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same training in this process alone."""
    path = tmp_path_factory.mktemp("alone")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        report = train(sharded=False, steps=STEPS, batch_size=BATCH_SIZE, out=path)
    finally:
        dist.destroy_process_group()
    return report, load_file(path / WEIGHTS_FILE)


both = pytest.mark.parametrize("way", ["replicated", "sharded"])


@both
def test_the_losses_are_those_of_one_process_at_the_same_batch_size(way, two, one):
    losses, alone = two[0]["reports"][way]["losses"], one[0]["losses"]
    assert two[0]["reports"][way]["processes"] == 2 != one[0]["processes"]
    assert losses == two[1]["reports"][way]["losses"]
    assert losses == pytest.approx(alone, rel=1e-5)
    assert alone[0] - alone[-1] > 0.5


def test_plain_losses_weight_the_labels_of_a_smaller_share_more(two, one):
    assert two[0]["plain_losses"] != pytest.approx(one[0]["losses"], rel=1e-4)


def test_replicated_only_the_gradients_of_the_factors_are_sent(two):
    gradients = 4 * count_parameters(lora_model()[0], only_trainable=True)
    for seen in two:
        sent = seen["reports"]["replicated"]["wire_bytes_per_step"]
        assert sent.pop("allreduce") == gradients + 8  # and how many labels there are, an integer
        assert sum(sent.values()) < 200  # DDP tells the others once how it groups the gradients


def test_sharded_only_the_gradients_of_the_factors_are_reduced_but_weights_are_gathered(two):
    model = lora_model()[0]
    factors = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(4 * (p.numel() + p.numel() // len(p) * (len(p) % 2)) for p in factors)
    weights = 4 * count_parameters(model)
    for seen in two:  # an odd number of rows is padded by one
        sent = seen["reports"]["sharded"]["wire_bytes_per_step"]
        assert sent.pop("reduce_scatter_base") == gradients
        assert weights <= sent.pop("allgather_base") <= 2 * weights  # forward, backward
        assert sent == {"allreduce": 8}


def test_process_0_alone_saves(two):
    assert [seen["saved"] for seen in two] == [["replicated", "sharded"], []]


@both
def test_the_saved_adapter_is_that_of_one_process(way, folder, one):
    tensors = load_file(folder / way / WEIGHTS_FILE)
    assert tensors.keys() == one[1].keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, one[1][name], rtol=1e-3, atol=1e-4)
    model = load_adapter(load_pretrained()[0], folder / way)
    assert checksum(model) > 0


def test_adapt_runs_as_it_is_and_keeps_the_processes_equal(two):
    first, second = (seen["adapt"] for seen in two)
    assert first["losses"] != second["losses"]  # other pairs
    assert first["checksum"] == second["checksum"] > 0
    assert two[0]["scores"] == two[1]["scores"]


def test_a_batch_with_too_few_rows_for_all_processes_is_skipped_by_all(monkeypatch):
    sizes = (4, 1, 2, 3)
    batches = [Batch(*torch.full((2, size, 5), size)) for size in sizes]
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank, rows in ((0, [2, 1, 2]), (1, [2, 1, 1])):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert [len(batch.input_ids) for batch in rows_of_this_process(batches)] == rows


def test_batches_smaller_than_the_number_of_processes_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"batch_size is 3, but there are 4 processes.*at least 4"):
        train(sharded=False, steps=1, batch_size=3)


def test_wire_bytes_count_the_whole_tensor():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with distributed.WireBytes() as wire:
            dist.all_reduce(torch.zeros(10))
            dist.all_reduce(torch.zeros(3, dtype=torch.int64))
            torch.zeros(1000) + 1
    finally:
        dist.destroy_process_group()
    assert wire.bytes == {"allreduce": 64}


if __name__ == "__main__":
    main()
