"""What ships with the library: the base, its tokenizer, and an adapter for each of six scripts."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_lib.adapters import CONFIG_FILE
from lora_lib.model import SmallTransformer
from lora_lib.tokens import Tokenizer

PRETRAINED = Path(__file__).parent / "pretrained"
BASE_FILE = PRETRAINED / "base.safetensors"
ADAPTERS = PRETRAINED / "adapters"
_REMEDY = (
    "restore it with `git checkout -- lora_lib/pretrained` or from a new download of the course, "
    "or train it anew with `python -m lora_course.experiments.pretrain`"
)


def load_pretrained(
    path: Path | str = BASE_FILE, *, dropout: float | None = None
) -> tuple[SmallTransformer, Tokenizer]:
    """The pretrained base, on the CPU and in eval mode, and its tokenizer.

    `dropout` is that of the base's own layers while it trains; None: as in its pretraining.

    Raises FileNotFoundError if the file is missing, ValueError if it is truncated, of another
    format, or its configuration is not that of a SmallTransformer that its weights fit, or for a
    dropout outside [0, 1).
    """
    if dropout is not None and not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; it must be at least 0 and less than 1")
    metadata = read_metadata(path)
    config = metadata["config"] | ({} if dropout is None else {"dropout": dropout})
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        model = SmallTransformer(**config)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the weights in {path} do not fit its configuration: {error}") from error
    return model.eval(), Tokenizer(metadata["characters"])


def read_metadata(path: Path | str = BASE_FILE) -> dict:
    """`config` (of SmallTransformer), `characters` (of the tokenizer) and `provenance` of a base
    file, which lie beside the weights in its metadata; raises as load_pretrained does."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no base model at {path}; {_REMEDY}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({error}); {_REMEDY}"
        ) from error
    missing = {"config", "characters", "provenance"} - metadata.keys()
    if missing:
        raise ValueError(
            f"{path} is a safetensors file, but not a base model of this course: its metadata "
            f"lacks {', '.join(sorted(missing))}; {_REMEDY}"
        )
    return {
        # A file from before there was the setting holds a language model; there were no others.
        "config": {"language_model": True} | json.loads(metadata["config"]),
        "characters": metadata["characters"],
        "provenance": json.loads(metadata["provenance"]),
    }


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
