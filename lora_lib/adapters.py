"""Save and load adapters in the format of Hugging Face PEFT: a directory with
`adapter_config.json` and `adapter_model.safetensors`.

`peft.PeftModel.from_pretrained(base, directory)` reads what `save_adapter` writes, and
`load_adapter` reads what PEFT writes: a tensor goes where `target_modules` points, and nowhere
else.
"""

import json
import pickle
import re
import warnings
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_lib import checks
from lora_lib.files import write_atomically
from lora_lib.injection import (
    Injection,
    freeze_non_lora_params,
    inject,
    injection_of,
    plain_modules,
    unload_lora,
)
from lora_lib.lora import LoRALinear, lora_layers, of_the_kind_of
from lora_lib.targets import Names, saved_paths, shape_of, target_paths

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # of PEFT before 0.5
_PREFIX = "base_model.model."  # PEFT wraps a model twice before it names its tensors


def _factor_key(path: str, factor: str) -> str:
    return f"{_PREFIX}{path}.lora_{factor}.weight"


# --- save ----------------------------------------------------------------------------------------


def save_adapter(model: nn.Module, directory: Path | str) -> Path:
    """Write the LoRA factors, and the modules in modules_to_save, as PEFT does.

    Each file is replaced whole or not at all. The metadata of the weights repeat the
    configuration, so that load_adapter recognises a directory that mixes two saves. Warns of
    parameters that train, and running statistics that moved, outside of what is saved.

    PEFT itself has no effect on a layer whose model reads `.weight` instead of calling it (WavLM's
    attention, Mamba's dt_proj, nn.MultiheadAttention's out_proj): there the adapter works here
    only. In transformers 5 PEFT turns gate_proj, up_proj and down_proj of mixture-of-experts
    models (DeepSeek-V3, GLM4-MoE, Qwen3-Next) into parameters of the experts, and drops the
    factors of their dense layers.

    Raises ValueError if the model has no LoRA layers, a parameter is not finite, or a strength
    (alpha) is one that no file can hold; nothing is written then.
    """
    injection = injection_of(model)
    config = json.dumps(_peft_config(injection), indent=2) + "\n"
    tensors = _adapter_tensors(injection)
    # A buffer may well be infinite: a causal mask.
    checks.check_finite({k: t for k, t in tensors.items() if isinstance(t, nn.Parameter)})
    _warn_of_what_stays_behind(model, injection, tensors)
    own = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    weights = save(own, {"format": "pt", CONFIG_FILE: config})
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / WEIGHTS_FILE, weights)
    write_atomically(directory / CONFIG_FILE, config.encode())
    return directory


def _peft_config(injection: Injection) -> dict:
    layers = injection.layers()
    for layer in layers.values():
        checks.check_settings(layer.rank, layer.alpha, 0.0, layer.use_rslora)
    first = next(iter(layers.values()))
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_just(p): m.rank for p, m in layers.items() if m.rank != rank},
        "alpha_pattern": {_just(p): m.alpha for p, m in layers.items() if m.alpha != alpha},
        "lora_dropout": getattr(first.dropout, "p", 0.0),
        "target_modules": _peft_targets(injection),
        "bias": "none",
        "fan_in_fan_out": all(layer.transposed for layer in layers.values()),
        "use_rslora": first.use_rslora,
        "init_lora_weights": True,
        "modules_to_save": sorted(injection.saved_names) or None,
    }


def _just(path: str) -> str:
    """A key of a pattern that matches this path and no longer one that ends so."""
    return "^" + re.escape(path)


def _peft_targets(injection: Injection) -> list[str] | str:
    """What means exactly these layers in PEFT: the names as given, the paths, or, where the rule
    for names finds more with them, a regular expression. ("all-linear" is another set there.)"""

    def means_these(names: list[str]) -> bool:
        return target_paths(injection.modules, names, saved=()) == paths

    paths = list(injection.layers())
    if isinstance(injection.targets, tuple) and means_these(injection.targets):
        return sorted(injection.targets)
    return paths if means_these(paths) else "|".join(map(re.escape, paths))


def _adapter_tensors(injection: Injection) -> dict[str, Tensor]:
    """Every tensor that belongs to the adapter, by PEFT's key."""
    tensors = {}
    for path, layer in injection.layers().items():
        tensors[_factor_key(path, "A")] = layer.lora_A
        tensors[_factor_key(path, "B")] = layer.lora_B
    for path, state in injection.saved_states().items():
        tensors |= {f"{_PREFIX}{path}.{name}": tensor for name, tensor in state.items()}
    return tensors


def _warn_of_what_stays_behind(
    model: nn.Module, injection: Injection, tensors: dict[str, Tensor]
) -> None:
    kept = {id(tensor) for tensor in tensors.values()}
    names = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if names:
        warnings.warn(
            f"{names[:3]} ({len(names)} in all) train and are not part of the adapter, so they are "
            "not saved: call freeze_non_lora_params(model) before training, or name their modules "
            "in modules_to_save",
            stacklevel=3,
        )
    means = [(path, norm.running_mean, before) for path, norm, before in injection.running_means]
    moved = [
        p for p, m, before in means if id(m) not in kept and not torch.equal(m.to(before), before)
    ]
    if moved:
        warnings.warn(
            f"the running statistics of {moved[:3]} ({len(moved)} in all) moved while training and "
            "are not saved: keep these norms in eval mode, or name them in modules_to_save",
            stacklevel=3,
        )


# --- load ----------------------------------------------------------------------------------------

Settings = dict[str, tuple[int, float]]  # rank and alpha of every targeted path


def load_adapter(model: nn.Module, directory: Path | str, trainable: bool = False) -> nn.Module:
    """Give `model` the adapter in `directory`: a plain model gets LoRA layers; one that has
    them, in these places and of these ranks, gets factors, strength and saved modules replaced.
    Frozen unless `trainable`.

    As in PEFT, names in target_modules that the model lacks are passed over, and an old
    `adapter_model.bin` is read if there is no other file; code in it never runs.

    Raises FileNotFoundError if a file is missing; ValueError if a file is damaged, the two files
    are of different saves, or the adapter does not fit the model or uses a PEFT feature that this
    library lacks, with everything that is wrong listed. The model is then as before.
    """
    directory = Path(directory).expanduser()
    config, tensors = _read(directory)
    adapted = injection_of(model) if any(lora_layers(model)) else None
    modules = adapted.modules if adapted else plain_modules(model)
    problems = _unsupported(config)
    try:
        saved = _saved(config, modules, tensors)
        settings = _settings(config, modules, saved, tensors)
        problems += _misfits(_places(settings, saved, modules), tensors, modules)
        problems += _differences(adapted, settings, saved) if adapted else []
        if not (adapted or problems):
            rest = config["lora_dropout"], config["use_rslora"], saved
            inject(modules, settings, tuple(settings), *rest)
    except (TypeError, ValueError, re.error) as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{directory} does not fit this model: " + "; ".join(problems))
    try:
        _fill(injection_of(model), tensors, settings, config["use_rslora"])
    except BaseException:  # interrupted
        if not adapted:
            unload_lora(model, merge=False)
        raise
    model.requires_grad_(False)
    if trainable:
        freeze_non_lora_params(model)
    return model


def _fill(
    injection: Injection, tensors: dict[str, Tensor], settings: Settings, use_rslora: bool
) -> None:
    places = _adapter_tensors(injection)
    before = {key: place.detach().clone() for key, place in places.items()}
    try:
        _copy_into(places, tensors)
    except BaseException:
        _copy_into(places, before)
        raise
    for path, layer in injection.layers().items():
        layer.alpha, layer.use_rslora = float(settings[path][1]), use_rslora


def _copy_into(places: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for key, place in places.items():
        with of_the_kind_of(place):
            place.copy_(tensors[key])


# --- reading -------------------------------------------------------------------------------------

# PEFT's settings that say what is computed, and what they are if the file leaves them out.
_READ = {
    "r": None,
    "lora_alpha": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_dropout": 0.0,
    "use_rslora": False,
    "target_modules": None,
    "exclude_modules": (),
    "modules_to_save": (),
}
_ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # they keep W as it is
}
# What changes nothing in what a loaded adapter computes.
_HARMLESS = {
    "task_type",  # but see _HEADS
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "auto_mapping",
    "megatron_core",
    "qalora_group_size",
    "fan_in_fan_out",  # the layer itself says so
    "eva_config",
    "corda_config",
    "loraplus_lr_ratio",
    "loraplus_lr_embedding",
}
# The heads that PEFT saves for a task, also where modules_to_save is null.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    """The configuration, with defaults for what it leaves out, and the tensors by key."""
    configured = (directory / CONFIG_FILE).is_file()
    weights = [name for name in (WEIGHTS_FILE, PICKLED_FILE) if (directory / name).is_file()]
    if not (configured and weights):
        raise FileNotFoundError(
            f"there is no {WEIGHTS_FILE if configured else CONFIG_FILE} in {directory}; an adapter "
            f"is a local directory with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    try:
        config = json.loads((directory / CONFIG_FILE).read_text("utf-8"))
        tensors, saved_with = _read_weights(directory / weights[0])
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{directory / PICKLED_FILE} holds more than tensors, and was not run ({error})"
        ) from error
    except Exception as error:  # safetensors, pickle and JSON have many ways to say so
        raise ValueError(
            f"the adapter in {directory} is damaged ({error}); save it anew, or restore one of the "
            "course with `git checkout -- lora_lib/pretrained`"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"the configuration in {directory} is not a JSON object; save it anew")
    differing = [
        f"{key} is {config.get(key)!r} in {CONFIG_FILE} and {saved_with.get(key)!r} in the "
        f"metadata of {WEIGHTS_FILE}"
        for key in _READ
        if saved_with is not None and (config.get(key) or None) != (saved_with.get(key) or None)
    ]
    if differing:
        raise ValueError(
            f"{directory} mixes two saves: {'; '.join(differing)}; put the configuration of "
            "the metadata back, or save it anew"
        )
    return {"peft_type": None} | _READ | config, tensors


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors, and the configuration they were saved with, if that is known."""
    if path.name == PICKLED_FILE:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {str(key): tensor.to_dense() for key, tensor in tensors.items()}, None
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads((file.metadata() or {}).get(CONFIG_FILE, "null"))


def _unsupported(config: dict) -> list[str]:
    """Settings that would change the result. One that is not known is taken to do so."""

    def harmless(key: str, value: object) -> bool:
        if key in _ALLOWED:
            return value in _ALLOWED[key]
        known = key in _READ or key in _HARMLESS
        return known or value is None or value is False or value in ([], {}, "")

    on = {key: value for key, value in config.items() if not harmless(key, value)}
    return [f"{key} is {value!r}, which this library lacks" for key, value in on.items()]


def _saved(config: dict, modules: dict[str, nn.Module], tensors: dict) -> tuple[str, ...]:
    """The paths of modules_to_save, those included that a task brings along."""
    names = checks.name_list(config["modules_to_save"] or (), "modules_to_save")
    saved = saved_paths(modules, names)
    heads = saved_paths(modules, _HEADS.get(config.get("task_type"), ()))
    if not any(key.startswith(f"{_PREFIX}{path}.") for key in tensors for path in heads):
        heads = []
    return (*saved, *(path for path in heads if path not in saved))


def _settings(
    config: dict, modules: dict[str, nn.Module], saved: tuple[str, ...], tensors: dict
) -> Settings:
    targets, excluded = config["target_modules"], config["exclude_modules"] or ()
    if targets == "all-linear":  # which layers those are depends on who saved it
        targets = tuple(path for path in modules if _factor_key(path, "A") in tensors)
    targets, excluded = _names(targets, "target_modules"), _names(excluded, "exclude_modules")
    paths = target_paths(modules, targets, saved, excluded)
    if not paths:
        raise ValueError(f"target_modules {config['target_modules']!r} match nothing in this model")
    settings = {
        path: (
            _by_pattern(config["rank_pattern"], path, config["r"]),
            _by_pattern(config["alpha_pattern"], path, config["lora_alpha"]),
        )
        for path in paths
    }
    for rank, alpha in settings.values():
        checks.check_settings(rank, alpha, config["lora_dropout"], config["use_rslora"])
    return settings


def _names(targets: object, argument: str) -> Names:
    """In PEFT's file a string is a regular expression."""
    return re.compile(targets) if isinstance(targets, str) else checks.name_list(targets, argument)


def _by_pattern(pattern: dict | None, path: str, otherwise: object) -> object:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the path."""
    found = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(found, (pattern or {}).get(path, otherwise))


# --- does it fit? --------------------------------------------------------------------------------


def _places(
    settings: Settings, saved: tuple[str, ...], modules: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """What each key of the file has to be like; a factor stands here without memory."""
    places = {}
    for path, (rank, _) in settings.items():
        if not isinstance(modules[path], LoRALinear):
            checks.check_linear(modules[path], f"target {path!r}")
        d_out, d_in = shape_of(modules[path])
        for name, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            places[_factor_key(path, name)] = nn.Parameter(torch.empty(shape, device="meta"))
    for path in saved:
        state = modules[path].state_dict(keep_vars=True)
        places |= {f"{_PREFIX}{path}.{name}": tensor for name, tensor in state.items()}
    return places


def _misfits(
    places: dict[str, Tensor], tensors: dict[str, Tensor], modules: dict[str, nn.Module]
) -> list[str]:
    problems = [f"missing {key}" for key in places.keys() - tensors.keys()]
    for key, tensor in tensors.items():
        place = places.get(key)
        if place is None:
            problems += _problem_with_extra(key, tensor, modules)
        elif tensor.shape != place.shape:
            shapes = tuple(tensor.shape), tuple(place.shape)
            problems.append(f"{key} has shape {shapes[0]}, the model needs {shapes[1]}")
        elif tensor.is_floating_point() != place.is_floating_point():
            problems.append(f"{key} is {tensor.dtype}, the model needs {place.dtype}")
        elif isinstance(place, nn.Parameter) and not tensor.float().isfinite().all():
            problems.append(f"{key} is not finite")
    return sorted(problems)


def _problem_with_extra(key: str, tensor: Tensor, modules: dict[str, nn.Module]) -> list[str]:
    """PEFT adds whole weights of the base, those of a targeted output layer or of embeddings. They
    say which base the adapter is for; with the same one there is no problem."""
    path, _, name = key.removeprefix(_PREFIX).rpartition(".")
    module = modules.get(path.removesuffix(".base_layer"))
    of_base = getattr(module, "original", module)
    weight = None if of_base is None else of_base._parameters.get(name)
    if weight is None:
        return [f"unexpected {key}"]
    if weight.shape == tensor.shape and torch.equal(weight.cpu(), tensor.to(weight.dtype)):
        return []
    return [
        f"unexpected {key}: it is a whole weight of the base that the adapter was trained on, and "
        "this model's is another one; was the vocabulary resized? Give the model that weight, or "
        "save it with the adapter as one of modules_to_save"
    ]


def _differences(injection: Injection, settings: Settings, saved: tuple[str, ...]) -> list[str]:
    """What would have to change on a model that has LoRA already."""
    layers, problems = injection.layers(), []
    if {p: m.rank for p, m in layers.items()} != {p: rank for p, (rank, _) in settings.items()}:
        problems.append("its LoRA layers are others, or of other ranks")
    if set(saved) != set(injection.saved_before):
        on_model = tuple(injection.saved_before)
        problems.append(f"modules_to_save are {saved}, but {on_model} on the model")
    if any(layer.merged for layer in layers.values()):
        problems.append("the model is merged; call unmerge_lora_weights(model) first")
    advice = "to give a model that has LoRA another, call unload_lora(model, merge=False) first"
    return [*problems, advice] if problems else []
