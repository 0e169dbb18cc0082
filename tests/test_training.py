import copy
import itertools
import math
import os
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_lib.injection import add_lora_to_model, freeze_non_lora_params
from lora_lib.model import SmallTransformer
from lora_lib.names import Pair, load_pairs, load_spellings
from lora_lib.tasks import SyntheticDataset, TokenDataset
from lora_lib.tokens import Example, Tokenizer, batches_by_length, make_batch
from lora_lib.training import (
    accuracy,
    adapt,
    bits_per_character,
    classification_loss,
    error_rate,
    evaluate,
    fit,
    language_model_loss,
    score_names,
    train_model,
    transliterate,
    warm_up_then_decay,
)

VOCAB = 12


def tiny_language_model(max_len=16):
    torch.manual_seed(0)
    return SmallTransformer(VOCAB, 16, 2, 1, num_classes=VOCAB, max_len=max_len)


def tiny_classifier():
    torch.manual_seed(0)
    return SmallTransformer(40, 16, 2, 1, num_classes=2, max_len=16)


def batches(seed=0):
    examples = [Example([1, 5 + i, 2, 11 - i, 5 + i, 3], 3) for i in range(6)]
    return batches_by_length(examples, 4, seed)


def state(model):
    return copy.deepcopy(model.state_dict())


def changed(model, before):
    return {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}


# --- the loop ------------------------------------------------------------------------------------


def test_fit_lowers_the_loss_and_leaves_the_model_in_eval_mode():
    model = tiny_language_model()
    losses = fit(model, batches(), 60, lr=1e-2)
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert not model.training


def test_fit_trains_only_what_requires_a_gradient():
    model, _ = add_lora_to_model(tiny_language_model())
    freeze_non_lora_params(model)
    before = state(model)
    fit(model, batches(), 5, lr=1e-2)
    assert changed(model, before) == {
        f"blocks.0.attention.{w}.lora_{f}" for w in ("W_q", "W_v") for f in "AB"
    }


def test_the_same_seeds_give_the_same_training():
    def trained(seed):
        model = tiny_language_model()
        return fit(model, batches(seed), 10, lr=1e-2), state(model)

    losses, weights = trained(1)
    again, weights_again = trained(1)
    assert losses == again != trained(2)[0]
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_the_learning_rate_rises_over_a_tenth_of_the_steps_and_falls_to_zero():
    shares = [warm_up_then_decay(step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert shares[10] == 1
    assert shares[11:] == pytest.approx([(100 - i) / 90 for i in range(11, 100)])
    assert warm_up_then_decay(100, 100) == 0


@pytest.mark.parametrize("steps", [1, 5, 7, 11, 240, 500])
def test_the_learning_rate_never_exceeds_its_peak(steps):
    assert max(warm_up_then_decay(step, steps) for step in range(steps)) <= 1


def test_the_first_step_uses_the_first_share_of_the_learning_rate():
    model = tiny_language_model()
    before = model.classifier.bias.detach().clone()
    fit(model, batches(), 10, lr=1e-2, optimizer=torch.optim.Adam)
    one = tiny_language_model()
    fit(one, itertools.islice(batches(), 1), 40, lr=1e-2, optimizer=torch.optim.Adam)
    # Adam's first step moves every entry by the learning rate: here 1e-2 · (1/40) / 0.1
    assert (one.classifier.bias - before).abs().max().item() == pytest.approx(2.5e-3, rel=1e-3)


def test_fit_takes_no_more_batches_than_steps():
    source = batches()
    fit(tiny_language_model(), source, 3, lr=1e-3)
    expected = next(itertools.islice(batches(), 3, None))
    assert torch.equal(next(source).input_ids, expected.input_ids)


def test_fit_refuses_a_model_with_nothing_to_train(refuses):
    model = tiny_language_model().requires_grad_(False)
    with refuses(model, ValueError, "requires_grad", "nothing to train"):
        fit(model, batches(), 3, lr=1e-3)


@pytest.mark.parametrize("steps", [0, -1])
def test_fit_refuses_a_training_without_steps(refuses, steps):
    model = tiny_language_model()
    with refuses(model, ValueError, f"steps is {steps}; it must be at least 1"):
        fit(model, batches(), steps, lr=1e-3)


@pytest.mark.parametrize("steps", [10, 30])
def test_fit_stops_at_a_loss_that_is_not_finite(steps):
    def broken(model, batch):
        return language_model_loss(model, batch) * math.nan

    model = tiny_language_model()
    with pytest.raises(FloatingPointError, match=r"loss is nan at step .*0\.001.*lower the learn"):
        fit(model, batches(), steps, lr=1e-3, loss_function=broken)
    assert not model.training


@pytest.mark.parametrize("first", [1, 7, 25, 26, 30])
def test_fit_names_the_first_step_whose_loss_is_not_finite(first):
    calls = itertools.count(1)

    def broken(model, batch):
        return language_model_loss(model, batch) * (math.inf if next(calls) >= first else 1)

    with pytest.raises(FloatingPointError, match=rf"loss is inf at step {first} "):
        fit(tiny_language_model(), batches(), 30, lr=1e-3, loss_function=broken)


@pytest.fixture
def interruptible():
    """As a kernel is; a program that was started in the background may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_stop_button_returns_the_losses_so_far(capsys):
    calls = itertools.count(1)

    def interrupted(model, batch):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C and the stop button send
        return language_model_loss(model, batch)

    losses = fit(tiny_language_model(), batches(), 10, lr=1e-3, loss_function=interrupted)
    assert losses == fit(tiny_language_model(), batches(), 10, lr=1e-3)[:3]
    assert "interrupted after 3 of 10 steps" in capsys.readouterr().out


def test_an_interrupt_returns_the_losses_so_far(capsys):
    def interrupted():
        yield from itertools.islice(batches(), 3)
        raise KeyboardInterrupt

    model = tiny_language_model()
    losses = fit(model, interrupted(), 10, lr=1e-3)
    assert losses == pytest.approx(fit(tiny_language_model(), batches(), 10, lr=1e-3)[:3])
    assert "interrupted after 3 of 10 steps" in capsys.readouterr().out
    assert not model.training


def test_an_interrupt_does_not_hide_a_loss_that_is_not_finite():
    def interrupted():
        yield from itertools.islice(batches(), 3)
        raise KeyboardInterrupt

    def broken(model, batch):
        return language_model_loss(model, batch) * math.nan

    model = tiny_language_model()
    with pytest.raises(FloatingPointError, match="loss is nan at step 1 "):
        fit(model, interrupted(), 10, lr=1e-3, loss_function=broken)
    assert not model.training


def test_an_interrupt_before_the_first_step_returns_no_losses():
    def interrupted():
        raise KeyboardInterrupt
        yield

    assert fit(tiny_language_model(), interrupted(), 10, lr=1e-3) == []


# --- task B --------------------------------------------------------------------------------------


def test_the_loss_of_a_uniform_model_is_the_log_of_the_vocabulary():
    model = tiny_language_model()
    for parameter in model.classifier.parameters():
        nn.init.zeros_(parameter)
    assert language_model_loss(model, next(batches())).item() == pytest.approx(math.log(VOCAB))
    tokenizer = Tokenizer("abcdef")
    bits = bits_per_character(model, tokenizer, [Pair("ab", "c"), Pair("a", "def")])
    assert bits == pytest.approx(math.log2(VOCAB))


def test_the_loss_counts_labelled_positions_only():
    model = tiny_language_model().eval()
    short, long = Example([1, 5, 2, 7, 3], 3), Example([1, 6, 6, 6, 6, 2, 8, 8, 8, 3], 6)
    logits = model(make_batch([short]).input_ids).log_softmax(-1)
    by_hand = -(logits[0, 2, 7] + logits[0, 3, 3]) / 2
    one, other, both = (
        language_model_loss(model, make_batch(e)) for e in ([short], [long], [short, long])
    )
    torch.testing.assert_close(one, by_hand)
    torch.testing.assert_close(both, (2 * one + 4 * other) / 6)


def test_adapting_a_few_pairs_learns_them_by_heart(base, tokenizer):
    add_lora_to_model(base, target_modules="all-linear")
    freeze_non_lora_params(base)
    pairs = load_pairs("georgian", "train")[:8]
    losses = adapt(base, tokenizer, pairs, steps=50, lr=1e-2, batch_size=8)
    assert losses[-1] < 0.3 < 3 < losses[0]
    assert transliterate(base, tokenizer, [p.latin for p in pairs]) == [p.target for p in pairs]


def test_adapt_takes_its_batches_in_the_order_of_its_seed(base, tokenizer):
    pairs = load_pairs("georgian", "train")[:20]

    def losses(seed):
        torch.manual_seed(0)
        return adapt(
            copy.deepcopy(base), tokenizer, pairs, steps=3, lr=1e-3, batch_size=4, seed=seed
        )

    assert losses(1) == losses(1) != losses(2)


NAMES = ["Gori", "San José", "Omsk", "Novosibirsk", "Tula", "Kazan", "Perm"]


def test_names_are_written_in_the_order_given_and_as_one_by_one(base, tokenizer):
    written = transliterate(base, tokenizer, NAMES)
    assert written == [transliterate(base, tokenizer, [name])[0] for name in NAMES]
    assert written[2] == "Омск"
    assert transliterate(base, tokenizer, NAMES[::-1]) == written[::-1]


def test_writing_takes_the_most_likely_token_each_time(base, tokenizer):
    ids = tokenizer.prompt("Kazan")
    while ids[-1] != Tokenizer.EOS:
        ids.append(base(torch.tensor([ids]))[0, -1].argmax().item())
    expected = tokenizer.decode(ids[len(tokenizer.prompt("Kazan")) :])
    assert transliterate(base, tokenizer, ["Kazan"]) == [expected]


def test_writing_stops_after_max_new_tokens(base, tokenizer):
    (whole,) = transliterate(base, tokenizer, ["Novosibirsk"])
    assert transliterate(base, tokenizer, ["Novosibirsk"], max_new=3) == [whole[:3]]


@pytest.mark.parametrize("max_new", [0, -1])
def test_writing_no_tokens_at_all_is_refused(base, tokenizer, max_new):
    with pytest.raises(ValueError, match=f"max_new is {max_new}; it must be at least 1"):
        transliterate(base, tokenizer, ["Omsk"], max_new)


def test_no_names_give_no_spellings(base, tokenizer):
    assert transliterate(base, tokenizer, []) == []


def test_a_plain_string_of_names_is_refused_with_the_list_to_write(base, tokenizer):
    with pytest.raises(TypeError, match=r"'Gori'; give a list of names: \['Gori'\]"):
        transliterate(base, tokenizer, "Gori")


def test_a_name_too_long_for_the_model_is_refused(base, tokenizer):
    with pytest.raises(ValueError, match="max_len"):
        transliterate(base, tokenizer, ["a" * 200])


@pytest.mark.parametrize(
    ("written", "accepted", "rate"),
    [
        ("гори", ["гори"], 0),
        ("горы", ["гори"], 1 / 4),
        ("гор", ["гори", "горл"], 1 / 4),
        ("горло", ["гори", "горло"], 0),
        ("", ["гори"], 1),
        ("горигори", ["го"], 3),
    ],
)
def test_the_error_rate_is_the_edit_distance_over_the_length(written, accepted, rate):
    assert error_rate(written, accepted) == rate


def test_scores_are_means_over_names_in_order():
    spellings = {"Gori": ("гори", "горі"), "Omsk": ("омск",), "Tula": ("тула",)}
    exact, rate = score_names(["горі", "омсс", "т"], spellings)
    assert exact == pytest.approx(1 / 3)
    assert rate == pytest.approx((0 + 1 / 4 + 3 / 4) / 3)


def test_a_spelling_too_few_is_refused():
    with pytest.raises(ValueError, match="longer"):
        score_names(["гори"], {"Gori": ("гори",), "Omsk": ("омск",)})


def test_evaluate_scores_every_name_once_and_every_pair(base, tokenizer):
    scores = evaluate(base, tokenizer, "cyrillic", "validation", limit=60)
    spellings = load_spellings("cyrillic", "validation", limit=60)
    pairs = [Pair(latin, s) for latin, accepted in spellings.items() for s in accepted]
    assert len(pairs) > 60
    written = transliterate(base, tokenizer, list(spellings))
    assert (scores.exact_match, scores.error_rate) == score_names(written, spellings)
    assert scores.bits == pytest.approx(bits_per_character(base, tokenizer, pairs))
    assert scores.exact_match > 0.35


def test_scores_of_no_names_are_refused(base, tokenizer):
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1, or None"):
        evaluate(base, tokenizer, "georgian", limit=0)


def test_bits_do_not_depend_on_the_size_of_the_batches(base, tokenizer):
    pairs = load_pairs("cyrillic", "test")[:50]
    one_by_one = bits_per_character(base, tokenizer, pairs, batch_size=1)
    assert bits_per_character(base, tokenizer, pairs, batch_size=7) == pytest.approx(one_by_one)


# --- classification ------------------------------------------------------------------------------


@pytest.fixture
def loader():
    torch.manual_seed(0)
    return DataLoader(SyntheticDataset(200, vocab_size=40, seq_len=16), 32)


def test_accuracy_is_the_share_of_right_classes():
    model = tiny_classifier()
    nn.init.zeros_(model.classifier.weight)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))  # says 1, whatever it reads
    dataset = TokenDataset([[5], [6, 7], [8], [9]], [1, 0, 1, 1])
    assert accuracy(model, DataLoader(dataset, 3, collate_fn=dataset.collate)) == 0.75


def test_classification_reads_each_row_up_to_its_mask():
    model = tiny_classifier().eval()
    dataset = TokenDataset([[5, 6, 7], [8]], [0, 1])
    together = classification_loss(model, dataset.collate([dataset[0], dataset[1]]))
    apart = [classification_loss(model, dataset.collate([dataset[i]])) for i in (0, 1)]
    torch.testing.assert_close(together, (apart[0] + apart[1]) / 2)


def test_train_model_learns_the_synthetic_task(loader):
    model = tiny_classifier()
    history = train_model(model, loader, loader, epochs=8, lr=3e-3)
    assert {name: len(values) for name, values in history.items()} == {
        "train_loss": 8,
        "train_acc": 8,
        "test_acc": 8,
    }
    assert history["train_loss"][-1] < 0.5 * history["train_loss"][0]
    assert history["test_acc"][-1] > 0.95
    assert history["test_acc"][-1] == accuracy(model, loader)
    assert not model.training


def test_train_model_trains_only_what_requires_a_gradient(loader):
    model = tiny_classifier().requires_grad_(False)
    model.classifier.requires_grad_()
    before = state(model)
    train_model(model, loader, loader, epochs=1)
    assert changed(model, before) == {"classifier.weight", "classifier.bias"}


def test_train_model_refuses_a_model_with_nothing_to_train(loader, refuses):
    model = tiny_classifier().requires_grad_(False)
    with refuses(model, ValueError, "nothing to train"):
        train_model(model, loader, loader)


def test_train_model_stops_at_a_loss_that_is_not_finite(loader):
    model = tiny_classifier()
    nn.init.constant_(model.classifier.bias, math.nan)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 1 .*lower the learn"):
        train_model(model, loader, loader, epochs=2)


class InterruptedAtTheSecondTime(list):
    """The batches once, then Ctrl-C."""

    times = 0

    def __iter__(self):
        self.times += 1
        if self.times == 2:
            raise KeyboardInterrupt
        return super().__iter__()


def test_an_interrupt_returns_the_epochs_that_were_finished(loader, capsys):
    interrupted = InterruptedAtTheSecondTime(loader)
    history = train_model(tiny_classifier(), interrupted, loader, epochs=3)
    assert [len(values) for values in history.values()] == [1, 1, 1]
    assert "interrupted after 1 of 3 epochs" in capsys.readouterr().out


def test_an_interrupt_while_the_test_set_is_read_leaves_the_history_even(loader):
    interrupted = InterruptedAtTheSecondTime(loader)
    history = train_model(tiny_classifier(), loader, interrupted, epochs=3)
    assert [len(values) for values in history.values()] == [1, 1, 1]
