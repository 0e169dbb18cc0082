"""The lesson that the course grows from calls the library in these ways."""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

import lora_lib
from lora_course import visualize_lora_hyperparameters


def test_the_lessons_path_from_a_layer_to_a_merged_classifier():
    values, energy = lora_lib.analyze_weight_change_rank(48, 48, simulated_rank=8)
    assert np.asarray(values[:50]).shape == (48,) and float(energy[7]) > 0.999

    layer = lora_lib.LoRALinear(nn.Linear(768, 768, bias=False), rank=8, alpha=16.0)
    assert (layer.num_trainable_params, layer.num_total_params) == (12_288, 602_112)

    data = [lora_lib.create_synthetic_data(n, 100, 16) for n in (64, 32)]
    train, test = (DataLoader(lora_lib.SyntheticDataset(d), batch_size=32) for d in data)
    model = lora_lib.SmallTransformer(100, 32, 4, 2, 2)
    total = lora_lib.count_parameters(model)
    model, layers = lora_lib.add_lora_to_model(
        model, rank=4, alpha=8.0, target_modules=["W_q", "W_v"]
    )
    lora_lib.freeze_non_lora_params(model)
    trainable = lora_lib.count_parameters(model, only_trainable=True)
    assert len(layers) == 4 and trainable == 4 * 4 * 64
    assert lora_lib.count_parameters(model) == total + trainable

    metrics = lora_lib.train_model(model, train, test, epochs=2, lr=1e-3, description="LoRA")
    assert {name: len(m) for name, m in metrics.items()} == {
        "train_loss": 2,
        "train_acc": 2,
        "test_acc": 2,
    }
    model.eval()
    ids = next(iter(test))["input_ids"]
    with torch.no_grad():
        before = model(ids)
        lora_lib.merge_lora_weights(model)
        torch.testing.assert_close(model(ids), before)
    assert callable(visualize_lora_hyperparameters)
