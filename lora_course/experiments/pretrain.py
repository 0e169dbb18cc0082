"""Train the base that the course ships: `python -m lora_course.experiments.pretrain`.

It learns to write Latin names in Cyrillic and, where a tag asks for it, in Arabic, and to spell
names of the other scripts alone, so that it knows their letters without knowing how to get there
from Latin. Minutes on a GPU, some hours on two CPU cores; a run that was stopped goes on from its
last checkpoint.

The second script is there because it helps what is adapted later: with it, the mean exact match of
the six adapted scripts rose in both of two pretraining seeds, most with few pairs.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from lora_course.experiments.recording import provenance
from lora_lib.model import SmallTransformer, default_device
from lora_lib.names import BASE_SCRIPT, SCRIPTS, SECOND_SCRIPT, cache_folder, load_pairs
from lora_lib.pretrained import BASE_FILE
from lora_lib.scores import evaluate, language_model_loss
from lora_lib.tokens import (
    Example,
    Tokenizer,
    batches_by_length,
    name_examples,
    pair_examples,
)

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


def pretrain(
    checkpoint: Path, steps: int, device: torch.device
) -> tuple[SmallTransformer, Tokenizer, dict]:
    """Train for `steps` steps, going on from `checkpoint` where there is one."""
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    config = dict(vocab_size=size, num_classes=size, language_model=True, **SHAPE)
    model = SmallTransformer(**config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=max(0.05, 2 / steps)
    )
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = _restore(checkpoint, state, device)
    batches = batches_by_length(training_examples(tokenizer), BATCH_SIZE, seed=SEED + done)
    model.train()
    for step in tqdm(range(done, steps), initial=done, total=steps, desc="pretraining"):
        loss = language_model_loss(model, next(batches))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 1000 == 0:
            _store(checkpoint, state, step + 1)
    return model.eval(), tokenizer, config


def _store(checkpoint: Path, state: dict, steps: int) -> None:
    partial = checkpoint.with_suffix(".partial")
    torch.save(
        {name: part.state_dict() for name, part in state.items()} | {"steps": steps}, partial
    )
    partial.replace(checkpoint)


def _restore(checkpoint: Path, state: dict, device: torch.device) -> int:
    if not checkpoint.is_file():
        return 0
    stored = torch.load(checkpoint, map_location=device, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(stored[name])
    return stored["steps"]


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


def record(
    model: SmallTransformer, tokenizer: Tokenizer, config: dict, path: Path, **facts
) -> dict:
    """Score the base on unseen towns and write it with its provenance; returns the scores."""
    scores = {
        f"{script} {split}": evaluate(model, tokenizer, script, split)._asdict()
        for script in (BASE_SCRIPT, SECOND_SCRIPT)
        for split in ("validation", "test")
    }
    settings = dict(
        batch_size=BATCH_SIZE, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, seed=SEED, **facts
    )
    save_pretrained(model, tokenizer, config, settings | {"scores": scores}, path)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--checkpoint", type=Path, default=cache_folder() / "pretrain.pt")
    parser.add_argument("--out", type=Path, default=BASE_FILE)
    arguments = parser.parse_args()
    arguments.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    device = default_device()
    torch.backends.cuda.matmul.allow_tf32 = True
    start = time.time()
    trained = pretrain(arguments.checkpoint, arguments.steps, device)
    facts = provenance("python -m lora_course.experiments.pretrain", device)
    facts |= {"steps": arguments.steps, "seconds": round(time.time() - start)}
    print(record(*trained, arguments.out, **facts))
    arguments.checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
