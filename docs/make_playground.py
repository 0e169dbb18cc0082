"""The page on which the base and its adapters run in a browser: `make playground`.

A folder for any static host: docs/playground as it stands, and one file with all that it computes
with. That is a gzipped safetensors file: the shipped weights in float16, the directions of every
B A turned so that the strongest comes first (B A stays), and in its metadata what the page has to
know of them, with the recorded spellings of towns that no training has seen.
"""

import gzip
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lora_lib.adapters import load_adapter
from lora_lib.lora import count_parameters, lora_layers
from lora_lib.names import BASE_SCRIPT, SCRIPTS, is_latin, load_spellings
from lora_lib.pretrained import adapter_directory, load_pretrained, read_metadata
from lora_lib.tokens import Tokenizer

DOCS = Path(__file__).parent
DATA = "model.safetensors.gzip"  # not .gz: some hosts unzip that themselves


def strongest_first(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) of the same product, in the order of its singular values."""
    u, s, vt = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    share = s[: len(A)].sqrt()  # of the strength; each factor has half of it
    return share[:, None] * vt[: len(A)], u[:, : len(A)] * share


@torch.no_grad()
def data() -> bytes:
    """The base under its own names, and of the layer at `path`, as the adapter of `script` has it,
    `script.path.A` (r, d_in) and `script.path.B`, transposed (r, d_out): row k is direction k."""
    base, tokenizer = load_pretrained()
    layers = {path: m for path, m in base.named_modules() if isinstance(m, nn.Linear)}
    tensors = dict(base.state_dict())
    scales = {BASE_SCRIPT: 0.0}  # the base: an adapter without directions
    for script in SCRIPTS:
        model = load_adapter(load_pretrained()[0], adapter_directory(script))
        for path, layer in zip(layers, lora_layers(model), strict=True):
            A, B = strongest_first(layer.lora_A, layer.lora_B)
            tensors |= {f"{script}.{path}.A": A, f"{script}.{path}.B": B.T}
            scales[script] = layer.scaling
    latin = (c for c in map(chr, range(sys.maxunicode + 1)) if is_latin(c))
    known = {
        "config": read_metadata()["config"],
        "characters": tokenizer.characters,
        "readable": "".join(c for c in latin if Tokenizer.UNK not in tokenizer.encode(c)),
        "room": base.max_len - len(tokenizer.prompt("")) - 1,  # one letter is to be written
        "paths": list(layers),
        "scales": scales,
        "spellings": {script: load_spellings(script, "test") for script in scales},
        "counts": {
            "all": count_parameters(base),
            "linear": sum(layer.weight.numel() for layer in layers.values()),
            "direction": sum(sum(layer.weight.shape) for layer in layers.values()),
        },
    }
    half = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    return save(half, {"page": json.dumps(known, ensure_ascii=False)})


def write(folder: Path) -> Path:
    """The page in `folder`, made anew: what stood there before is gone."""
    content = gzip.compress(data(), mtime=0)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS / "playground", folder)
    shutil.copy(DOCS / "_static" / "icon.svg", folder)
    (folder / DATA).write_bytes(content)
    return folder / "index.html"


if __name__ == "__main__":
    print(write(DOCS / "_build" / "playground"))
