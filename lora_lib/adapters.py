"""Save and load adapters in the format of Hugging Face PEFT: a directory with
`adapter_config.json` and `adapter_model.safetensors`.

`peft.PeftModel.from_pretrained(base, directory)` reads what `save_adapter` writes, and
`load_adapter` reads what PEFT writes.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_lib.files import write_atomically
from lora_lib.lora import (
    LoRALinear,
    add_lora_to_model,
    freeze_non_lora_params,
    inner_model,
    lora_layers,
    require_config,
    unload_lora,
)
from lora_lib.targets import LoRAConfig, inside, matches, name_list, saved_in_peft

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT wraps a model twice before it names its tensors
# Of PEFT's other settings, those that change nothing in what a model computes.
_HARMLESS = (
    *("task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("auto_mapping", "eva_config", "megatron_core", "qalora_group_size"),
)
_SETTINGS = "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save"

# --- save ----------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, directory: Path | str) -> Path:
    """Write the LoRA factors, and the modules in modules_to_save, as PEFT does.

    Each file is replaced whole or not at all. The metadata of the weights repeat the
    configuration, so that load_adapter recognises a directory that mixes two saves.

    Raises ValueError if the model has no LoRA layers.
    """
    config = json.dumps(_peft_config(model), indent=2) + "\n"
    tensors = {key: t.detach().cpu().contiguous() for key, t in _adapter_tensors(model).items()}
    weights = save(tensors, {"format": "pt", CONFIG_FILE: config})
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / WEIGHTS_FILE, weights)
    write_atomically(directory / CONFIG_FILE, config.encode())
    return directory


def _peft_config(model: nn.Module) -> dict:
    config = require_config(model)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": _peft_targets(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": config.use_rslora,
        "init_lora_weights": True,
        "modules_to_save": sorted(config.modules_to_save) or None,
    }


def _peft_targets(model: nn.Module) -> list[str] | str:
    """Names as they were given. Otherwise the paths, because "all-linear" is another set of layers
    in PEFT; where the rule for names would find more with them, as a regular expression."""
    targets = require_config(model).target_modules
    if isinstance(targets, tuple):
        return sorted(targets)
    modules = dict(inner_model(model).named_modules())
    paths = [path for path, module in modules.items() if isinstance(module, LoRALinear)]
    others = [path for path in modules if not inside(path, paths)]
    if any(matches(other, path) for other in others for path in paths):
        return "|".join(map(re.escape, paths))
    return paths


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that belongs to the adapter, by PEFT's key."""
    tensors, inner = {}, inner_model(model)
    for path, module in inner.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{_PREFIX}{path}.lora_A.weight"] = module.lora_A
            tensors[f"{_PREFIX}{path}.lora_B.weight"] = module.lora_B
    for path in saved_in_peft(inner, require_config(model).modules_to_save):
        for name, tensor in inner.get_submodule(path).state_dict(keep_vars=True).items():
            tensors[f"{_PREFIX}{path}.{name}"] = tensor
    return tensors


# --- load ----------------------------------------------------------------------------------------


def load_adapter(model: nn.Module, directory: Path | str, trainable: bool = False) -> nn.Module:
    """Give `model` the adapter in `directory`: a plain model gets LoRA layers, a model that has
    equally configured ones gets their factors replaced. Frozen unless `trainable`.

    Raises FileNotFoundError if a file is missing; ValueError if a file is damaged, the two files
    are of different saves, or the adapter does not fit the model or uses a PEFT feature that this
    library lacks, with everything that is wrong listed. The model is then as before.
    """
    directory = Path(directory)
    stored, tensors = _read(directory)
    problems = _unsupported(stored)
    fresh = not any(lora_layers(model))
    try:
        settings = _settings(stored, model)
        if fresh:
            add_lora_to_model(model, **settings)
        problems += _differences(require_config(model), settings)
        problems += _misfits(_adapter_tensors(model), tensors)
        if any(layer.merged for layer in lora_layers(model)):
            problems.append("the model is merged; call unmerge_lora_weights(model) first")
    except (TypeError, ValueError, re.error) as error:
        problems.append(str(error))
    if problems:
        if not fresh:
            problems.append(
                "the model has LoRA layers already: to give it others, call "
                "unload_lora(model, merge=False) first"
            )
        elif any(lora_layers(model)):
            unload_lora(model, merge=False)
        raise ValueError(f"{directory} does not fit this model: " + "; ".join(problems))
    with torch.no_grad():
        for key, place in _adapter_tensors(model).items():
            place.copy_(tensors[key])
    if trainable:
        freeze_non_lora_params(model)
    else:
        model.requires_grad_(False)
    return model


def _read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"there is no {name} in {directory}; an adapter is a local directory with "
                f"{CONFIG_FILE} and {WEIGHTS_FILE} (pickled .bin files are never read)"
            )
    try:
        stored = json.loads((directory / CONFIG_FILE).read_text("utf-8"))
        with safe_open(directory / WEIGHTS_FILE, "pt") as file:
            saved_with = json.loads((file.metadata() or {}).get(CONFIG_FILE, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"the adapter in {directory} is damaged ({error}); save it anew, or restore one of the "
            "course with `git checkout -- lora_lib/pretrained`"
        ) from error
    if not isinstance(stored, dict):
        raise ValueError(f"the configuration in {directory} is not a JSON object; save it anew")
    if saved_with is not None:
        differing = [
            f"{key} is {stored.get(key)!r} in {CONFIG_FILE} and {saved_with.get(key)!r} in the "
            f"metadata of {WEIGHTS_FILE}"
            for key in _SETTINGS
            if stored.get(key) != saved_with.get(key)
        ]
        if differing:
            raise ValueError(
                f"{directory} mixes two saves: {'; '.join(differing)}; put the configuration of "
                "the metadata back, or save it anew"
            )
    return stored, tensors


def _unsupported(stored: dict) -> list[str]:
    """What changes what PEFT computes. A setting that is not known is taken to do so."""
    allowed = {
        "peft_type": ("LORA",),
        "bias": ("none",),
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # keep W as it is
    }
    harmless = {*allowed, *_SETTINGS, *_HARMLESS}
    stored = {"peft_type": None} | stored
    on = [
        key
        for key, value in stored.items()
        if (key in allowed and value not in allowed[key])
        or (key not in harmless and not (value is None or value is False or value in ([], {})))
    ]
    return [f"{key} is {stored[key]!r}, which this library lacks" for key in on]


def _settings(stored: dict, model: nn.Module) -> dict:
    """The arguments of add_lora_to_model. What is missing or of a wrong type, that one refuses."""
    targets = stored.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        targets = re.compile(targets)
    names = name_list(stored.get("modules_to_save") or (), "modules_to_save")
    return {
        "rank": stored.get("r"),
        "alpha": stored.get("lora_alpha"),
        "dropout": stored.get("lora_dropout", 0.0),
        "use_rslora": stored.get("use_rslora", False),
        "target_modules": targets,
        # As paths: PEFT writes all the usual names of a head, of which the model has one.
        "modules_to_save": saved_in_peft(inner_model(model), names),
    }


def _differences(config: LoRAConfig, settings: dict) -> list[str]:
    return [
        f"{name} is {settings[name]!r}, but {getattr(config, name)!r} on the model"
        for name in ("rank", "alpha", "dropout", "use_rslora")
        if settings[name] != getattr(config, name)
    ]


def _misfits(places: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    problems = [f"missing {key}" for key in places.keys() - tensors.keys()]
    problems += [f"unexpected {key}" for key in tensors.keys() - places.keys()]
    for key in places.keys() & tensors.keys():
        place, tensor = places[key], tensors[key]
        if tensor.shape != place.shape:
            shapes = tuple(tensor.shape), tuple(place.shape)
            problems.append(f"{key} has shape {shapes[0]}, the model needs {shapes[1]}")
        elif tensor.is_floating_point() != place.is_floating_point():
            problems.append(f"{key} is {tensor.dtype}, the model needs {place.dtype}")
        elif not tensor.isfinite().all():
            problems.append(f"{key} is not finite")
        elif place.is_meta:
            problems.append(f"{key} has no memory (meta device): give the model its weights first")
    return sorted(problems)
