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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lora_lib.checks import check_finite, check_linear, check_settings, name_list
from lora_lib.files import write_atomically
from lora_lib.injection import Injection, freeze_non_lora_params, inject, injection_of
from lora_lib.lora import LoRALinear, lora_layers
from lora_lib.targets import saved_in_peft, shape_of, target_paths

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"  # of PEFT before 0.5
_PREFIX = "base_model.model."  # PEFT wraps a model twice before it names its tensors

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

    Raises ValueError if the model has no LoRA layers, a tensor is not finite, or a strength
    (alpha) is one that no file can hold; nothing is written then.
    """
    injection = injection_of(model)
    config = json.dumps(_peft_config(injection), indent=2) + "\n"
    tensors = _adapter_tensors(injection)
    check_finite(_trained(injection))
    _warn_of_what_stays_behind(model, injection)
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
        check_settings(layer.rank, layer.alpha, 0.0, layer.use_rslora)
    ranks, alphas = ({p: getattr(m, name) for p, m in layers.items()} for name in ("rank", "alpha"))
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(path): a for path, a in alphas.items() if a != alpha},
        "lora_dropout": getattr(first.dropout, "p", 0.0),
        "target_modules": _peft_targets(injection),
        "bias": "none",
        "fan_in_fan_out": all(layer.transposed for layer in layers.values()),
        "use_rslora": first.use_rslora,
        "init_lora_weights": True,
        "modules_to_save": sorted(injection.saved) or None,
    }


def _peft_targets(injection: Injection) -> list[str] | str:
    """Names as they were given, if for PEFT they mean these layers. Otherwise the paths, because
    "all-linear" is another set of layers there; or where the rule for names finds more with these,
    a regular expression."""
    paths, modules = list(injection.layers()), injection.modules
    saved = saved_in_peft(modules, injection.saved)
    for names in (injection.targets, paths):
        if isinstance(names, (tuple, list)) and target_paths(modules, names, saved) == paths:
            return sorted(names) if names is injection.targets else names
    return "|".join(map(re.escape, paths))


def _adapter_tensors(injection: Injection) -> dict[str, Tensor]:
    """Every tensor that belongs to the adapter, by PEFT's key."""
    injection.check_saved_names()
    tensors = {}
    for path, layer in injection.layers().items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_B
    for path in injection.saved_before:
        for name, tensor in injection.modules[path].state_dict(keep_vars=True).items():
            tensors[f"{_PREFIX}{path}.{name}"] = tensor
    return tensors


def _trained(injection: Injection) -> dict[str, Tensor]:
    """Those of them that are parameters: a buffer may well be infinite, a causal mask say."""
    return {k: t for k, t in _adapter_tensors(injection).items() if isinstance(t, nn.Parameter)}


def _warn_of_what_stays_behind(model: nn.Module, injection: Injection) -> None:
    kept = {id(tensor) for tensor in _adapter_tensors(injection).values()}
    names = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if names:
        warnings.warn(
            f"{names[:3]} ({len(names)} in all) train and are not part of the adapter, so they are "
            "not saved: call freeze_non_lora_params(model) before training, or name their modules "
            "in modules_to_save",
            stacklevel=3,
        )
    moved = [
        path
        for path, norm, before in injection.statistics
        if id(norm.running_mean) not in kept
        and not torch.equal(norm.running_mean.to(before), before)
    ]
    if moved:
        warnings.warn(
            f"the running statistics of {moved[:3]} ({len(moved)} in all) moved while training and "
            "are not saved: keep these norms in eval mode, or name them in modules_to_save",
            stacklevel=3,
        )


# --- load ----------------------------------------------------------------------------------------

# Of PEFT's other settings, those that change nothing in what a loaded adapter computes.
_HARMLESS = (
    *("task_type", "base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("auto_mapping", "megatron_core", "qalora_group_size", "fan_in_fan_out"),
    *("eva_config", "corda_config", "loraplus_lr_ratio", "loraplus_lr_embedding"),
)
_READ = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("modules_to_save", "rank_pattern", "alpha_pattern"),
)
_ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # they keep W as it is
}
# The heads that PEFT saves for a task, also where modules_to_save is null.
_HEADS = dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score"))
_HEADS["QUESTION_ANS"] = ("qa_outputs",)


@torch.inference_mode(False)
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
    modules = (
        adapted.modules if adapted else dict(getattr(model, "_orig_mod", model).named_modules())
    )
    problems = _unsupported(config)
    try:
        settings, saved = _settings(config, modules, tensors)
        problems += _misfits(_places(settings, saved, modules), tensors, modules)
        if adapted:
            problems += _differences(adapted, settings, saved)
        elif not problems:
            inject(
                getattr(model, "_orig_mod", model),
                settings,
                tuple(settings),
                config.get("lora_dropout", 0.0),
                config.get("use_rslora", False),
                saved,
            )
    except (TypeError, ValueError, re.error) as error:
        problems.append(str(error))
    if problems:
        raise ValueError(f"{directory} does not fit this model: " + "; ".join(problems))
    _fill(injection_of(model), tensors, settings, config.get("use_rslora", False))
    if trainable:
        freeze_non_lora_params(model)
    else:
        model.requires_grad_(False)
    return model


@torch.no_grad()
def _fill(
    injection: Injection, tensors: dict[str, Tensor], settings: dict, use_rslora: bool
) -> None:
    """All of it or, if it is interrupted, nothing."""
    places = _adapter_tensors(injection)
    before = {key: place.clone() for key, place in places.items()}
    try:
        for key, place in places.items():
            place.copy_(tensors[key])
    except BaseException:
        for key, place in places.items():
            place.copy_(before[key])
        raise
    for path, layer in injection.layers().items():
        layer.alpha, layer.use_rslora = float(settings[path][1]), use_rslora


# --- reading -------------------------------------------------------------------------------------


def _read(directory: Path) -> tuple[dict, dict[str, Tensor]]:
    weights = next((directory / name for name in (WEIGHTS_FILE, PICKLED_FILE)
                    if (directory / name).is_file()), None)  # fmt: skip
    configured = (directory / CONFIG_FILE).is_file()
    if weights is None or not configured:
        missing = WEIGHTS_FILE if configured else CONFIG_FILE
        raise FileNotFoundError(
            f"there is no {missing} in {directory}; an adapter is a local directory with "
            f"{CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    saved_with = None
    try:
        config = json.loads((directory / CONFIG_FILE).read_text("utf-8"))
        if weights.name == PICKLED_FILE:
            tensors = torch.load(weights, map_location="cpu", weights_only=True)
        else:
            with safe_open(weights, "pt") as file:
                saved_with = json.loads((file.metadata() or {}).get(CONFIG_FILE, "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except pickle.UnpicklingError as error:
        raise ValueError(f"{weights} holds more than tensors, and was not run ({error})") from error
    except (ValueError, RuntimeError, EOFError, SafetensorError) as error:
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
    return config, tensors


def _unsupported(config: dict) -> list[str]:
    """What changes what PEFT computes. A setting that is not known is taken to do so."""
    known = {*_ALLOWED, *_READ, *_HARMLESS}
    config = {"peft_type": None} | config
    on = [
        key
        for key, value in config.items()
        if (key in _ALLOWED and value not in _ALLOWED[key])
        or not (key in known or value is None or value is False or value in ([], {}, ""))
    ]
    return [f"{key} is {config[key]!r}, which this library lacks" for key in on]


def _settings(
    config: dict, modules: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> tuple[dict[str, tuple[int, float]], tuple[str, ...]]:
    """Path → rank and alpha of every targeted module, and the paths of the saved ones."""
    names = name_list(config.get("modules_to_save") or (), "modules_to_save")
    saved = saved_in_peft(modules, names)
    heads = saved_in_peft(modules, _HEADS.get(config.get("task_type"), ()))
    in_file = {key.removeprefix(_PREFIX).rpartition(".")[0] for key in tensors}
    saved += [path for path in heads if path in in_file and path not in saved]
    excluded = _pattern_or_names(config.get("exclude_modules") or (), "exclude_modules")
    targets = config.get("target_modules")
    if targets == "all-linear":  # which layers those are depends on who saved it
        targets = tuple(p for p in modules if f"{_PREFIX}{p}.lora_A.weight" in tensors)
    paths = target_paths(modules, _pattern_or_names(targets, "target_modules"), saved, excluded)
    if not paths:
        raise ValueError(f"target_modules {targets!r} match nothing in this model")
    settings = {
        path: (
            _by_pattern(config.get("rank_pattern"), path, config.get("r")),
            _by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha")),
        )
        for path in paths
    }
    rest = config.get("lora_dropout", 0.0), config.get("use_rslora", False)
    for rank, alpha in settings.values():
        check_settings(rank, alpha, *rest)
    return settings, tuple(saved)


def _pattern_or_names(targets: object, argument: str) -> tuple[str, ...] | re.Pattern:
    return re.compile(targets) if isinstance(targets, str) else name_list(targets, argument)


def _by_pattern(pattern: dict | None, path: str, otherwise: object) -> object:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the path."""
    found = (v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", path))
    return next(found, otherwise)


def _places(
    settings: dict[str, tuple[int, float]], saved: tuple[str, ...], modules: dict[str, nn.Module]
) -> dict[str, Tensor]:
    """What each key of the file has to be like; a factor stands here without memory."""
    places = {}
    for path, (rank, _) in settings.items():
        if not isinstance(modules[path], LoRALinear):
            check_linear(modules[path], f"target {path!r}")
        d_out, d_in = shape_of(modules[path])
        for name, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            factor = nn.Parameter(torch.empty(shape, device="meta"))
            places[f"{_PREFIX}{path}.lora_{name}.weight"] = factor
    for path in saved:
        for name, tensor in modules[path].state_dict(keep_vars=True).items():
            places[f"{_PREFIX}{path}.{name}"] = tensor
    return places


def _misfits(
    places: dict[str, Tensor], tensors: dict[str, Tensor], modules: dict[str, nn.Module]
) -> list[str]:
    problems = [f"missing {key}" for key in places.keys() - tensors.keys()]
    for key, tensor in tensors.items():
        place = places.get(key)
        if place is None:
            problems += _unexpected(key, tensor, modules)
        elif tensor.shape != place.shape:
            shapes = tuple(tensor.shape), tuple(place.shape)
            problems.append(f"{key} has shape {shapes[0]}, the model needs {shapes[1]}")
        elif tensor.is_floating_point() != place.is_floating_point():
            problems.append(f"{key} is {tensor.dtype}, the model needs {place.dtype}")
        elif isinstance(place, nn.Parameter) and not tensor.isfinite().all():
            problems.append(f"{key} is not finite")  # a buffer may be: a causal mask
    return sorted(problems)


def _unexpected(key: str, tensor: Tensor, modules: dict[str, nn.Module]) -> list[str]:
    """PEFT adds whole weights of the base, those of a targeted output layer or of embeddings. They
    say which base the adapter is for."""
    path, _, name = key.removeprefix(_PREFIX).rpartition(".")
    module = modules.get(path.removesuffix(".base_layer"))
    of_base = getattr(module, "original", module)
    if of_base is None or name not in of_base._parameters:
        return [f"unexpected {key}"]
    weight = of_base._parameters[name]
    if weight.shape == tensor.shape and torch.equal(weight.cpu(), tensor.to(weight.dtype)):
        return []
    return [
        f"unexpected {key}: it is a whole weight of the base that the adapter was trained on, and "
        "this model's is another one; was the vocabulary resized? Give the model that weight, or "
        "save it with the adapter as one of modules_to_save"
    ]


def _differences(
    injection: Injection, settings: dict[str, tuple[int, float]], saved: tuple[str, ...]
) -> list[str]:
    """What would have to change on a model that has LoRA already."""
    layers, problems = injection.layers(), []
    if {path: layer.rank for path, layer in layers.items()} != {
        p: r for p, (r, _) in settings.items()
    }:
        problems.append("its LoRA layers are others, or of other ranks")
    if set(saved) != set(injection.saved_before):
        problems.append(f"modules_to_save are {saved}, but {injection.saved} on the model")
    if any(layer.merged for layer in layers.values()):
        problems.append("the model is merged; call unmerge_lora_weights(model) first")
    advice = "to give a model that has LoRA another, call unload_lora(model, merge=False) first"
    return [*problems, advice] if problems else []
