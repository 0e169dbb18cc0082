"""Save and load adapters in the format of Hugging Face PEFT: a directory with
`adapter_config.json` and `adapter_model.safetensors`.

`peft.PeftModel.from_pretrained(base, directory)` reads what `save_adapter` writes.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_lib.lora import (
    LoRAConfig,
    LoRALinear,
    _require_lora,
    _saved_paths,
    add_lora_to_model,
    freeze_non_lora_params,
    unload_lora,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT wraps a model twice before it names its tensors

ADAPTERS = Path(__file__).parent / "pretrained" / "adapters"


def adapter_directory(script: str) -> Path:
    """Where the shipped adapter for `script` lies, for load_adapter.

    Raises ValueError, with the names there are, if none ships for `script`.
    """
    names = adapter_names()
    if script not in names:
        raise ValueError(f"no adapter ships for {script!r}; there are {', '.join(names)}")
    return ADAPTERS / script


def adapter_names() -> tuple[str, ...]:
    """The scripts that adapters ship for."""
    return tuple(sorted(path.parent.name for path in ADAPTERS.glob(f"*/{CONFIG_FILE}")))


def save_adapter(model: nn.Module, directory: Path | str) -> Path:
    """Write the LoRA factors, and the modules in modules_to_save, as PEFT does.

    Raises ValueError if the model has no LoRA layers.
    """
    _require_lora(model)
    config = model.lora_config
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_peft_config(config), indent=2)
    tensors = {key: t.detach().cpu().contiguous() for key, t in _adapter_tensors(model).items()}
    _replace(directory / WEIGHTS_FILE, lambda path: save_file(tensors, path, {"format": "pt"}))
    _replace(directory / CONFIG_FILE, lambda path: path.write_text(text + "\n", "utf-8"))
    return directory


def load_adapter(model: nn.Module, directory: Path | str, trainable: bool = False) -> nn.Module:
    """Give `model` the adapter in `directory`: a plain model gets LoRA layers, a model that has
    equally configured ones gets their factors replaced. Frozen unless `trainable`.

    Raises FileNotFoundError if a file is missing; ValueError if a file is damaged, the adapter
    uses a PEFT feature that this library lacks, or anything in it does not fit the model, with
    every mismatch listed. The model is then as before.
    """
    directory = Path(directory)
    config, tensors = _read(directory)
    fresh = not any(isinstance(m, LoRALinear) for m in model.modules())
    if fresh:
        settings = vars(config) | {"target_modules": config.target_modules}
        try:
            add_lora_to_model(model, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{directory} does not fit this model: {error}") from error
    elif _peft_config(model.lora_config) != _peft_config(config):
        raise ValueError(
            f"this model has LoRA layers with {model.lora_config}, but {directory} holds {config}; "
            "call unload_lora(model, merge=False) first"
        )
    places = _adapter_tensors(model)
    problems = _mismatches(places, tensors)
    if not fresh and any(layer.merged for layer in _require_lora(model)):
        problems.append("the model is merged; call unmerge_lora_weights(model) first")
    if problems:
        if fresh:
            unload_lora(model, merge=False)
        raise ValueError(f"{directory} does not fit this model: " + "; ".join(problems))
    with torch.no_grad():
        for key, place in places.items():
            place.copy_(tensors[key])
    if trainable:
        freeze_non_lora_params(model)
    else:
        model.requires_grad_(False)
    return model


def _peft_config(config: LoRAConfig) -> dict:
    targets = config.target_modules
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.use_rslora,
        "init_lora_weights": True,
        "modules_to_save": sorted(config.modules_to_save) or None,
    }


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that belongs to the adapter, by PEFT's key."""
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = module.lora_A
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = module.lora_B
    for path in _saved_paths(model, model.lora_config.modules_to_save):
        for name, tensor in model.get_submodule(path).state_dict(keep_vars=True).items():
            tensors[f"{_PREFIX}{path}.{name}"] = tensor
    return tensors


def _read(directory: Path) -> tuple[LoRAConfig, dict[str, Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}, so it is not an adapter")
    try:
        stored = json.loads((directory / CONFIG_FILE).read_text("utf-8"))
        tensors = load_file(directory / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"the adapter in {directory} is damaged ({error}); save it anew"
        ) from error
    if not isinstance(stored, dict):
        raise ValueError(f"the configuration in {directory} is not a JSON object; save it anew")
    _refuse_unsupported(stored, directory)
    targets = stored["target_modules"]
    config = LoRAConfig(
        rank=stored["r"],
        alpha=stored["lora_alpha"],
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        dropout=stored.get("lora_dropout", 0.0),
        use_rslora=stored.get("use_rslora", False),
        modules_to_save=tuple(stored.get("modules_to_save") or ()),
    )
    return config, tensors


def _refuse_unsupported(stored: dict, directory: Path) -> None:
    wanted = {"peft_type": "LORA", "bias": "none"}
    off = ("use_dora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
    problems = [f"{k} is {stored.get(k)!r}" for k, v in wanted.items() if stored.get(k) != v]
    problems += [f"{key} is {stored[key]!r}" for key in off if stored.get(key)]
    problems += [f"{key} is missing" for key in ("r", "lora_alpha", "target_modules")
                 if stored.get(key) is None]  # fmt: skip
    if problems:
        raise ValueError(f"{directory} uses what this library does not: " + "; ".join(problems))


def _mismatches(places: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    problems = [f"missing {key}" for key in places.keys() - tensors.keys()]
    problems += [f"unexpected {key}" for key in tensors.keys() - places.keys()]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the model needs {tuple(place.shape)}"
        for key, place in places.items()
        if key in tensors and tensors[key].shape != place.shape
    ]
    return sorted(problems)


def _replace(path: Path, write) -> None:
    """Write beside `path` and move into place, so that no reader sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
