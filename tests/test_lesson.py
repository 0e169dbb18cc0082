"""The lesson that the course grew from, done with the library: its names, arguments and numbers
(part 6 draws a figure: see test_figures)."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

import lora_lib


def test_part_1_a_simulated_change_of_rank_8_holds_its_energy_in_8_components():
    values, cumulative = lora_lib.analyze_weight_change_rank(768, 768, simulated_rank=8)
    assert len(values) == len(cumulative) == 768
    assert float(cumulative[6]) < 0.99 and float(cumulative[7]) == pytest.approx(1, abs=1e-4)


def test_part_3_the_counts_before_and_after():
    assert lora_lib.FeedForward(8, 20, 0.3).linear1.out_features == 20
    assert lora_lib.FeedForward(8, dropout=0.3).linear1.out_features == 4 * 8
    model = lora_lib.SmallTransformer(1000, d_model=256, n_heads=4, n_layers=4, num_classes=2)
    assert lora_lib.count_parameters(model) == 3_444_738
    model, layers = lora_lib.add_lora_to_model(
        model, rank=8, alpha=16.0, target_modules=("W_q", "W_v")
    )
    lora_lib.freeze_non_lora_params(model)
    assert len(layers) == 8
    assert lora_lib.count_parameters(model) == 3_477_506
    assert lora_lib.count_parameters(model, only_trainable=True) == 32_768


def test_parts_4_and_5_training_moves_the_factors_alone_and_merging_changes_no_output():
    torch.manual_seed(42)
    loaders = [
        DataLoader(
            lora_lib.SyntheticDataset(lora_lib.create_synthetic_data(n, 100, 16)), 32, shuffle=True
        )
        for n in (128, 64)
    ]
    model = lora_lib.SmallTransformer(100, d_model=32, n_heads=2, n_layers=1, num_classes=2)
    model, _ = lora_lib.add_lora_to_model(model, rank=4, alpha=8.0)
    lora_lib.freeze_non_lora_params(model)
    before = copy.deepcopy(model.state_dict())
    metrics = lora_lib.train_model(model, *loaders, epochs=3, lr=1e-2, description="[LoRA]")
    assert metrics.keys() == {"train_loss", "train_acc", "test_acc"}
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    ids, _ = lora_lib.create_synthetic_data(8, 100, 16)
    unmerged = model.eval()(ids)
    lora_lib.merge_lora_weights(model)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, lora_lib.LoRALinear))
    assert torch.allclose(model(ids), unmerged, atol=1e-5)
