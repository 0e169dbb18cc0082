"""What two processes save, and what they share out. That they train as one does, replicated and
sharded, the page on many processes measures and claims."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file

from lora_course.experiments.distributed import rows_of_this_process, train
from lora_course.results import load_table
from lora_lib.adapters import WEIGHTS_FILE, load_adapter
from lora_lib.lora import lora_layers
from lora_lib.tokens import Batch


def work(rank, processes, folder):
    """What one of the processes does."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    train(sharded=True, steps=4, batch_size=16, out=folder / f"{processes}")
    dist.destroy_process_group()


def test_a_sharded_adapter_is_saved_as_that_of_one_process_and_loads(tmp_path, monkeypatch, base):
    """Rows differ in length, so the two have different numbers of labels."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    work(0, 1, tmp_path)
    (tmp_path / "store").unlink()
    torch.multiprocessing.spawn(work, (2, tmp_path), nprocs=2)
    tensors, alone = (load_file(tmp_path / n / WEIGHTS_FILE) for n in "21")
    assert tensors.keys() == alone.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4)
    assert all(layer.lora_B.any() for layer in lora_layers(load_adapter(base, tmp_path / "2")))


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


def test_what_was_timed_on_gpus_learned_the_same_in_every_way():
    for _, same in load_table("many_gpus").groupby("model"):
        assert same.first_loss.max() == pytest.approx(same.first_loss.min(), rel=1e-3)
        assert same.last_loss.max() == pytest.approx(same.last_loss.min(), rel=5e-3)
        assert (same.first_loss > same.last_loss).all()
