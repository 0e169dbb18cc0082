"""Two processes train as one does: the same losses and the same adapter, copied or cut in two."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file

from lora_course.experiments import many_gpus
from lora_course.experiments.distributed import rows_of_this_process, train
from lora_lib.adapters import WEIGHTS_FILE, load_adapter
from lora_lib.lora import lora_layers
from lora_lib.pretrained import load_pretrained
from lora_lib.tokens import Batch

STEPS, BATCH_SIZE = 4, 16
WAYS = ("replicated", "sharded")
SMALL = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
)


def work(rank, processes, folder):
    """What one of the processes does: it trains in both ways, and writes down its losses."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    for way in WAYS:
        report = train(way == "sharded", STEPS, BATCH_SIZE, folder / way)
        (folder / f"{way}{rank}.json").write_text(json.dumps(report["losses"]))
        made = many_gpus.seven_b(rows=4, length=16, **SMALL)
        row = many_gpus.measure("7B in small", way, *made, steps=12)
        (folder / f"small {way}{rank}.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def losses(folder, way, rank=0):
    return json.loads((folder / f"{way}{rank}.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of one process, which is this one."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        work(0, 1, folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of two processes."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.multiprocessing.spawn(work, (2, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_the_losses_are_those_of_one_process_at_the_same_batch_size(way, one, two):
    """Rows differ in length, so the two have different numbers of labels."""
    alone = losses(one, way)
    assert losses(two, way) == losses(two, way, rank=1)
    assert losses(two, way) == pytest.approx(alone, rel=1e-5)
    assert alone[0] - alone[-1] > 0.5


@pytest.mark.parametrize("way", WAYS)
def test_the_saved_adapter_is_that_of_one_process_and_loads(way, one, two):
    tensors, alone = (load_file(folder / way / WEIGHTS_FILE) for folder in (two, one))
    assert tensors.keys() == alone.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4)
    model = load_adapter(load_pretrained()[0], two / way)
    assert all(layer.lora_B.any() for layer in lora_layers(model))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_timed_on_gpus_learns_the_same_in_one_process_and_in_two(way, one, two):
    alone, pair = (losses(folder, f"small {way}") for folder in (one, two))
    assert (alone["processes"], pair["processes"]) == (1, 2)
    assert pair["first_loss"] == pytest.approx(alone["first_loss"], rel=1e-3)
    assert pair["last_loss"] == pytest.approx(alone["last_loss"], rel=1e-3)
    assert pair["first_loss"] - pair["last_loss"] > 0.1
    assert pair["tokens_per_second"] == pytest.approx(64_000 / pair["ms"], rel=0.5)


def test_every_process_takes_its_rows_and_all_skip_a_batch_with_too_few(monkeypatch):
    batches = [Batch(*torch.full((2, size, 5), size)) for size in (4, 1, 2, 3)]
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank, rows in ((0, [2, 1, 2]), (1, [2, 1, 1])):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert [len(batch.input_ids) for batch in rows_of_this_process(batches)] == rows


def test_batches_smaller_than_the_number_of_processes_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(ValueError, match=r"batch_size is 3, but there are 4 processes.*at least 4"):
        train(sharded=False, steps=1, batch_size=3)
