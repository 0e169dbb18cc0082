"""LoRA with rewards: the gradient, what is sampled and scored, and what was recorded."""

import math
from itertools import islice, product

import pytest
import torch
from torch import nn

from lora_course import reinforcement as rl
from lora_course.experiments import rewards
from lora_course.experiments.real_runs import job_of, make_trainable, read_rows
from lora_course.experiments.rewards import TARGETS, load_start, other_spellings
from lora_course.results import RESULTS
from lora_lib.names import load_pairs
from lora_lib.scores import evaluate
from lora_lib.tokens import Tokenizer

SPELLINGS = {"Bremen": ("ბრემენი",), "Berlin": ("ბერლინი", "ბერლინ"), "Tokyo": ("ტოკიო",)}


@pytest.fixture
def start():
    return load_start()


def test_on_average_the_gradient_is_that_of_the_mean_reward_but_for_the_size_of_a_group():
    reward, samples = torch.tensor([0.2, 1.0, 0.5]), 3
    scores = torch.tensor([0.3, -0.4, 0.8], requires_grad=True)
    chances = scores.softmax(0)
    [wanted] = torch.autograd.grad(chances @ reward, scores, retain_graph=True)
    average = torch.zeros(3)
    for group in map(list, product(range(3), repeat=samples)):  # every group that can be drawn
        # Beside it a second name, whose samples are all as good: there is nothing to learn from it.
        rewards = torch.stack((reward[group], torch.ones(samples)))
        loss = rl.policy_loss(scores.log_softmax(0)[[*group, 0, 0, 1]], rewards)
        [gradient] = torch.autograd.grad(loss, scores)
        average -= chances[group].prod().detach() * gradient
    # A sample stands in the mean that it is compared with: hence (n − 1) / n.
    torch.testing.assert_close(average, wanted * (samples - 1) / samples / 2)


def test_letters_come_as_often_as_the_model_says(start):
    model, tokenizer = start
    prompts = rl.prompts_of(["Lima"], tokenizer, model)
    wanted = model(prompts)[0, -1].softmax(-1)
    written = rl.sample(model, prompts.expand(1000, -1), torch.Generator().manual_seed(0))
    found = torch.bincount(written[:, 0], minlength=len(tokenizer)) / 1000
    assert (found - wanted).abs().max() < 0.05  # three standard deviations are 0.047


def test_a_sample_ends_with_eos_and_its_probability_is_the_product_of_its_letters(start):
    model, tokenizer = start
    prompts = rl.prompts_of(["Bremen", "Berlin"] * 8, tokenizer, model)
    written = rl.sample(model, prompts, torch.Generator().manual_seed(0))
    likelihood = rl.log_probability(model, prompts, written)
    assert (written == Tokenizer.EOS).any(dim=1).sum() > 8
    for prompt, row, value in zip(prompts, written, likelihood, strict=True):
        so_far, total = prompt, 0.0
        for token in row:
            if token == Tokenizer.PAD:
                break
            total += model(so_far[None])[0, -1].log_softmax(-1)[token].item()
            so_far = torch.cat((so_far, token[None]))
        assert value.item() == pytest.approx(total, abs=1e-4)
        letters = len(so_far) - len(prompt)
        assert (row[letters:] == Tokenizer.PAD).all()
        assert letters == len(row) or so_far[-1] == Tokenizer.EOS


def test_rewards_of_known_names(start):
    tokenizer = start[1]
    texts = ["ბრემენი", "ბრემენ", "", "ბერლინ", "ბერლინი", "ბარლინ"]
    longest = max(map(len, texts)) + 1
    rows = [[*tokenizer.encode(text), Tokenizer.EOS] for text in texts]
    written = torch.tensor([row + [Tokenizer.PAD] * (longest - len(row)) for row in rows])
    rewards = rl.score(tokenizer, written, ["Bremen", "Berlin"], SPELLINGS)
    wanted = [[1, 1 - 1 / 7, 0], [1, 1, 1 - 1 / 6]]  # the nearest of two spellings counts
    torch.testing.assert_close(rewards, torch.tensor(wanted))


def test_an_epoch_repeats_no_name_and_has_none_that_the_start_was_trained_on(start):
    batches = islice(rl.batches_of_names(list(other_spellings()), 32, 0, start[1]), 60)
    flat = [name for batch in batches for name in batch]
    assert len(set(flat)) == len(flat) == 60 * 32
    assert not set(flat) & {pair.latin for pair in load_pairs("georgian", "train")[:100]}


def test_training_by_reward_alone_finds_a_recorded_spelling(start):
    model, tokenizer = start
    spellings = {"Bremen": SPELLINGS["Bremen"]}
    rewards = torch.stack(
        rl.grpo(model, tokenizer, spellings, steps=30, lr=1e-3, names=1, samples=16)
    )
    assert rewards.shape == (30, 1, 16)
    assert rewards[0].mean() < 0.8 and rewards[-3:].mean() > 0.95


def test_bits_that_a_reward_can_tell():
    assert rl.information(torch.ones(5, 8)) == 0
    assert rl.information(torch.arange(8.0).view(1, 1, 8)) == pytest.approx(3)
    assert rl.information(torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0] * 4])) == pytest.approx(0.5)


def test_divergence_is_nought_from_oneself_and_by_hand_from_another(start):
    theirs, tokenizer = start
    ours = load_start()[0]
    assert rl.divergence(theirs, ours, tokenizer, ["Lima", "Bremen"]) == 0
    for one in (ours, theirs):
        nn.init.zeros_(one.classifier.weight)
        nn.init.zeros_(one.classifier.bias)  # theirs: all evenly
    ours.classifier.bias.data[:] = -100.0
    ours.classifier.bias.data[[10, Tokenizer.EOS]] = 0.0  # one half each, at every place
    wanted = math.log2(len(tokenizer) / 2)
    assert rl.divergence(ours, theirs, tokenizer, ["Lima"]) == pytest.approx(wanted, abs=1e-4)


def test_the_start_and_the_first_steps_come_out_again_on_this_machine(monkeypatch):
    rows = read_rows(RESULTS / "rewards.csv")
    [recorded] = [row for row in rows if row["task"] == "start"]
    for name, value in evaluate(*load_start(), "georgian")._asdict().items():
        assert value == pytest.approx(float(recorded[name]), abs=0.01), name
    # The schedule is that of all steps; the names end after ten.
    all_names = rl.batches_of_names
    for module in (rl, rewards):
        monkeypatch.setattr(module, "batches_of_names", lambda *a: islice(all_names(*a), 10))
    for kind in (("rewards", "lora"), ("answers", "full")):
        first = next(row for row in rows if (row["task"], row["method"]) == kind)
        job = job_of(first)
        model, tokenizer = load_start()
        curve = rewards.train(job, make_trainable(model, job, TARGETS), tokenizer)["curve"]
        assert float(curve) == pytest.approx(float(first["curve"].split()[0]), abs=0.01), kind
