"""LoRA from scratch, in a small library. Read it in this order: lora, injection, targets, checks,
adapters; model, pretrained; names, tokens, tasks; scores, training; rank."""

from lora_lib.adapters import load_adapter, save_adapter
from lora_lib.injection import (
    adapter_disabled,
    add_lora_to_model,
    freeze_non_lora_params,
    merge_lora_weights,
    unload_lora,
    unmerge_lora_weights,
)
from lora_lib.lora import LoRALinear, count_parameters, lora_layers
from lora_lib.model import (
    FeedForward,
    MultiHeadAttention,
    SmallTransformer,
    TransformerBlock,
    classifier_from,
    default_device,
)
from lora_lib.names import BASE_SCRIPT, SCRIPTS, load_pairs, load_spellings
from lora_lib.pretrained import adapter_directory, adapter_names, load_pretrained
from lora_lib.rank import analyze_weight_change_rank
from lora_lib.scores import evaluate, transliterate
from lora_lib.tasks import (
    SyntheticDataset,
    create_synthetic_data,
    same_town_dataset,
    same_town_pairs,
)
from lora_lib.training import adapt, train_model

__all__ = [
    "BASE_SCRIPT",
    "SCRIPTS",
    "FeedForward",
    "LoRALinear",
    "MultiHeadAttention",
    "SmallTransformer",
    "SyntheticDataset",
    "TransformerBlock",
    "adapt",
    "adapter_directory",
    "adapter_disabled",
    "adapter_names",
    "add_lora_to_model",
    "analyze_weight_change_rank",
    "classifier_from",
    "count_parameters",
    "create_synthetic_data",
    "default_device",
    "evaluate",
    "freeze_non_lora_params",
    "load_adapter",
    "load_pairs",
    "load_pretrained",
    "load_spellings",
    "lora_layers",
    "merge_lora_weights",
    "same_town_dataset",
    "same_town_pairs",
    "save_adapter",
    "train_model",
    "transliterate",
    "unload_lora",
    "unmerge_lora_weights",
]
