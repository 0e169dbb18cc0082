"""LoRA with rewards instead of answers: GRPO from scratch, on names of towns.

The model writes every name several times; a reward says how near each one is to a recorded
spelling, never what the spelling is. Names that came out better than the others of their group
become likelier, the worse ones less likely (Shao et al. 2024, arXiv:2402.03300).

Three things of the paper are left out, and why. *Clipping* guards a batch that is used for several
updates; here every batch is sampled from the model as it stands and used once. *The KL penalty*
holds a model near its start; here the distance is measured instead. *The division by the group's
standard deviation* makes a group whose names are nearly all alike count as much as any other; the
plain difference is the gradient of the mean reward (Liu et al. 2025, arXiv:2503.20783).
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_lib.model import SmallTransformer
from lora_lib.scores import error_rate, mode
from lora_lib.tokens import Tokenizer
from lora_lib.training import fit

Spellings = Mapping[str, Sequence[str]]
EXTRA = 4  # a written name may be so many letters longer than the Latin one; 98 % are not


def grpo(
    model: SmallTransformer,
    tokenizer: Tokenizer,
    spellings: Spellings,
    *,
    steps: int,
    lr: float,
    names: int = 32,
    samples: int = 8,
    seed: int = 0,
) -> list[Tensor]:
    """Train what has requires_grad by reward alone; returns the rewards of every step, (names,
    samples). `spellings` are those that the reward compares with: Latin name → recorded spellings.

    The loop, its schedule and clipping are those of `fit`: only the loss is another. Raises as fit,
    and ValueError if no `names` names are of one length.
    """
    generator = torch.Generator().manual_seed(seed)
    rewards = []

    def loss(model: SmallTransformer, batch: Sequence[str]) -> Tensor:
        prompts = prompts_of(batch, tokenizer, model).repeat_interleave(samples, dim=0)
        written = sample(model, prompts, generator)
        scored = score(tokenizer, written, batch, spellings)  # (names, samples)
        rewards.append(scored)
        return policy_loss(log_probability(model, prompts, written), scored)

    batches = batches_of_names(list(spellings), names, seed, tokenizer)
    fit(model, batches, steps, lr, loss_function=loss)
    return rewards


def policy_loss(log_probabilities: Tensor, rewards: Tensor) -> Tensor:
    """The loss of GRPO: samples that beat the mean of their group become likelier.

    `log_probabilities` (names · samples,), `rewards` (names, samples).
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    return -(advantages.flatten().to(log_probabilities) * log_probabilities).mean()


@torch.no_grad()
def sample(model: SmallTransformer, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """Continue each of `prompts` (B, T), all of one length, letter by letter at temperature 1.

    Returns ids (B, n) up to and with EOS, then PAD; a row that has no EOS within its room is cut.
    Random numbers, one a letter, come from `generator` on the CPU: the same on every device.
    """
    size, length = prompts.shape
    chosen = torch.rand(length + EXTRA, size, 1, generator=generator).to(prompts.device)
    cache, token, written = {}, prompts, []
    going_on = torch.ones_like(prompts[:, :1], dtype=torch.bool)
    with mode(model, training=False):
        for numbers in chosen:
            below = model(token, cache=cache)[:, -1].softmax(dim=-1).cumsum(dim=-1)
            token = torch.searchsorted(below, numbers, right=True).clamp_max(below.shape[1] - 1)
            token = token.where(going_on, Tokenizer.PAD)  # (B, 1)
            written.append(token)
            going_on = going_on & (token != Tokenizer.EOS)
            if not going_on.any():
                break
    return torch.cat(written, dim=1)


def score(
    tokenizer: Tokenizer, written: Tensor, names: Sequence[str], spellings: Spellings
) -> Tensor:
    """The reward of every sample, (names, samples): 1 − error rate, so 1 for a recorded spelling,
    0 or less where nothing is right. `written` (names · samples, n) has the samples of a name in a
    row."""
    texts = [tokenizer.decode(row) for row in written.tolist()]
    samples = len(texts) // len(names)
    accepted = [spellings[name] for name in names for _ in range(samples)]
    rewards = [1 - error_rate(*pair) for pair in zip(texts, accepted, strict=True)]
    return torch.tensor(rewards).view(len(names), samples)


def log_probability(model: SmallTransformer, prompts: Tensor, written: Tensor) -> Tensor:
    """Natural logarithm of the probability of each row of `written` after its prompt, (B,)."""
    logits = continuation_logits(model, prompts, written).transpose(1, 2)
    losses = F.cross_entropy(logits, written, ignore_index=Tokenizer.PAD, reduction="none")
    return -losses.sum(dim=1)


def continuation_logits(model: SmallTransformer, prompts: Tensor, written: Tensor) -> Tensor:
    """What the model says at each place of `written`, (B, n, vocabulary)."""
    logits = model(torch.cat((prompts, written), dim=1)[:, :-1])
    return logits[:, prompts.shape[1] - 1 :]


# --- names ---------------------------------------------------------------------------------------


def prompts_of(names: Sequence[str], tokenizer: Tokenizer, model: SmallTransformer) -> Tensor:
    """The prompts of names of one length, (names, T), on the model's device."""
    device = next(model.parameters()).device
    return torch.tensor([tokenizer.prompt(name) for name in names], device=device)


def by_length(names: Sequence[str], tokenizer: Tokenizer) -> list[list[str]]:
    """The names in groups of one length, which need no padding."""
    groups = defaultdict(list)
    for name in names:
        groups[len(tokenizer.prompt(name))].append(name)
    return list(groups.values())


def batches_of_names(
    names: Sequence[str], size: int, seed: int, tokenizer: Tokenizer
) -> Iterator[list[str]]:
    """Endless shuffled batches of `size` names of one length. What does not fill a batch waits for
    the next epoch, in which it may be others'.

    Raises ValueError if no `size` names are of one length.
    """
    groups = [group for group in by_length(names, tokenizer) if len(group) >= size]
    if not groups:
        raise ValueError(
            f"no {size} of the {len(names)} names are of one length; take smaller batches"
        )
    rng = random.Random(seed)
    while True:
        batches = []
        for group in groups:
            rng.shuffle(group)
            batches += [group[i : i + size] for i in range(0, len(group) - size + 1, size)]
        rng.shuffle(batches)
        yield from batches


# --- how far it went -----------------------------------------------------------------------------


@torch.inference_mode()
def divergence(
    model: SmallTransformer, start: SmallTransformer, tokenizer: Tokenizer, names: Sequence[str]
) -> float:
    """KL divergence of `model` from `start` in bits per character, along names that `model`
    samples: exact over the vocabulary at each place, one sample a name."""
    generator = torch.Generator().manual_seed(0)
    bits = characters = 0.0
    for group in by_length(names, tokenizer):
        prompts = prompts_of(group, tokenizer, model)
        written = sample(model, prompts, generator)
        with mode(model, training=False), mode(start, training=False):
            ours, theirs = (
                continuation_logits(m, prompts, written).double().log_softmax(dim=-1)
                for m in (model, start)
            )
        there = written != Tokenizer.PAD
        gaps = (ours.exp() * (ours - theirs)).sum(dim=-1)[there]
        bits += gaps.sum().item() / torch.log(torch.tensor(2.0)).item()
        characters += there.sum().item()
    return bits / characters


def write_and_score(
    model: SmallTransformer,
    tokenizer: Tokenizer,
    name: str,
    accepted: Sequence[str],
    samples: int = 8,
    seed: int = 0,
) -> tuple[list[str], Tensor]:
    """Samples of one name, and their rewards."""
    prompts = prompts_of([name], tokenizer, model).expand(samples, -1)
    written = sample(model, prompts, torch.Generator().manual_seed(seed))
    texts = [tokenizer.decode(row) for row in written.tolist()]
    return texts, score(tokenizer, written, [name], {name: accepted})[0]


def sample_rewards(model: SmallTransformer, tokenizer: Tokenizer, spellings: Spellings) -> Tensor:
    """The rewards of eight samples of every name, (names, 8), grouped by length."""
    generator = torch.Generator().manual_seed(0)
    rewards = []
    for group in by_length(list(spellings), tokenizer):
        prompts = prompts_of(group, tokenizer, model).repeat_interleave(8, dim=0)
        written = sample(model, prompts, generator)
        rewards.append(score(tokenizer, written, group, spellings))
    return torch.cat(rewards)


def information(rewards: Tensor) -> float:
    """Bits that the reward of a sample can tell when its name is known: the entropy of the rewards
    within a group of samples, mean over the groups (…, names, samples), at most log2(samples)."""
    same = rewards.unsqueeze(-1) == rewards.unsqueeze(-2)  # (…, names, samples, samples)
    return -same.double().mean(dim=-1).log2().mean().item()
