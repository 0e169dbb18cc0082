"""The page on which the base and its adapters run in a browser: `make playground`.

A folder for any static host: docs/playground as it stands; the shipped weights in float16, the
directions of every B A turned so that the strongest comes first (B A stays); the recorded spellings
of towns that no training has seen. Data is gzipped, and files.json says how large each file is.
"""

import gzip
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lora_lib.adapters import CONFIG_FILE, WEIGHTS_FILE
from lora_lib.names import BASE_SCRIPT, SCRIPTS, load_spellings
from lora_lib.pretrained import BASE_FILE, adapter_directory, read_metadata

DOCS = Path(__file__).parent


def strongest_first(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) of the same product, in the order of its singular values."""
    u, s, vt = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    share = s[: len(A)].sqrt()  # of the strength; each factor has half of it
    return share[:, None] * vt[: len(A)], u[:, : len(A)] * share


def float16(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    for a in [name for name in tensors if ".lora_A." in name]:
        b = a.replace(".lora_A.", ".lora_B.")
        tensors[a], tensors[b] = strongest_first(tensors[a], tensors[b])
    return save({name: t.half().contiguous() for name, t in tensors.items()}, metadata)


def write(folder: Path) -> Path:
    """The page in `folder`, made anew: what stood there before is gone."""
    base = read_metadata()
    metadata = {"config": json.dumps(base["config"]), "characters": base["characters"]}
    files = {"base.safetensors": float16(load_file(BASE_FILE), metadata)}
    for script in SCRIPTS:
        adapter = adapter_directory(script)
        metadata = {"config": (adapter / CONFIG_FILE).read_text("utf-8")}
        files[f"{script}.safetensors"] = float16(load_file(adapter / WEIGHTS_FILE), metadata)
    spellings = {script: load_spellings(script, "test") for script in (BASE_SCRIPT, *SCRIPTS)}
    files["spellings.json"] = json.dumps(spellings, ensure_ascii=False).encode()
    zipped = {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS / "playground", folder)
    shutil.copy(DOCS / "_static" / "icon.svg", folder)
    for name, content in zipped.items():
        (folder / name).write_bytes(content)
    (folder / "files.json").write_text(json.dumps({n: len(c) for n, c in zipped.items()}), "utf-8")
    return folder / "index.html"


if __name__ == "__main__":
    print(write(DOCS / "_build" / "playground"))
