"""Two tasks with classes: is it the same town? And the lesson's synthetic one."""

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from lora_lib.names import load_pairs, load_spellings, stable_hash
from lora_lib.tokens import Tokenizer


class NamePair(NamedTuple):
    latin: str
    target: str
    label: int  # 1: the same town


def same_town_pairs(script: str, split: str, limit: int | None = None) -> list[NamePair]:
    """Right pairs, the first `limit` of them, and as many wrong ones, alternating.

    The wrong ones are hard: the spelling of another town of the split, whose Latin name starts
    with the same letter, and of similar length (two characters more or less).
    """
    pairs, spellings = load_pairs(script, split), load_spellings(script, split)
    rng = random.Random(stable_hash(f"{script} {split}"))
    by_letter = defaultdict(list)
    for latin, target in pairs:
        by_letter[latin[0]].append(target)
    result = []
    for latin, target in pairs[:limit]:
        wrong = [
            other
            for other in by_letter[latin[0]]
            if other not in spellings[latin] and abs(len(other) - len(target)) <= 2
        ]
        if wrong:
            result += [NamePair(latin, target, 1), NamePair(latin, rng.choice(wrong), 0)]
    return result


class TokenDataset(Dataset):
    """Sequences of equal or unequal length with labels.

    An item is a dict with `input_ids` (T,) and `label` (); `collate` pads on the right and adds
    `attention_mask`. Raises ValueError if there is nothing, or not one label for each sequence.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], labels: Sequence[int]):
        if not 0 < len(sequences) == len(labels):
            raise ValueError(
                f"{len(sequences)} sequences and {len(labels)} labels were given; a dataset needs "
                "as many of one as of the other, and at least one"
            )
        self.sequences = [torch.as_tensor(s) for s in sequences]
        self.labels = torch.as_tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.sequences[index], "label": self.labels[index]}

    @staticmethod
    def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = [item["input_ids"] for item in items]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=Tokenizer.PAD),
            "attention_mask": pad([torch.ones_like(i) for i in ids], batch_first=True),
            "label": torch.stack([item["label"] for item in items]),
        }


def same_town_dataset(pairs: Sequence[NamePair], tokenizer: Tokenizer) -> TokenDataset:
    """`BOS latin SEP target`, without EOS: pretraining never had EOS as an input."""
    return TokenDataset(
        [tokenizer.pair(p.latin, p.target)[:-1] for p in pairs], [p.label for p in pairs]
    )


# --- the lesson's synthetic task -----------------------------------------------------------------


def create_synthetic_data(
    num_samples: int, vocab_size: int, seq_len: int, num_classes: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token sequences (num_samples, seq_len) and labels (num_samples,), drawn with torch's seed.

    The vocabulary is cut into `num_classes` equal parts; a sequence of class c takes its tokens
    from part c, except at a quarter of its positions, where they come from the next part.

    Raises ValueError unless 2 ≤ num_classes ≤ vocab_size.
    """
    if not 2 <= num_classes <= vocab_size:
        raise ValueError(
            f"num_classes is {num_classes}; it must lie between 2 and vocab_size ({vocab_size}), "
            "since each class needs tokens of its own"
        )
    labels = torch.randint(num_classes, (num_samples,))
    part = labels[:, None].repeat(1, seq_len)
    elsewhere = torch.rand(num_samples, seq_len).argsort(dim=1) < seq_len // 4
    part[elsewhere] = (part[elsewhere] + 1) % num_classes
    size = vocab_size // num_classes
    return part * size + torch.randint(size, (num_samples, seq_len)), labels


class SyntheticDataset(TokenDataset):
    """What create_synthetic_data returns, or a list of (tokens, label), as a dataset; items
    `input_ids` (T,) and `label` ()."""

    def __init__(self, data: tuple[torch.Tensor, torch.Tensor] | list[tuple[Sequence[int], int]]):
        if isinstance(data, list):
            data = [tokens for tokens, _ in data], [label for _, label in data]
        super().__init__(*data)
