"""The lesson that the course grew from, done with the library: its names, arguments and numbers."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from lora_course import visualize_lora_hyperparameters
from lora_lib import (
    FeedForward,
    LoRALinear,
    SmallTransformer,
    SyntheticDataset,
    add_lora_to_model,
    analyze_weight_change_rank,
    count_parameters,
    create_synthetic_data,
    freeze_non_lora_params,
    merge_lora_weights,
    train_model,
)


def test_part_1_a_simulated_change_of_rank_8_holds_its_energy_in_8_components():
    values, cumulative = analyze_weight_change_rank(768, 768, simulated_rank=8)
    assert len(values) == len(cumulative) == 768
    assert float(cumulative[6]) < 0.99 and float(cumulative[7]) == pytest.approx(1, abs=1e-4)


def test_part_3_the_counts_before_and_after():
    assert FeedForward(8, 20, 0.3).linear1.out_features == 20
    assert FeedForward(8, dropout=0.3).linear1.out_features == 4 * 8
    model = SmallTransformer(1000, d_model=256, n_heads=4, n_layers=4, num_classes=2)
    assert count_parameters(model) == 3_444_738
    model, layers = add_lora_to_model(model, rank=8, alpha=16.0, target_modules=("W_q", "W_v"))
    freeze_non_lora_params(model)
    assert len(layers) == 8
    assert count_parameters(model) == 3_477_506
    assert count_parameters(model, only_trainable=True) == 32_768


@pytest.fixture(scope="module")
def trained():
    """A small LoRA model, and what training it returned."""
    torch.manual_seed(42)
    loaders = [
        DataLoader(SyntheticDataset(create_synthetic_data(n, 100, 16)), 32, shuffle=True)
        for n in (128, 64)
    ]
    model = SmallTransformer(100, d_model=32, n_heads=2, n_layers=1, num_classes=2)
    model, _ = add_lora_to_model(model, rank=4, alpha=8.0)
    freeze_non_lora_params(model)
    before = copy.deepcopy(model.state_dict())
    metrics = train_model(model, *loaders, epochs=3, lr=1e-2, description="[LoRA]")
    return model, before, metrics


def test_part_4_training_returns_a_value_an_epoch_and_moves_the_factors_alone(trained):
    model, before, metrics = trained
    assert {name: len(values) for name, values in metrics.items()} == {
        "train_loss": 3, "train_acc": 3, "test_acc": 3
    }  # fmt: skip
    assert metrics["train_loss"][-1] < metrics["train_loss"][0]
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_part_5_merging_changes_nothing_but_where_the_change_lives(trained):
    model = copy.deepcopy(trained[0]).eval()
    ids, _ = create_synthetic_data(8, 100, 16)
    before = model(ids)
    merge_lora_weights(model)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, LoRALinear))
    assert torch.allclose(model(ids), before, atol=1e-5)


def test_part_6_draws_its_two_panels():
    assert len(visualize_lora_hyperparameters().fig.axes) == 2
